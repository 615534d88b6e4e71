// Which ranks are slow, and that noise is none.
#include "coordinator/core/slow_ranks.h"

#include <gtest/gtest.h>

#include <functional>

#include "comm/base/random.h"

namespace penstock {
namespace {

constexpr double kStep = 0.1;

ParallelismSpec grid_of(int64_t pipeline, int64_t data, int64_t expert, Schedule schedule) {
  ParallelismSpec grid;
  grid.pipeline = pipeline;
  grid.data = data;
  grid.expert = expert;
  grid.schedule = schedule;
  return grid;
}
ParallelismSpec replicas(int64_t count) {
  return grid_of(1, count, 1, Schedule::kOneForwardOneBackward);
}

// Every rank computes `busy(window, rank)` seconds of a step, and waits for the slowest.
std::deque<PaceWindow> windows_of(const ParallelismSpec& grid, size_t count,
                                  const std::function<double(size_t, int64_t)>& busy) {
  std::deque<PaceWindow> windows;
  for (size_t i = 0; i < count; ++i) {
    PaceWindow window{static_cast<int64_t>(10 * i + 1), static_cast<int64_t>(10 * i + 10), {}};
    double most = 0.0;
    for (int64_t rank = 0; rank < grid.world_size(); ++rank) {
      window.ranks.push_back({busy(i, rank), 0.0});
      most = std::max(most, window.ranks.back().busy_seconds);
    }
    for (RankRate& rate : window.ranks) rate.wait_seconds = most + 0.01 - rate.busy_seconds;
    windows.push_back(std::move(window));
  }
  return windows;
}

std::vector<int> slow_in(const std::vector<RankPaceVerdict>& verdicts) {
  std::vector<int> slow;
  for (size_t rank = 0; rank < verdicts.size(); ++rank) {
    if (verdicts[rank].slow) slow.push_back(static_cast<int>(rank));
  }
  return slow;
}

TEST(SlowRanksTest, TheOneThatComputesLongerThanItsReplicasIsNamedWithHowMuch) {
  for (const int64_t count : {2, 3, 8, 64}) {
    const ParallelismSpec grid = replicas(count);
    const auto verdicts = judge_pace(
        grid,
        windows_of(grid, 5, [](size_t, int64_t rank) { return rank == 1 ? 4 * kStep : kStep; }),
        {});
    ASSERT_EQ(slow_in(verdicts), std::vector<int>{1}) << count;
    EXPECT_NEAR(verdicts[1].ratio, 4.0, 1e-9);
    EXPECT_EQ(verdicts[1].peers, count - 1);
    EXPECT_EQ(verdicts[1].since_step, 21) << "of the oldest window that is judged";
    EXPECT_TRUE(verdicts[0].usual);
  }
}

TEST(SlowRanksTest, WhatDoesNotLastIsNotSlow) {
  const ParallelismSpec grid = replicas(4);
  for (size_t good = 0; good < kSlowWindows; ++good) {
    const auto verdicts = judge_pace(grid,
                                     windows_of(grid, kSlowWindows,
                                                [&](size_t i, int64_t rank) {
                                                  return rank == 2 && i != good ? 4 * kStep : kStep;
                                                }),
                                     {});
    EXPECT_TRUE(slow_in(verdicts).empty());
    EXPECT_FALSE(verdicts[2].usual);
  }
  EXPECT_TRUE(
      judge_pace(grid, windows_of(grid, 2, [](size_t, int64_t) { return kStep; }), {}).empty());
}

TEST(SlowRanksTest, StagesOfAPipelineAreNotComparedWithEachOther) {
  for (const Schedule schedule : {Schedule::kOneForwardOneBackward, Schedule::kDualPipeV}) {
    const ParallelismSpec grid = grid_of(4, 2, 1, schedule);
    // The last stage has the output layer.
    const auto busy = [&](size_t, int64_t rank) { return rank >= 6 ? 3 * kStep : kStep; };
    EXPECT_TRUE(slow_in(judge_pace(grid, windows_of(grid, 6, busy), {})).empty());
  }
}

TEST(SlowRanksTest, TheTwinInABidirectionalPipelineDoesTheSame) {
  const ParallelismSpec grid = grid_of(4, 1, 1, Schedule::kDualPipe);
  // Ranks 0 and 3 have first and last stage, 1 and 2 the two between.
  const auto busy = [&](size_t, int64_t rank) {
    const double usual = rank == 0 || rank == 3 ? 3 * kStep : kStep;
    return rank == 1 ? 2 * usual : usual;
  };
  const auto verdicts = judge_pace(grid, windows_of(grid, 3, busy), {});
  // It is not the one that the whole pipeline waits for as long as the other stages take longer.
  EXPECT_EQ(verdicts[1].peers, 1);
  EXPECT_NEAR(verdicts[1].ratio, 2.0, 1e-9);
  EXPECT_NEAR(verdicts[0].ratio, 1.0, 1e-9);
}

TEST(SlowRanksTest, RanksOfAnExpertGroupMayDifferByTheirLoad) {
  const ParallelismSpec grid = grid_of(1, 1, 4, Schedule::kOneForwardOneBackward);
  const auto busy = [&](size_t, int64_t rank) { return rank == 3 ? 2 * kStep : kStep; };
  const auto windows = windows_of(grid, 3, busy);
  EXPECT_EQ(slow_in(judge_pace(grid, windows, {})), std::vector<int>{3});
  EXPECT_TRUE(slow_in(judge_pace(grid, windows, {.imbalance = 1.8})).empty());
  // With data replicas those that have the same experts are compared.
  const ParallelismSpec wide = grid_of(1, 3, 4, Schedule::kOneForwardOneBackward);
  const auto hot = [&](size_t, int64_t rank) { return rank % 4 == 3 ? 2 * kStep : kStep; };
  EXPECT_TRUE(slow_in(judge_pace(wide, windows_of(wide, 3, hot), {})).empty());
}

TEST(SlowRanksTest, ARankThatNoneIsLikeIsComparedWithItsPast) {
  const ParallelismSpec grid = grid_of(4, 1, 1, Schedule::kOneForwardOneBackward);
  const auto later = [&](double factor_of_1, double factor_of_others) {
    return windows_of(grid, 8, [=](size_t i, int64_t rank) {
      const double usual = static_cast<double>(rank + 1) * kStep;
      if (i < 5) return usual;
      return usual * (rank == 1 ? factor_of_1 : factor_of_others);
    });
  };
  const auto verdicts = judge_pace(grid, later(5.0, 1.0), {});
  EXPECT_EQ(slow_in(verdicts), std::vector<int>{1});
  EXPECT_EQ(verdicts[1].peers, 0);
  EXPECT_NEAR(verdicts[1].ratio, 5.0, 1e-9);
  EXPECT_TRUE(slow_in(judge_pace(grid, later(5.0, 5.0), {})).empty()) << "all have more to do";
}

TEST(SlowRanksTest, NoiseIsNoAlarm) {
  Random random(7, 0);
  const ParallelismSpec grids[] = {replicas(2), replicas(4), replicas(40),
                                   grid_of(2, 1, 2, Schedule::kDualPipe),
                                   grid_of(4, 1, 1, Schedule::kOneForwardOneBackward)};
  for (int i = 0; i < 2000; ++i) {
    const ParallelismSpec& grid = grids[i % std::ssize(grids)];
    const double noise = 0.6 * random.uniform();
    const auto windows = windows_of(
        grid, 8, [&](size_t, int64_t) { return kStep * (1.0 + noise * (random.uniform() - 0.5)); });
    EXPECT_TRUE(slow_in(judge_pace(grid, windows, {})).empty()) << "noise " << noise;
  }
}

// Two replicas of many that swing widely: the spread of the others says that it is nothing.
TEST(SlowRanksTest, WhatTheOthersSpreadByAsWellIsNotSlow) {
  const ParallelismSpec grid = replicas(6);
  const auto windows = windows_of(grid, 3, [](size_t, int64_t rank) {
    const double of[] = {1.7, 0.4, 1.0, 1.6, 0.5, 1.0};
    return kStep * of[rank];
  });
  EXPECT_TRUE(slow_in(judge_pace(grid, windows, {})).empty());
}

TEST(SlowRanksTest, ARankThatWaitsForOthersIsNotTheOneTheyWaitFor) {
  const ParallelismSpec grid = replicas(4);
  auto windows =
      windows_of(grid, 3, [](size_t, int64_t rank) { return rank == 2 ? 2 * kStep : kStep; });
  ASSERT_EQ(slow_in(judge_pace(grid, windows, {})), std::vector<int>{2});
  for (PaceWindow& window : windows) window.ranks[2].wait_seconds = 20 * kStep;
  EXPECT_TRUE(slow_in(judge_pace(grid, windows, {})).empty());
}

TEST(SlowRanksTest, RanksThatComputeNothingHaveNoRatio) {
  const ParallelismSpec grid = replicas(3);
  const auto windows =
      windows_of(grid, 3, [](size_t, int64_t rank) { return rank == 0 ? kStep : 0.0; });
  EXPECT_TRUE(slow_in(judge_pace(grid, windows, {})).empty());
}

}  // namespace
}  // namespace penstock
