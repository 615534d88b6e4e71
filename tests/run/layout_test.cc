#include "comm/run/layout.h"

#include <gtest/gtest.h>

#include <map>
#include <set>

namespace penstock {
namespace {

ParallelismSpec grid(int64_t pipeline, int64_t expert, int64_t data,
                     Schedule schedule = Schedule::kDualPipe) {
  return {.pipeline = pipeline, .expert = expert, .data = data, .schedule = schedule};
}

std::vector<int32_t> numbers(const std::vector<Rank>& ranks) {
  std::vector<int32_t> values;
  for (const Rank rank : ranks) values.push_back(rank.value);
  return values;
}

TEST(LayoutTest, EveryRankHasItsOwnPlaceAndFindsItsWayBack) {
  for (const auto& p : {grid(1, 1, 1), grid(2, 2, 1), grid(4, 2, 3), grid(2, 4, 2)}) {
    std::set<std::tuple<int64_t, int64_t, int64_t>> seen;
    for (int32_t r = 0; r < p.world_size(); ++r) {
      const GridPosition at = grid_position(p, Rank{r});
      EXPECT_EQ(rank_at(p, at), Rank{r});
      EXPECT_TRUE(seen.emplace(at.pipeline_index, at.data_index, at.expert_index).second);
    }
  }
}

TEST(LayoutTest, ExpertPeersAreNeighbours) {
  EXPECT_EQ(numbers(expert_group(grid(2, 4, 2), Rank{6})), (std::vector<int32_t>{4, 5, 6, 7}));
  EXPECT_EQ(numbers(expert_group(grid(2, 1, 2), Rank{3})), (std::vector<int32_t>{3}));
}

TEST(LayoutTest, UnderDualPipeEveryStageHasTwoHostsThatMirrorEachOther) {
  EXPECT_EQ(stage_hosts(grid(4, 1, 1), 0), (std::vector<int64_t>{0, 3}));
  EXPECT_EQ(stage_hosts(grid(4, 1, 1), 2), (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(stages_of(grid(4, 1, 1), 3), (std::vector<int64_t>{3, 0}));
}

TEST(LayoutTest, Under1f1bAndInAPipelineOfOneEveryStageHasOneHost) {
  EXPECT_EQ(stage_hosts(grid(4, 1, 1, Schedule::kOneForwardOneBackward), 2),
            (std::vector<int64_t>{2}));
  EXPECT_EQ(stages_of(grid(4, 1, 1, Schedule::kOneForwardOneBackward), 2),
            (std::vector<int64_t>{2}));
  EXPECT_EQ(stage_hosts(grid(1, 2, 1), 0), (std::vector<int64_t>{0}));
  EXPECT_EQ(stages_of(grid(1, 2, 1), 0), (std::vector<int64_t>{0}));
}

TEST(LayoutTest, UnderDualPipeVEveryStageHasOneHostAndEveryHostTwoStages) {
  const ParallelismSpec p = grid(3, 1, 1, Schedule::kDualPipeV);
  EXPECT_EQ(stage_count(p), 6);
  EXPECT_EQ(stages_of(p, 1), (std::vector<int64_t>{1, 4}));
  EXPECT_EQ(stages_of(p, 2), (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(stage_hosts(p, 4), (std::vector<int64_t>{1}));
  EXPECT_EQ(stages_of(grid(1, 1, 1, Schedule::kDualPipeV), 0), (std::vector<int64_t>{0, 1}));
}

std::vector<ParallelismSpec> grids_of_every_schedule() {
  std::vector<ParallelismSpec> grids;
  for (const Schedule schedule : kSchedules) {
    for (const int64_t pipeline : {1, 2, 4, 6}) grids.push_back(grid(pipeline, 1, 1, schedule));
  }
  return grids;
}

TEST(LayoutTest, NeighboursHoldTheStagesBeforeAndAfter) {
  for (ParallelismSpec p : grids_of_every_schedule()) {
    for (int64_t rank = 0; rank < p.pipeline; ++rank) {
      for (int64_t d = 0; d < direction_count(p); ++d) {
        const int64_t stage = stages_of(p, rank)[d];
        const auto [previous, next] = pipeline_neighbours(p, rank, d);
        const auto holds = [&](int32_t neighbour, int64_t wanted) {
          if (wanted < 0 || wanted >= stage_count(p)) return neighbour == -1;
          const auto hosts = stage_hosts(p, wanted);
          return std::count(hosts.begin(), hosts.end(), neighbour) == 1;
        };
        EXPECT_TRUE(holds(previous, stage - 1)) << to_string(p.schedule) << " rank " << rank;
        EXPECT_TRUE(holds(next, stage + 1)) << to_string(p.schedule) << " rank " << rank;
      }
    }
  }
  const ParallelismSpec folded = grid(4, 1, 1, Schedule::kDualPipeV);
  EXPECT_EQ(pipeline_neighbours(folded, 3, 0), (Neighbours{2, 3}));  // handed over locally
  EXPECT_EQ(pipeline_neighbours(folded, 3, 1), (Neighbours{3, 2}));
}

TEST(LayoutTest, MicroBatchesAreSharedOutOverDualPipesDirectionsOnly) {
  ParallelismSpec p = grid(2, 1, 1);
  p.microbatches = 6;
  EXPECT_EQ(microbatches_per_direction(p), 3);
  EXPECT_EQ(microbatch_index(p, 1, 2), 5);
  p.schedule = Schedule::kDualPipeV;
  EXPECT_EQ(microbatches_per_direction(p), 6);
  EXPECT_EQ(microbatch_index(p, 0, 5), 5);
  EXPECT_EQ(microbatch_index(p, 1, 5), 5);
  p.schedule = Schedule::kZeroBubble;
  EXPECT_EQ(microbatches_per_direction(p), 6);
}

TEST(LayoutTest, HostsAndStagesAreInversesOfEachOther) {
  for (const ParallelismSpec& p : grids_of_every_schedule()) {
    for (int64_t stage = 0; stage < stage_count(p); ++stage) {
      for (int64_t host = 0; host < p.pipeline; ++host) {
        const auto hosts = stage_hosts(p, stage);
        const auto stages = stages_of(p, host);
        EXPECT_EQ(std::count(hosts.begin(), hosts.end(), host),
                  std::count(stages.begin(), stages.end(), stage));
      }
    }
  }
}

TEST(LayoutTest, DenseReplicasAreEveryRankOfTheStagesHosts) {
  EXPECT_EQ(numbers(dense_replicas(grid(2, 2, 1), 0)), (std::vector<int32_t>{0, 1, 2, 3}));
  EXPECT_EQ(numbers(dense_replicas(grid(4, 2, 1), 1)), (std::vector<int32_t>{2, 3, 4, 5}));
}

TEST(LayoutTest, ExpertReplicasShareTheExpertIndex) {
  EXPECT_EQ(numbers(expert_replicas(grid(4, 2, 1), 0, 1)), (std::vector<int32_t>{1, 7}));
  EXPECT_EQ(numbers(expert_replicas(grid(2, 2, 2), 1, 0)), (std::vector<int32_t>{0, 2, 4, 6}));
}

TEST(LayoutTest, StagesTileTheLayersAndEarlierOnesTakeTheRest) {
  EXPECT_EQ(stage_layers(5, 2, 0), (Range{0, 3}));
  EXPECT_EQ(stage_layers(5, 2, 1), (Range{3, 5}));
  for (int64_t layers = 1; layers <= 12; ++layers) {
    for (int64_t stages = 1; stages <= layers; ++stages) {
      int64_t next = 0;
      for (int64_t stage = 0; stage < stages; ++stage) {
        const Range range = stage_layers(layers, stages, stage);
        EXPECT_EQ(range.begin, next);
        EXPECT_GE(range.size(), layers / stages);
        EXPECT_LE(range.size(), layers / stages + 1);
        next = range.end;
      }
      EXPECT_EQ(next, layers);
    }
  }
}

TEST(LayoutTest, ExpertRanksTileTheExperts) {
  EXPECT_EQ(local_experts(8, 4, 0), (Range{0, 2}));
  EXPECT_EQ(local_experts(8, 4, 3), (Range{6, 8}));
  EXPECT_DEATH(local_experts(8, 3, 0), "n_routed_experts");
}

}  // namespace
}  // namespace penstock
