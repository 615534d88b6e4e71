// Steps whose loss or gradient norm is out of the ordinary: what the ranks found, and what they
// made of it (worker/engine/numerical_guard.h decides), as events.
#include <algorithm>

#include "comm/base/counted.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/core/failure.h"

namespace penstock {

// A replay finds the same again, which is no news.
void Coordinator::note_guard(Job& job, const StepRecord& step) {
  if (step.replayed || step.guard.signal == GuardSignal::kNone) return;
  GuardRecord& guards = job.record.guards;
  const bool skipped = step.guard.action == GuardPolicy::kSkip;
  ++(skipped ? guards.skips : guards.warnings);
  changed(job);
  note(job, "coordinator",
       {std::string(to_string(step.guard.signal)),
        fmt::format("step {} {}: {}", step.step,
                    skipped ? fmt::format("is left out ({} of guards.max_skips {})", guards.skips,
                                          job.spec.guards.max_skips)
                            : "counts, with a warning",
                    words_of(step.guard))});
}

// The ranks have stopped before that step and wait for this. Nothing is a failure here but one
// rollback too many.
void Coordinator::roll_back(Job& job, const StepReport& found) {
  JobRecord& record = job.record;
  GuardRecord& guards = record.guards;
  const GuardsSpec& spec = job.spec.guards;
  const std::string what = fmt::format("step {}: {}", found.step, words_of(found.guard));
  if (guards.rollbacks >= spec.max_rollbacks) {
    Failure failure;
    failure.reason = {kCauseDiverged,
                      fmt::format("{}; it was rolled back {} already (guards.max_rollbacks)", what,
                                  counted(guards.rollbacks, "time"))};
    failure.rank = Rank{0};
    failure.worker = worker_name(record.placement.at(0).worker);
    failure.fatal = true;
    return fail(job, std::move(failure));
  }
  drop_proof(job);
  ++guards.rollbacks;
  guards.rolling_back = true;
  const int64_t first = std::max<int64_t>(1, found.step - spec.rollback_steps + 1);
  guards.rolled_back.push_back({{first, found.step}, record.epoch});
  // Records of steps up to here are of a training that had other steps.
  record.rebalanced_step = std::max(record.rebalanced_step, found.step);
  stop_epoch(job, JobState::kRecovering, JobState::kFailed, 0, "coordinator",
             {kRollingBack, fmt::format("{}; goes back to leave out what led to it ({} of "
                                        "guards.max_rollbacks {})",
                                        what, guards.rollbacks, spec.max_rollbacks)});
}

// The next epoch's checkpoint is known, and so is what it leaves out.
void Coordinator::settle_rollback(Job& job, const CheckpointFound& found) {
  JobRecord& record = job.record;
  if (!record.guards.rolling_back) return;
  StepRange& steps = record.guards.rolled_back.back().steps;
  const bool nearer = found.step >= steps.first;  // every older one is gone
  if (nearer) steps.first = found.step + 1;
  record.guards.rolling_back = false;
  record.highest_step = std::min(record.highest_step, steps.first - 1);
  note(job, "coordinator",
       {"rolled_back",
        fmt::format("goes on from {}; steps {} to {} are left out from now on{}",
                    found.manifest.empty() ? "initial weights"
                                           : fmt::format("the checkpoint of step {}", found.step),
                    steps.first, steps.last,
                    nearer ? fmt::format(", fewer than guards.rollback_steps {}: no older "
                                         "checkpoint was kept",
                                         job.spec.guards.rollback_steps)
                           : "")});
}

std::vector<StepRange> Coordinator::left_out_of(const Job& job) {
  std::vector<StepRange> steps;
  for (const Rollback& rollback : job.record.guards.rolled_back) steps.push_back(rollback.steps);
  return steps;
}

}  // namespace penstock
