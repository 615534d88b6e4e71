// Steps whose loss or gradient norm is out of the ordinary: what the ranks found, and what they
// made of it (worker/engine/numerical_guard.h decides), as events.
#include "coordinator/core/coordinator.h"

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

}  // namespace penstock
