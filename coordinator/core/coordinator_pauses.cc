// Epochs that end on purpose, without losing a step: the ranks finish the step in progress, save
// and wait; once that is committed the epoch is ended, and what it was ended for is done.
//
//   wanted_pause ─► PauseRanks ─► SegmentSaved{pauses} of every rank ─► commit ─► on_paused
//        ▲              │ repeated                                        │ failed
//        └──────────────┴───────── the ranks train on ◄───────────────────┘
//
// Why an epoch is to pause is looked up anew at every turn, from what is on record: a pause that
// was under way when this process died goes on, and one that is not wanted any more is forgotten.
#include "coordinator/core/coordinator.h"

namespace penstock {
namespace {

// Paused ranks end by themselves as soon as they hear it.
constexpr int64_t kPausedGraceMs = 5000;
// From a pause whose checkpoint failed to the next.
constexpr Duration kPauseRetry = std::chrono::seconds(30);

}  // namespace

void Coordinator::on_event(const SuspendJob& suspend) {
  const auto refuse = [&](Status status) {
    effects_.answers.push_back({suspend.request, std::move(status), {}});
  };
  const auto found = jobs_.find(suspend.job);
  if (found == jobs_.end()) return refuse(not_found(fmt::format("no job {}", suspend.job)));
  Job& job = found->second;
  const JobState state = job.record.state;
  if (is_final(state) ||
      (state == JobState::kStopping && job.record.outcome != JobState::kSuspended)) {
    return refuse(
        failed_precondition(fmt::format("job {} \"{}\" is {}: there is nothing to suspend",
                                        job.record.id, job.record.name, job_state_name(state))));
  }
  if (state != JobState::kSuspended && state != JobState::kStopping && !job.record.suspend) {
    job.record.suspend = true;
    changed(job);
    note(job, "user", {"suspend_requested", "is to be suspended"});
    if (!suspend_unplaced(job)) pause_when_wanted(job);
  }
  effects_.answers.push_back({suspend.request, {}, job.record.id});
}

// Why the job's ranks are to end with their state saved; nullopt: they are not.
std::optional<Reason> Coordinator::wanted_pause(const Job& job) const {
  if (job.record.suspend) {
    return Reason{"suspending", "finishes the step in progress and saves, to be suspended"};
  }
  if (job.record.scale_to > 0) {
    return Reason{kScaling, fmt::format("finishes the step in progress and saves, to go on with "
                                        "data {} instead of {}",
                                        job.record.scale_to, job.spec.parallelism.data)};
  }
  if (const Worker* worker = drained_host(job)) {
    return Reason{kDraining,
                  "finishes the step in progress and saves, to move off " + drained_words(*worker)};
  }
  return std::nullopt;
}

// Called whenever the answer may have changed, and at every tick: orders may be lost.
void Coordinator::pause_when_wanted(Job& job) {
  JobRecord& record = job.record;
  if (!wants_ranks(record.state)) return;
  const std::optional<Reason> why = wanted_pause(job);
  if (!why) {
    const bool was_wanted = record.state == JobState::kRunning &&
                            (record.reason.code == kDraining || record.reason.code == kScaling);
    if (was_wanted) wait(job, {"running", "trains on where it is"});
    return;
  }
  if (now_ < job.pause_after) return;
  // A replay commits nothing, and one that ends begins anew; ranks that have not begun have nothing
  // that is not on disk, unless they go on from memory.
  const bool nothing_to_save =
      record.proof || (record.state != JobState::kRunning && !record.restored_from_memory);
  if (nothing_to_save) return end_for_pause(job);
  if (record.state != JobState::kRunning) return;
  const auto& newest = record.last_step;
  if (newest && newest->epoch == record.epoch && newest->step >= record.target_steps) return;
  wait(job, *why);
  job.pause_after = now_ + two_beats();
  for (const WorkerId worker : hosts(job)) send(worker, PauseRanks{record.id, record.epoch});
}

// The checkpoint of `step` is committed, and every rank waits for this.
void Coordinator::on_paused(Job& job, int64_t) {
  if (job.record.state == JobState::kRunning) end_for_pause(job);
}

void Coordinator::end_for_pause(Job& job) {
  JobRecord& record = job.record;
  const bool suspend = std::exchange(record.suspend, false);
  const std::string from = record.checkpoint
                               ? fmt::format("the checkpoint of step {}", record.checkpoint->step)
                               : "the start";
  if (suspend) {
    return stop_epoch(
        job, JobState::kStopping, JobState::kSuspended, kPausedGraceMs, "coordinator",
        {"suspended", fmt::format("suspended; penstock resume goes on from {}", from)});
  }
  if (record.scale_to > 0) {
    return stop_epoch(job, JobState::kRecovering, JobState::kFailed, kPausedGraceMs, "coordinator",
                      {kScaling, fmt::format("restarts from {} with data {} instead of {}", from,
                                             record.scale_to, job.spec.parallelism.data)});
  }
  if (const Worker* worker = drained_host(job)) {
    return stop_epoch(
        job, JobState::kRecovering, JobState::kFailed, kPausedGraceMs, "coordinator",
        {kDraining, fmt::format("moves off {}; goes on from {} as soon as other workers have room",
                                drained_words(*worker), from)});
  }
  stop_epoch(job, JobState::kRecovering, JobState::kFailed, kPausedGraceMs, "coordinator",
             {kPauseOver,
              fmt::format("had paused for what is not wanted any more; goes on from {}", from)});
}

// Of any checkpoint: a pause has no better chance right now.
void Coordinator::on_save_failed(Job& job, const std::string& reason) {
  if (job.record.state != JobState::kRunning || !wanted_pause(job)) return;
  job.pause_after = now_ + kPauseRetry;
  wait(job,
       {"pause_delayed",
        fmt::format("its state could not be saved ({}), so it trains on; tried again in {:.0f} s",
                    reason, to_seconds(kPauseRetry))});
}

// A job without ranks has nothing to save, unless daemons hold newer steps than any checkpoint: it
// goes on from those first. Returns whether it is suspended now.
bool Coordinator::suspend_unplaced(Job& job) {
  JobRecord& record = job.record;
  const bool waits = record.state == JobState::kQueued || record.state == JobState::kRecovering;
  if (!record.suspend || !waits || job.placed() || !job.held.empty() || !job.copies.empty()) {
    return false;
  }
  record.suspend = false;
  const std::string from =
      record.checkpoint
          ? fmt::format("the newest checkpoint known, of step {}", record.checkpoint->step)
          : "the start";
  transition(job, JobState::kSuspended, "coordinator",
             {"suspended", fmt::format("suspended; penstock resume goes on from {}", from)});
  return true;
}

}  // namespace penstock
