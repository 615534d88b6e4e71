#include "coordinator/core/placement.h"

#include <algorithm>

#include "comm/base/check.h"

namespace penstock {
namespace {

// Takes devices off the front of what is free on one worker.
void take(FreeDevices& from, int64_t count, std::vector<RankPlacement>& placement) {
  for (int64_t i = 0; i < count; ++i) placement.push_back({from.worker, from.devices[i]});
  from.devices.erase(from.devices.begin(), from.devices.begin() + count);
}

}  // namespace

std::optional<std::vector<RankPlacement>> place(const ParallelismSpec& parallelism,
                                                std::vector<FreeDevices> free) {
  const int64_t world_size = parallelism.world_size();
  int64_t free_count = 0;
  for (const FreeDevices& worker : free) free_count += std::ssize(worker.devices);
  if (free_count < world_size) return std::nullopt;

  std::vector<RankPlacement> placement;
  std::sort(free.begin(), free.end(), [](const FreeDevices& a, const FreeDevices& b) {
    return a.devices.size() != b.devices.size() ? a.devices.size() > b.devices.size()
                                                : a.worker < b.worker;
  });
  const auto fullest = std::find_if(free.rbegin(), free.rend(), [&](const FreeDevices& worker) {
    return std::ssize(worker.devices) >= world_size;
  });
  if (fullest != free.rend()) {
    take(*fullest, world_size, placement);
    return placement;
  }

  const int64_t group_size = parallelism.expert;
  const int64_t group_count = world_size / group_size;
  for (int64_t group = 0; group < group_count; ++group) {
    const auto whole = std::find_if(free.begin(), free.end(), [&](const FreeDevices& worker) {
      return std::ssize(worker.devices) >= group_size;
    });
    if (whole != free.end()) {
      take(*whole, group_size, placement);
      continue;
    }
    int64_t missing = group_size;
    for (FreeDevices& worker : free) {
      const int64_t count = std::min(missing, std::ssize(worker.devices));
      take(worker, count, placement);
      missing -= count;
    }
    PENSTOCK_CHECK(missing == 0, missing);
  }
  PENSTOCK_CHECK(std::ssize(placement) == world_size);
  return placement;
}

}  // namespace penstock
