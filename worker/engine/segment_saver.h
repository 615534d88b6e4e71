// Saves a rank's state while training goes on: save() copies the state into staging memory, which
// is all the training loop waits for; a background thread writes, syncs and reports the segment.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "checkpoint/segment_writer.h"

namespace penstock {

class SegmentSaver {
 public:
  // Called on the background thread when a segment is durable, or could not be saved (its file is
  // gone then).
  using Done = std::function<void(int64_t step, const Result<SegmentSummary>&)>;

  // Allocates and touches all memory now (the staging copy, and the buffers it is written through),
  // so that a machine too small for it fails at the start and not at the first save. `state`:
  // borrowed; read inside save() only. `identity.step` is set per save. `files` is borrowed.
  SegmentSaver(Path directory, SegmentIdentity identity, std::span<const SliceSource> state,
               Done done, FileSystem& files = real_file_system());
  // Waits for the save under way, whose Done is called.
  ~SegmentSaver();
  SegmentSaver(const SegmentSaver&) = delete;
  SegmentSaver& operator=(const SegmentSaver&) = delete;

  // Takes the state as it is now as that of `step`. Waits while an earlier save is still being
  // written: at most one staging copy exists, and a disk that is too slow slows the run down
  // instead of filling the memory. Caller's thread only.
  void save(int64_t step);
  // Waits until nothing is being written. Caller's thread only.
  void wait();

  // All memory that saving uses.
  uint64_t memory_bytes() const { return staging_.size() + buffers_.byte_count(); }

 private:
  void run();

  const Path directory_;
  const SegmentIdentity identity_;
  const std::span<const SliceSource> state_;
  const Done done_;
  FileSystem& files_;
  // Caller's while `pending_` is false, the background thread's while it is true.
  std::vector<std::byte> staging_;
  std::vector<SliceSource> staged_;  // state_, pointing into staging_
  const DiskBuffers buffers_;
  int64_t step_ = 0;

  std::mutex mutex_;
  std::condition_variable changed_;
  bool pending_ = false;   // guarded by mutex_
  bool stopping_ = false;  // guarded by mutex_
  std::thread thread_;     // last: starts when all above is made
};

}  // namespace penstock
