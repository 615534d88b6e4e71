// Saves a rank's state while training goes on: a background thread writes, syncs and reports the
// segment, from memory that nobody changes meanwhile (TrainingState::hold()). Nothing is copied but
// into the buffers on the way to the disk.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <thread>

#include "checkpoint/segment_writer.h"

namespace penstock {

class SegmentSaver {
 public:
  // Called on the background thread when a segment is durable, or could not be saved (its file is
  // gone then).
  using Done = std::function<void(int64_t step, const Result<SegmentSummary>&)>;

  // Allocates and touches all memory now, so that a machine too small for it fails at the start and
  // not at the first save. `identity.step` is set per save. `files` is borrowed.
  SegmentSaver(Path directory, SegmentIdentity identity, Done done,
               FileSystem& files = real_file_system());
  // Waits for the save under way, whose Done is called.
  ~SegmentSaver();
  SegmentSaver(const SegmentSaver&) = delete;
  SegmentSaver& operator=(const SegmentSaver&) = delete;

  // Begins to save `state` as that of `step`. It is borrowed, and must not change, until Done is
  // called. REQUIRES: nothing is being written. Caller's thread only.
  void save(int64_t step, std::span<const SliceSource> state);
  // Waits until nothing is being written. Caller's thread only.
  void wait();

  // All memory that saving uses.
  uint64_t memory_bytes() const { return buffers_.byte_count(); }

 private:
  void run();

  const Path directory_;
  const SegmentIdentity identity_;
  const Done done_;
  FileSystem& files_;
  // Caller's while `pending_` is false, the background thread's while it is true.
  const DiskBuffers buffers_;
  int64_t step_ = 0;
  std::span<const SliceSource> state_;

  std::mutex mutex_;
  std::condition_variable changed_;
  bool pending_ = false;   // guarded by mutex_
  bool stopping_ = false;  // guarded by mutex_
  std::thread thread_;     // last: starts when all above is made
};

}  // namespace penstock
