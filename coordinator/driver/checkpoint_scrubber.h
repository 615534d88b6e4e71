// Reads the checkpoints that are kept over and over again, slowly, so that a damaged one is known
// before it is needed. A thread per job that has not ended, as for other work on its directory: one
// that hangs holds up nothing else. The jobs that have ended, of which there may be thousands,
// share one thread, which reads them one after the other; a directory of theirs that hangs holds up
// the others of them.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "comm/base/clock.h"
#include "comm/base/file.h"
#include "comm/base/ids.h"
#include "comm/control/event_loop.h"

namespace penstock {

struct ScrubOptions {
  // Of each job that has not ended, and of all that have together; 0: nothing is scrubbed.
  uint64_t bytes_per_second = 0;
  Duration pause = std::chrono::hours(1);  // from the end of one pass to the next
};

// Called on the loop.
struct ScrubHandlers {
  std::function<void(JobId, uint64_t bytes)> on_read;
  // Once for each damaged checkpoint: what is wrong with it, as one sentence.
  std::function<void(JobId, const std::string& damage)> on_damage;
  std::function<void(JobId)> on_pass;   // every checkpoint of the running job has been read
  std::function<void()> on_ended_pass;  // every ended job has had its turn
};

// Loop thread only.
class CheckpointScrubber {
 public:
  // Borrows `loop`, which must outlive this.
  CheckpointScrubber(EventLoop& loop, ScrubOptions options, ScrubHandlers handlers);
  ~CheckpointScrubber();  // waits for the reads under way
  CheckpointScrubber(const CheckpointScrubber&) = delete;
  CheckpointScrubber& operator=(const CheckpointScrubber&) = delete;

  // From now on, until forget(): a first pass over a running job begins at once, over an ended one
  // when it is its turn. Again, as the same: nothing changes.
  void watch_running(JobId job, const Path& directory);
  void watch_ended(JobId job, const Path& directory);
  void forget(JobId job);
  // Stops everything and waits, at most `limit`. The jobs whose directories have not answered by
  // then: until they do, the destructor would wait. Not while the loop runs.
  std::vector<JobId> finish(Duration limit);

 private:
  class Reader;
  void scrub_running(Reader& reader, const Path& directory);
  void scrub_ended(Reader& reader);
  bool read_over(Reader& reader, const Path& directory, const std::function<bool()>& wanted);
  std::optional<std::pair<JobId, Path>> ended_after(JobId job);

  EventLoop& loop_;
  const ScrubOptions options_;
  const ScrubHandlers handlers_;
  uint64_t last_number_ = 0;
  std::map<JobId, uint64_t> running_;
  std::mutex mutex_;
  std::map<JobId, Path> ended_;                   // guarded by mutex_
  std::map<JobId, std::set<uint64_t>> reported_;  // guarded: commits whose damage is known
  // By number; those that were forgotten stay until their threads have ended. Number 0 reads the
  // jobs that have ended. Last: their threads use all of the above.
  std::map<uint64_t, std::unique_ptr<Reader>> readers_;
};

}  // namespace penstock
