// The interval between checkpoints of jobs whose spec says "auto".
#include <cmath>

#include "coordinator/core/coordinator.h"

namespace penstock {
namespace {

// The first steps of an attempt touch memory and make connections, and say nothing of later ones.
constexpr size_t kStepsToMeasure = 5;

SaveLimits limits_of(const Job& job) {
  const CheckpointSpec& spec = job.spec.checkpoint;
  return {
      .max_overhead = spec.max_overhead,
      .mtbf_prior_seconds = spec.device_mtbf_hours * 3600.0 / static_cast<double>(job.world_size()),
      .steps_max = job.record.target_steps};
}

}  // namespace

void Coordinator::measure_step(Job& job, const StepRecord& step) {
  if (!job.record.saving) return;
  const double trained = std::max(0.0, step.step_seconds - step.checkpoint_seconds);
  job.saves.on_step(now_, step.step, trained, step.checkpoint_seconds);
  // Another rank's word may be here before this report.
  if (job.failed_rounds.contains(step.step)) job.saves.on_failure(step.step);
  SaveMeasurements& measured = job.record.saving->measured;
  measured.training_seconds += step.step_seconds;
  if (job.recent_steps.size() < kStepsToMeasure) return;
  measured.step_seconds = job.saves.step_seconds();
  // The first choice was made for this very save: nothing is known before it is committed.
  if (measured.save_count > 0) choose_interval(job);
}

void Coordinator::measure_commit(Job& job, int64_t step) {
  if (!job.record.saving) return;
  ++job.record.saving->commits;
  if (const auto cost = job.saves.on_commit(now_, step)) job.record.saving->measured.add(*cost);
  choose_interval(job);
}

void Coordinator::choose_interval(Job& job) {
  if (!job.record.saving) return;
  SavingRecord& saving = *job.record.saving;
  const SaveLimits limits = limits_of(job);
  SaveChoice choice = choose_save_interval(saving.measured, limits);
  const int64_t current = saving.choice.reason.empty() ? 0 : saving.choice.steps;
  if (!worth_changing(current, choice, saving.measured, limits)) return;
  saving.choice = std::move(choice);
  changed(job);
  note(job, "coordinator", {"checkpoint_interval", saving.choice.reason});
  if (job.record.state == JobState::kRunning) send_save_interval(job);  // else StartRank says it
}

// What the ranks count to: what was chosen, but while a proof goes on the one checkpoint that it
// compares, the newest of those that were recorded. It says everything about those before it, too.
int64_t Coordinator::save_interval_of(const Job& job) {
  const std::optional<ProofRecord>& proof = job.record.proof;
  if (proof && proof->digest_step > 0) return proof->digest_step - proof->from;
  return job.record.saving->choice.steps;
}

void Coordinator::send_save_interval(const Job& job) {
  const int64_t steps = save_interval_of(job);
  for (const WorkerId worker : hosts(job)) {
    send(worker, SaveInterval{job.record.id, job.record.epoch, steps});
  }
}

// The step after which the state is saved next, as far as it is known; none: only after the last.
std::optional<int64_t> Coordinator::next_save_step(const Job& job) const {
  const JobRecord& record = job.record;
  const int64_t newest = record.last_step ? record.last_step->step : record.restore_step;
  if (record.saving) return newest + 1;  // it may be any of them
  const int64_t interval = job.spec.checkpoint.interval;
  if (interval == 0) return std::nullopt;
  return (newest / interval + 1) * interval;
}

}  // namespace penstock
