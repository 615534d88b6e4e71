#include "tests/support/simulation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

#include "comm/base/log.h"
#include "tests/run/spec_text.h"

namespace penstock {
namespace {

constexpr size_t kLinesKept = 60;

std::string manifest_path(JobId job, int64_t step) {
  return fmt::format("/sim/{}/{}", job, step);
}

// As coordinator/driver/checkpoint_threads.cc finds it, of checkpoints that are all whole; 0: none.
int64_t step_to_restore(const std::map<int64_t, Epoch>& saved, const FindCheckpoint& find) {
  int64_t newest = 0;
  int64_t oldest = 0;
  for (const auto& [step, epoch] : saved) {
    const bool taken_back =
        std::any_of(find.rolled_back.begin(), find.rolled_back.end(),
                    [&, step = step, epoch = epoch](const Rollback& rollback) {
                      return epoch <= rollback.epoch && step >= rollback.steps.first;
                    });
    if (taken_back || (find.before && step >= find.before->last)) continue;
    if (oldest == 0) oldest = step;
    if (!find.before || step < find.before->first) newest = step;
  }
  return newest > 0 || !find.before ? newest : oldest;
}

#if defined(NDEBUG) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
constexpr uint64_t kFewerSeeds = 1;
#else
constexpr uint64_t kFewerSeeds = 7;
#endif

uint64_t from_environment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

}  // namespace

JobSpec sim_spec(const std::string& name) {
  JobSpec spec = parse_job_spec(kValidSpec, "sim").value();
  spec.name = name;
  spec.training.steps = kSimSteps;
  spec.checkpoint.interval = kSimCheckpointInterval;
  spec.recovery.max_restarts = 1000;
  return spec;
}

StepReport sim_report(JobId job, Epoch epoch, int64_t step) {
  StepReport report{.job = job, .epoch = epoch, .step = step};
  report.loss = 1.0 / static_cast<double>(step);
  report.tokens = 8;
  report.step_seconds = 0.2;
  return report;
}

SegmentSaved sim_segment(JobId job, Epoch epoch, Rank rank, int64_t step) {
  return {.job = job,
          .epoch = epoch,
          .rank = rank,
          .step = step,
          .file = "s",
          .footer_digest = {},
          .slices = {}};
}

void SimulatedCoordinator::trace(const std::string& line) {
  trace_.push_back(fmt::format("{:.1f} s {}", to_seconds(now_ - begin_), line));
  if (trace_.size() > kLinesKept) trace_.pop_front();
}

void SimulatedCoordinator::violate(const std::string& what) {
  if (!violation_.empty()) return;
  violation_ = fmt::format("at {:.1f} s: {}", to_seconds(now_ - begin_), what);
  for (const std::string& line : trace_) violation_ += "\n  " + line;
}

void SimulatedCoordinator::start_core() {
  StoredState stored;
  for (const auto& [key, value] : store_) {
    const bool is_state =
        std::any_of(std::begin(kStatePrefixes), std::end(kStatePrefixes),
                    [&](const std::string_view prefix) { return key.starts_with(prefix); });
    if (is_state) stored.records.push_back({key, value});
    if (key.starts_with(kEventPrefix)) stored.last_event_sequence = decode_event(value)->sequence;
  }
  CoreConfig config;
  config.checkpoint_root = "/sim";
  config.checkpoint_timeout = std::chrono::seconds(60);  // well within the quiet time
  core_.emplace(config);
  Result<Effects> effects = core_->start(now_, stored);
  if (!effects.ok()) {
    return violate("restart from records: " + effects.status().to_string());
  }
  for (const JobId job : accepted_) {
    if (!core_->find_job(job)) violate(fmt::format("acknowledged job {} is lost", job));
  }
  apply(*std::move(effects));
}

void SimulatedCoordinator::crash_core(Duration down_max) {
  trace("core: crash");
  core_.reset();
  core_back_at_ = now_ + below(down_max);
  const size_t kept = random_.below(unsynced_.size() + 1);
  for (size_t i = 0; i < kept; ++i) store_[unsynced_[i].key] = unsynced_[i].value;
  unsynced_.clear();
  // A commit under way may have reached the disk, but nobody hears of it.
  for (const auto& [at, event] : disk_results_) {
    const auto* done = std::get_if<CheckpointDone>(&event);
    if (done && done->status.ok() && chance(0.5)) {
      checkpoints_[done->job][done->step] = done->epoch;
    }
  }
  disk_results_.clear();
  disk_free_at_.clear();
}

void SimulatedCoordinator::feed(const Event& event) {
  ++core_steps_;
  if (const auto* done = std::get_if<CheckpointDone>(&event); done && done->status.ok()) {
    checkpoints_[done->job][done->step] = done->epoch;
  }
  Event given = event;
  if (auto* found = std::get_if<CheckpointFound>(&given)) {
    const auto& saved = checkpoints_[found->job];
    for (const auto& [step, epoch] : saved) found->steps.push_back(step);
    found->step = step_to_restore(saved, finds_[found->job]);
    if (found->step > 0) found->manifest = manifest_path(found->job, found->step);
  }
  apply(core_->step(now_, given));
}

void SimulatedCoordinator::feed_disk_results() {
  while (core_ && !disk_results_.empty() && disk_results_.begin()->first <= now_) {
    feed(disk_results_.extract(disk_results_.begin()).mapped());
  }
}

void SimulatedCoordinator::apply(Effects effects) {
  for (Record& record : records_of(effects)) unsynced_.push_back(std::move(record));
  if (effects.must_sync()) {
    for (Record& record : unsynced_) store_[record.key] = std::move(record.value);
    unsynced_.clear();
  }
  for (const JobEvent& event : effects.events) {
    if (event.reason.code == kRebalancing) ++rebalances_;
    trace(fmt::format("core: job {} epoch {} {}: {}", event.job, event.epoch, event.reason.code,
                      event.reason.message));
  }
  check(effects);
  for (OutgoingMessage& out : effects.messages) send(std::move(out));
  for (const CommitCheckpoint& commit : effects.commits) {
    CheckpointDone done;
    done.job = commit.job;
    done.epoch = commit.epoch;
    done.step = commit.step;
    const bool fails = chance(commit_failures_) && commit.step != kSimSteps;
    if (fails) done.status = resource_exhausted("disk full");
    done.checkpoint.manifest = manifest_path(commit.job, commit.step);
    emit_from_disk(commit.job, std::chrono::milliseconds(1000), done);
  }
  for (const FindCheckpoint& find : effects.finds) {
    CheckpointFound found;
    found.job = find.job;
    finds_[find.job] = find;
    emit_from_disk(find.job, std::chrono::milliseconds(300), found);
  }
  for (const Answer& answer : effects.answers) {
    if (answer.status.ok() && answer.job.value != 0) accepted_.insert(answer.job);
  }
}

void SimulatedCoordinator::emit_from_disk(JobId job, Duration longest, Event event) {
  Instant& free_at = disk_free_at_[job];
  free_at = std::max(now_, free_at) + below(longest);
  disk_results_.emplace(free_at, std::move(event));
}

int64_t SimulatedCoordinator::restarts() const {
  int64_t count = 0;
  for (const auto& [id, job] : core_->jobs()) count += job.record.restarts;
  return count;
}

bool SimulatedCoordinator::all_jobs(int count, const std::function<bool(JobState)>& passes) const {
  return core_ && std::ssize(accepted_) >= count &&
         std::all_of(accepted_.begin(), accepted_.end(),
                     [&](JobId job) { return passes(core_->find_job(job)->record.state); });
}

std::string SimulatedCoordinator::states() const {
  if (!core_) return " no coordinator";
  std::string states;
  for (const auto& [id, job] : core_->jobs()) {
    states += fmt::format(" job {} {} epoch {}: {};", id, job_state_name(job.record.state),
                          job.record.epoch, job.record.reason.message);
  }
  return states;
}

void run_seeds(uint64_t first_seed, uint64_t count,
               const std::function<std::string(uint64_t seed)>& run) {
  ::setenv("PENSTOCK_LOG", "off", 1);
  start_logging("simulation");
  const uint64_t only = from_environment("PENSTOCK_SIM_SEED", 0);
  const uint64_t end = first_seed + from_environment("PENSTOCK_SIM_SEEDS", count / kFewerSeeds);
  for (uint64_t seed = first_seed; seed < end; ++seed) {
    if (only != 0 && seed != only) continue;
    const std::string violation = run(seed);
    EXPECT_EQ(violation, "") << "seed " << seed;
    if (!violation.empty()) return;
  }
}

}  // namespace penstock
