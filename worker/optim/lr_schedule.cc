#include "worker/optim/lr_schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace penstock {

double learning_rate_at(const OptimizerSpec& optimizer, int64_t step_count, int64_t step) {
  const int64_t warmup = optimizer.warmup_steps;
  if (step < warmup) {
    return optimizer.lr * static_cast<double>(step) / static_cast<double>(warmup);
  }
  if (step_count <= warmup) return optimizer.lr;
  const double progress =
      std::min(1.0, static_cast<double>(step - warmup) / static_cast<double>(step_count - warmup));
  const double share = 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
  return optimizer.lr * (optimizer.min_lr_ratio + (1.0 - optimizer.min_lr_ratio) * share);
}

}  // namespace penstock
