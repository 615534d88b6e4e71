#include "worker/optim/lr_schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace penstock {

double learning_rate_at(const OptimizerSpec& optimizer, int64_t step_count, int64_t step) {
  const std::vector<StepLevel<double>>& levels = optimizer.lr_levels;
  if (!levels.empty() && step >= levels.front().from_step) {
    return optimizer.lr * value_at(levels, 1.0, step);
  }
  const int64_t warmup = optimizer.warmup_steps;
  if (step < warmup) {
    return optimizer.lr * static_cast<double>(step) / static_cast<double>(warmup);
  }
  const int64_t begin = warmup + optimizer.hold_steps;
  const int64_t last = levels.empty() ? step_count : levels.front().from_step - 1;
  const int64_t end = optimizer.decay_steps > 0 ? begin + optimizer.decay_steps : last;
  if (step <= begin || end <= begin) return optimizer.lr;
  const double progress =
      std::min(1.0, static_cast<double>(step - begin) / static_cast<double>(end - begin));
  const double share = 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
  return optimizer.lr * (optimizer.min_lr_ratio + (1.0 - optimizer.min_lr_ratio) * share);
}

}  // namespace penstock
