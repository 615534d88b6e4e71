// Which device runs which rank. Pure.
#pragma once

#include <optional>
#include <vector>

#include "comm/run/job_spec.h"
#include "coordinator/core/records.h"

namespace penstock {

struct FreeDevices {
  WorkerId worker;
  std::vector<int32_t> devices;  // ascending
};

// All ranks or none. A job that fits on one worker goes to the fullest that takes it whole, so that
// large holes stay for large jobs. Otherwise expert groups (neighbouring ranks, whose all-to-all is
// the heaviest traffic) are kept whole on one worker as long as one can take them, on as few
// workers as possible, in rank order, which also puts pipeline neighbours close. Equal inputs give
// equal placements.
std::optional<std::vector<RankPlacement>> place(const ParallelismSpec& parallelism,
                                                std::vector<FreeDevices> free);

}  // namespace penstock
