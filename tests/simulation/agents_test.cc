// The real agents against the real core under seeded faults. A failing seed is printed; run it
// alone with PENSTOCK_SIM_SEED=<seed>, or other numbers of seeds with PENSTOCK_SIM_SEEDS=<count>.
#include <gtest/gtest.h>

#include "tests/simulation/agent_cluster.h"

namespace penstock {
namespace {

// How often jobs were restarted.
int64_t simulate(uint64_t first_seed, AgentClusterOptions options) {
  int64_t restarts = 0;
  run_seeds(first_seed, 300, [&](uint64_t seed) {
    options.seed = seed;
    AgentCluster cluster(options);
    std::string violation = cluster.run();
    if (violation.empty()) restarts += cluster.restarts();
    return violation;
  });
  return restarts;
}

TEST(AgentSimTest, EveryJobSucceedsThroughKillsCutsAndCrashesAndNoTwoEpochsRun) {
  EXPECT_GT(simulate(1, {}), 0) << "the faults must have hit something";
}

TEST(AgentSimTest, ShortCutsAndCoordinatorCrashesAloneRestartNothing) {
  AgentClusterOptions options;
  options.rank_kills = 0;
  options.daemon_kills = 0;
  options.cuts = 0.005;
  options.longest_cut = std::chrono::milliseconds(500);
  EXPECT_EQ(simulate(1'000'001, options), 0);
}

TEST(AgentSimTest, LongCutsOfBusyWorkersEndWell) {
  AgentClusterOptions options;
  options.cuts = 0.02;
  options.longest_cut = std::chrono::seconds(30);
  options.worker_count = 2;
  EXPECT_GT(simulate(2'000'001, options), 0);
}

}  // namespace
}  // namespace penstock
