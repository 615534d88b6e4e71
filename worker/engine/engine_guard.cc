// What the guards of an engine's steps decide, put into effect.
#include "worker/engine/engine.h"

namespace penstock {

Status Engine::judge(double loss, double grad_norm) {
  finding_ = guard_.judge(loss, grad_norm);
  diverged_ = finding_.action >= GuardPolicy::kStop;
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

}  // namespace penstock
