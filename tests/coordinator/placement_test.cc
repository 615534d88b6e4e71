#include "coordinator/core/placement.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "comm/base/random.h"

namespace penstock {
namespace {

ParallelismSpec grid(int64_t pipeline, int64_t expert, int64_t data = 1) {
  ParallelismSpec spec;
  spec.pipeline = pipeline;
  spec.expert = expert;
  spec.data = data;
  return spec;
}

FreeDevices worker(uint64_t id, int32_t devices) {
  FreeDevices free{{id}, {}};
  for (int32_t i = 0; i < devices; ++i) free.devices.push_back(i);
  return free;
}

std::vector<uint64_t> workers_of(const std::vector<RankPlacement>& placement) {
  std::vector<uint64_t> ids;
  for (const RankPlacement& at : placement) ids.push_back(at.worker.value);
  return ids;
}

TEST(PlacementTest, AllOrNothing) {
  EXPECT_FALSE(place(grid(2, 2), {worker(1, 2), worker(2, 1)}).has_value());
  EXPECT_FALSE(place(grid(1, 1), {}).has_value());
}

TEST(PlacementTest, AJobThatFitsOnOneWorkerTakesTheFullestOneThatHoldsIt) {
  const auto placement = place(grid(2, 1), {worker(1, 8), worker(2, 3), worker(3, 1)});
  EXPECT_EQ(workers_of(placement.value()), (std::vector<uint64_t>{2, 2}));
}

TEST(PlacementTest, ExpertGroupsStayWholeOnOneWorker) {
  const auto placement = place(grid(2, 2), {worker(1, 1), worker(2, 2), worker(3, 2)});
  EXPECT_EQ(workers_of(placement.value()), (std::vector<uint64_t>{2, 2, 3, 3}));
}

TEST(PlacementTest, AGroupIsSplitOnlyWhenNoWorkerTakesItWhole) {
  const auto placement = place(grid(2, 2), {worker(1, 1), worker(2, 1), worker(3, 2)});
  EXPECT_EQ(workers_of(placement.value()), (std::vector<uint64_t>{3, 3, 1, 2}));
}

TEST(PlacementTest, NeverTwoRanksOnOneDeviceNorOnOneThatIsNotFree) {
  for (uint64_t seed = 0; seed < 500; ++seed) {
    Random random(seed, 1);
    std::vector<FreeDevices> free;
    std::set<std::pair<uint64_t, int32_t>> allowed;
    for (uint64_t id = 1; id <= 1 + random.below(6); ++id) {
      FreeDevices one{{id}, {}};
      for (int32_t device = 0; device < 8; ++device) {
        if (random.below(2)) one.devices.push_back(device);
      }
      for (const int32_t device : one.devices) allowed.insert({id, device});
      free.push_back(std::move(one));
    }
    const ParallelismSpec spec =
        grid(1 + random.below(3), 1 + random.below(3), 1 + random.below(3));
    const auto placement = place(spec, free);
    ASSERT_EQ(placement.has_value(), std::ssize(allowed) >= spec.world_size()) << "seed " << seed;
    if (!placement) continue;
    ASSERT_EQ(std::ssize(*placement), spec.world_size());
    for (const RankPlacement& at : *placement) {
      ASSERT_EQ(allowed.erase({at.worker.value, at.device}), 1u) << "seed " << seed;
    }
  }
}

}  // namespace
}  // namespace penstock
