#include "coordinator/driver/checkpoint_scrubber.h"

#include <fmt/format.h>

#include <condition_variable>
#include <thread>

#include "checkpoint/pace.h"
#include "checkpoint/scrub.h"
#include "comm/base/counted.h"
#include "comm/base/log.h"
#include "coordinator/driver/loop_tally.h"

namespace penstock {

// A thread that reads at a limited rate.
class CheckpointScrubber::Reader {
 public:
  Reader(JobId job, uint64_t bytes_per_second, std::function<void(Reader&)> body)
      : pace(bytes_per_second), job_(job), thread_([this, body = std::move(body)] {
          body(*this);
          const std::lock_guard lock(mutex_);
          ended_ = true;
          changed_.notify_all();
        }) {}
  ~Reader() {
    pace.stop();
    thread_.join();
  }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  bool ended_within(Duration limit) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, limit, [this] { return ended_; });
  }
  // Whose directory it reads, or read last.
  JobId job() {
    const std::lock_guard lock(mutex_);
    return job_;
  }
  void turn_to(JobId job) {
    const std::lock_guard lock(mutex_);
    job_ = job;
  }

  Pace pace;  // stop() by the loop, the rest by the thread

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  JobId job_;           // guarded by mutex_
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

void CheckpointScrubber::watch_running(JobId job, const Path& directory) {
  if (options_.bytes_per_second == 0 || running_.contains(job)) return;
  forget(job);
  const uint64_t number = ++last_number_;
  running_[job] = number;
  const auto body = [this, number, directory](Reader& reader) {
    scrub_running(reader, directory);
    loop_.post([this, number] { readers_.erase(number); });
  };
  readers_[number] = std::make_unique<Reader>(job, options_.bytes_per_second, body);
}

void CheckpointScrubber::watch_ended(JobId job, const Path& directory) {
  if (options_.bytes_per_second == 0) return;
  if (const std::lock_guard lock(mutex_); ended_.contains(job)) return;
  forget(job);
  {
    const std::lock_guard lock(mutex_);
    ended_[job] = directory;
  }
  std::unique_ptr<Reader>& reader = readers_[0];
  if (reader) return;
  const auto body = [this](Reader& self) { scrub_ended(self); };
  reader = std::make_unique<Reader>(job, options_.bytes_per_second, body);
}

void CheckpointScrubber::forget(JobId job) {
  if (const auto at = running_.find(job); at != running_.end()) {
    readers_.at(at->second)->pace.stop();
    running_.erase(at);
  }
  const std::lock_guard lock(mutex_);
  ended_.erase(job);
}

// One pass over the checkpoints of reader.job(), as long as it is `wanted`. False: the directory
// cannot be read.
bool CheckpointScrubber::read_over(Reader& reader, const Path& directory,
                                   const std::function<bool()>& wanted) {
  const JobId job = reader.job();
  const auto visit = [&](const CheckedCheckpoint& checked) {
    if (checked.unreadable()) {
      log_warning("job {} is not scrubbed: {}", job, words_of(checked.report.damages.front()));
    }
    if (!checked.damaged()) return;
    if (const std::lock_guard lock(mutex_); !reported_[job].insert(checked.commit_seq).second)
      return;
    loop_.post([this, job, text = sentence(checked)] { handlers_.on_damage(job, text); });
  };
  LoopTally tally(loop_, [this, job](uint64_t bytes) { handlers_.on_read(job, bytes); });
  const ReadPace pace = [&](uint64_t bytes) {
    if (!reader.pace.spend(bytes) || !wanted()) return false;
    tally.add(bytes);
    return true;
  };
  const Status read = check_checkpoints(directory, job, {}, pace, visit);
  if (!read.ok()) log_debug("job {} is not scrubbed: {}", job, read.to_string());
  return read.ok();
}

// The body of a running job's thread.
void CheckpointScrubber::scrub_running(Reader& reader, const Path& directory) {
  const JobId job = reader.job();
  do {
    const bool read = read_over(reader, directory, [] { return true; });
    if (read && reader.pace.pause({})) loop_.post([this, job] { handlers_.on_pass(job); });
  } while (reader.pace.pause(options_.pause));
}

std::optional<std::pair<JobId, Path>> CheckpointScrubber::ended_after(JobId job) {
  const std::lock_guard lock(mutex_);
  const auto at = ended_.upper_bound(job);
  if (at == ended_.end()) return std::nullopt;
  return *at;
}

// The body of the thread that reads what ended jobs have left.
void CheckpointScrubber::scrub_ended(Reader& reader) {
  do {
    JobId last{0};
    while (const auto next = ended_after(last)) {
      last = next->first;
      reader.turn_to(last);
      const auto wanted = [&] {
        const std::lock_guard lock(mutex_);
        return ended_.contains(last);
      };
      read_over(reader, next->second, wanted);
      if (!reader.pace.pause({})) return;
    }
    loop_.post([this] { handlers_.on_ended_pass(); });
  } while (reader.pace.pause(options_.pause));
}

std::vector<JobId> CheckpointScrubber::finish(Duration limit) {
  for (const auto& [number, reader] : readers_) reader->pace.stop();
  const int64_t deadline_ns = monotonic_ns() + limit.count();
  std::vector<JobId> hanging;
  for (const auto& [number, reader] : readers_) {
    const Duration left(std::max<int64_t>(0, deadline_ns - monotonic_ns()));
    if (!reader->ended_within(left)) hanging.push_back(reader->job());
  }
  return hanging;
}

}  // namespace penstock
