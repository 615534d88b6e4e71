// What the guards of an engine's steps decide, put into effect.
#include <limits>

#include "comm/base/check.h"
#include "worker/engine/engine.h"
#include "worker/optim/lr_schedule.h"

namespace penstock {

Status Engine::judge(double loss, double grad_norm) {
  finding_ = guard_.judge(loss, grad_norm);
  diverged_ = finding_.action >= GuardPolicy::kRollback;
  if (!diverged_) return {};
  const std::string found =
      fmt::format("step {}: loss {}, gradient norm {}; ", step_, loss, grad_norm);
  const std::string budget =
      guard_.skips() > 0 ? fmt::format("; {} of the {} steps of guards.max_skips were left out",
                                       guard_.skips(), spec_.guards.max_skips)
                         : "";
  if (finding_.signal == GuardSignal::kNotFinite) {
    return internal_error(found + "lower the learning rate or look at the data of this step" +
                          budget);
  }
  return internal_error(found + words_of(finding_) + budget);
}

StepResult Engine::leave_out(int64_t step) {
  PENSTOCK_CHECK(step == state_->step() + 1, step, state_->step());
  settle();
  state_->repeat_step(step);
  finding_ = {.action = GuardPolicy::kSkip};
  constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
  return {.step = step,
          .loss = kNone,
          .grad_norm = kNone,
          .learning_rate = learning_rate_at(spec_.optimizer, spec_.training.steps, step),
          .guard = finding_};
}

}  // namespace penstock
