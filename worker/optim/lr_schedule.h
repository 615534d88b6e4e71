// Learning rate as a pure function of the step.
#pragma once

#include <cstdint>

#include "comm/run/job_spec.h"

namespace penstock {

// Linear 0 -> lr over warmup_steps (reached at step == warmup_steps), then half a cosine down to
// min_lr_ratio · lr, reached at step == step_count. Steps count from 1; past the last the rate
// stays.
double learning_rate_at(const OptimizerSpec& optimizer, int64_t step_count, int64_t step);

}  // namespace penstock
