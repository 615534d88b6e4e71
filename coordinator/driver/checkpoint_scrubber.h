// Reads the checkpoints of jobs that have not ended over and over again, slowly, so that a damaged
// one is known before it is needed. A thread per job, as for other work on its directory: one that
// hangs holds up nothing else.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "comm/base/clock.h"
#include "comm/base/file.h"
#include "comm/base/ids.h"
#include "comm/control/event_loop.h"

namespace penstock {

struct ScrubOptions {
  uint64_t bytes_per_second = 0;           // of each job; 0: nothing is scrubbed
  Duration pause = std::chrono::hours(1);  // from the end of one pass to the next
};

// Called on the loop.
struct ScrubHandlers {
  std::function<void(JobId, uint64_t bytes)> on_read;
  // Once for each damaged checkpoint: what is wrong with it, as one sentence.
  std::function<void(JobId, const std::string& damage)> on_damage;
  std::function<void(JobId)> on_pass;  // every checkpoint there was has been read
};

// Loop thread only.
class CheckpointScrubber {
 public:
  // Borrows `loop`, which must outlive this.
  CheckpointScrubber(EventLoop& loop, ScrubOptions options, ScrubHandlers handlers);
  ~CheckpointScrubber();  // waits for the reads under way
  CheckpointScrubber(const CheckpointScrubber&) = delete;
  CheckpointScrubber& operator=(const CheckpointScrubber&) = delete;

  // From now on, until forget(): the first pass begins at once. Again: nothing changes.
  void watch(JobId job, const Path& directory);
  void forget(JobId job);
  // Stops everything and waits, at most `limit`. The jobs whose directories have not answered by
  // then: until they do, the destructor would wait. Not while the loop runs.
  std::vector<JobId> finish(Duration limit);

 private:
  class Job;
  void scrub(Job& job);
  void ended(uint64_t number);

  EventLoop& loop_;
  const ScrubOptions options_;
  const ScrubHandlers handlers_;
  uint64_t last_number_ = 0;
  std::map<JobId, uint64_t> watched_;
  // By number; those that were forgotten stay until their threads have ended. Last: their threads
  // use all of the above.
  std::map<uint64_t, std::unique_ptr<Job>> jobs_;
};

}  // namespace penstock
