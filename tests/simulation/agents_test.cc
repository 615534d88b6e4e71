// The real agents against the real core under seeded faults. A failing seed is printed; run it
// alone with PENSTOCK_SIM_SEED=<seed>, or other numbers of seeds with PENSTOCK_SIM_SEEDS=<count>.
#include <gtest/gtest.h>

#include "tests/simulation/agent_cluster.h"

namespace penstock {
namespace {

struct Counts {
  int64_t restarts = 0;
  int64_t rebalances = 0;
  int64_t memory_starts = 0;
  int64_t suspensions = 0;
};

Counts simulate(uint64_t first_seed, AgentClusterOptions options) {
  Counts counts;
  run_seeds(first_seed, 300, [&](uint64_t seed) {
    options.seed = seed;
    AgentCluster cluster(options);
    std::string violation = cluster.run();
    if (violation.empty()) {
      counts.restarts += cluster.restarts();
      counts.rebalances += cluster.rebalances();
      counts.memory_starts += cluster.memory_starts();
      counts.suspensions += cluster.suspensions();
    }
    return violation;
  });
  return counts;
}

TEST(AgentSimTest, EveryJobSucceedsThroughKillsCutsAndCrashesAndNoTwoEpochsRun) {
  const Counts counts = simulate(1, {});
  EXPECT_GT(counts.restarts, 0) << "the faults must have hit something";
  EXPECT_GT(counts.memory_starts, 0);
}

TEST(AgentSimTest, StoppedRanksAreFoundThroughEveryFaultAndNoHealthyOneIsNamed) {
  AgentClusterOptions options;
  options.rank_stops = 0.004;
  options.hang_timeout = 5;
  EXPECT_GT(simulate(5'000'001, options).restarts, 0);
}

TEST(AgentSimTest, ShortCutsAndCoordinatorCrashesAloneRestartNothing) {
  AgentClusterOptions options;
  options.rank_kills = 0;
  options.daemon_kills = 0;
  options.cuts = 0.005;
  options.longest_cut = std::chrono::milliseconds(500);
  EXPECT_EQ(simulate(1'000'001, options).restarts, 0);
}

TEST(AgentSimTest, LongCutsOfBusyWorkersEndWell) {
  AgentClusterOptions options;
  options.cuts = 0.02;
  options.longest_cut = std::chrono::seconds(30);
  options.worker_count = 2;
  EXPECT_GT(simulate(2'000'001, options).restarts, 0);
}

TEST(AgentSimTest, OfGangsThatAreCutOffWholeNoTwoEpochsMakeProgress) {
  AgentClusterOptions options;
  options.cuts = 0.01;
  options.longest_cut = std::chrono::seconds(40);
  options.daemon_kills = 0;
  options.worker_count = 3;
  options.devices_per_worker = 4;  // a gang has one to itself
  EXPECT_GT(simulate(6'000'001, options).restarts, 0);
}

TEST(AgentSimTest, CutsShorterThanTheLeaseRestartNothing) {
  AgentClusterOptions options;
  options.rank_kills = 0;
  options.daemon_kills = 0;
  options.coordinator_crashes = 0;
  options.cuts = 0.003;  // several in a row may add up to a lease
  options.longest_cut = std::chrono::seconds(4);
  EXPECT_EQ(simulate(7'000'001, options).restarts, 0);
}

TEST(AgentSimTest, ExpertsMoveThroughEveryFaultAndEveryJobSucceeds) {
  AgentClusterOptions options;
  options.rebalance_threshold = 1.1;
  const Counts counts = simulate(3'000'001, options);
  EXPECT_GT(counts.rebalances, 0);
  EXPECT_GT(counts.restarts, 0);
}

TEST(AgentSimTest, SuspendedJobsAreResumedThroughEveryFault) {
  AgentClusterOptions options;
  options.suspensions = 0.005;
  const Counts counts = simulate(6'000'001, options);
  EXPECT_GT(counts.suspensions, 0);
  EXPECT_GT(counts.restarts, 0);
}

TEST(AgentSimTest, SuspensionsAreNoFailures) {
  AgentClusterOptions options;
  options.suspensions = 0.01;
  options.rank_kills = 0;
  options.daemon_kills = 0;
  options.cuts = 0;
  options.coordinator_crashes = 0;
  const Counts counts = simulate(7'000'001, options);
  EXPECT_GT(counts.suspensions, 0);
  EXPECT_EQ(counts.restarts, 0);
}

TEST(AgentSimTest, MovingExpertsIsNoFailure) {
  AgentClusterOptions options;
  options.rebalance_threshold = 1.1;
  options.rank_kills = 0;
  options.daemon_kills = 0;
  options.cuts = 0;
  options.coordinator_crashes = 0;
  const Counts counts = simulate(4'000'001, options);
  EXPECT_GT(counts.rebalances, 0);
  EXPECT_EQ(counts.restarts, 0);
}

}  // namespace
}  // namespace penstock
