// The same training in another data-parallel width. Pure.
#pragma once

#include <cstdint>

#include "comm/base/status.h"
#include "comm/run/job_spec.h"

namespace penstock {

// `spec` with parallelism.data `data` and the same sequences in every step: each replica takes more
// or fewer micro-batches. Where these do not come out whole, or are too few for the schedule,
// micro-batches become smaller, by a divisor; never larger, which might not fit into memory.
// kInvalidArgument says why no such spec is a valid one.
Result<JobSpec> with_data_width(const JobSpec& spec, int64_t data);

}  // namespace penstock
