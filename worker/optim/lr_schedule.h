// Learning rate as a pure function of the step.
#pragma once

#include <cstdint>

#include "comm/run/job_spec.h"

namespace penstock {

// DeepSeek-V3's shape (DeepSeek-V3 report §4.2), each part but the cosine of length 0 by default:
//
//   linear 0 -> lr       over warmup_steps, reached at step == warmup_steps
//   lr                   for hold_steps
//   half a cosine        down to min_lr_ratio · lr, over decay_steps, or up to the step before the
//                        first of lr_levels, or to step_count
//   min_lr_ratio · lr    until the first of lr_levels
//   value · lr           from each level's from_step on
//
// Steps count from 1; past the last the rate stays.
double learning_rate_at(const OptimizerSpec& optimizer, int64_t step_count, int64_t step);

}  // namespace penstock
