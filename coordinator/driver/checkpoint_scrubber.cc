#include "coordinator/driver/checkpoint_scrubber.h"

#include <fmt/format.h>

#include <condition_variable>
#include <mutex>
#include <set>
#include <thread>

#include "checkpoint/pace.h"
#include "checkpoint/scrub.h"
#include "comm/base/counted.h"
#include "comm/base/log.h"
#include "coordinator/driver/loop_tally.h"

namespace penstock {

class CheckpointScrubber::Job {
 public:
  Job(JobId id, Path directory, const ScrubOptions& options, std::function<void(Job&)> body)
      : id(id),
        directory(std::move(directory)),
        pace(options.bytes_per_second),
        thread_([this, body = std::move(body)] {
          body(*this);
          const std::lock_guard lock(mutex_);
          ended_ = true;
          changed_.notify_all();
        }) {}
  ~Job() {
    pace.stop();
    thread_.join();
  }
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  bool ended_within(Duration limit) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, limit, [this] { return ended_; });
  }

  const JobId id;
  const Path directory;
  Pace pace;                    // stop() by the loop, the rest by the thread
  std::set<uint64_t> reported;  // the thread's: commits whose damage is known

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ended_ = false;  // guarded by mutex_
  std::thread thread_;  // last: it uses all of the above
};

namespace {

std::string sentence(const CheckedCheckpoint& checked) {
  const std::string what =
      checked.step ? fmt::format("the checkpoint of step {}", *checked.step) : "a checkpoint";
  const auto others = static_cast<int64_t>(checked.report.damage_count) - 1;
  return fmt::format("{} is damaged: {}{}", what, words_of(checked.report.damages.front()),
                     others > 0 ? fmt::format("; and {} more", counted(others, "place")) : "");
}

}  // namespace

CheckpointScrubber::CheckpointScrubber(EventLoop& loop, ScrubOptions options,
                                       ScrubHandlers handlers)
    : loop_(loop), options_(options), handlers_(std::move(handlers)) {}

CheckpointScrubber::~CheckpointScrubber() = default;

void CheckpointScrubber::watch(JobId job, const Path& directory) {
  if (options_.bytes_per_second == 0 || watched_.contains(job)) return;
  const uint64_t number = ++last_number_;
  watched_[job] = number;
  jobs_[number] = std::make_unique<Job>(job, directory, options_, [this, number](Job& self) {
    scrub(self);
    loop_.post([this, number] { ended(number); });
  });
}

void CheckpointScrubber::forget(JobId job) {
  const auto at = watched_.find(job);
  if (at == watched_.end()) return;
  jobs_.at(at->second)->pace.stop();
  watched_.erase(at);
}

void CheckpointScrubber::ended(uint64_t number) {
  jobs_.erase(number);
}

// The body of a job's thread.
void CheckpointScrubber::scrub(Job& job) {
  const JobId id = job.id;
  const auto visit = [&](const CheckedCheckpoint& checked) {
    if (!checked.damaged() || !job.reported.insert(checked.commit_seq).second) return;
    loop_.post([this, id, text = sentence(checked)] { handlers_.on_damage(id, text); });
  };
  bool running = true;
  LoopTally tally(loop_, [this, id](uint64_t bytes) { handlers_.on_read(id, bytes); });
  const ReadPace pace = [&](uint64_t bytes) {
    running = job.pace.spend(bytes);
    if (running) tally.add(bytes);
    return running;
  };
  while (running) {
    const Status read = check_checkpoints(job.directory, id, {}, pace, visit);
    if (!read.ok()) log_debug("job {} is not scrubbed: {}", id, read.to_string());
    if (read.ok() && running) loop_.post([this, id] { handlers_.on_pass(id); });
    running = running && job.pace.pause(options_.pause);
  }
}

std::vector<JobId> CheckpointScrubber::finish(Duration limit) {
  for (const auto& [number, job] : jobs_) job->pace.stop();
  const int64_t deadline_ns = monotonic_ns() + limit.count();
  std::vector<JobId> hanging;
  for (const auto& [number, job] : jobs_) {
    const Duration left(std::max<int64_t>(0, deadline_ns - monotonic_ns()));
    if (!job->ended_within(left)) hanging.push_back(job->id);
  }
  return hanging;
}

}  // namespace penstock
