// The real agents against the real core under seeded faults. A failing seed is printed; run it
// alone with PENSTOCK_SIM_SEED=<seed>, or other numbers of seeds with PENSTOCK_SIM_SEEDS=<count>.
#include <gtest/gtest.h>

#include <cstdlib>

#include "comm/base/log.h"
#include "tests/simulation/agent_cluster.h"

namespace penstock {
namespace {

#if defined(NDEBUG) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
constexpr uint64_t kSeedsPerTest = 300;
#else
constexpr uint64_t kSeedsPerTest = 40;
#endif

uint64_t from_environment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

int64_t run_seeds(uint64_t first_seed, AgentClusterOptions options) {
  ::setenv("PENSTOCK_LOG", "off", 1);
  start_logging("simulation");
  const uint64_t only = from_environment("PENSTOCK_SIM_SEED", 0);
  const uint64_t count = from_environment("PENSTOCK_SIM_SEEDS", kSeedsPerTest);
  int64_t restarts = 0;
  for (uint64_t seed = first_seed; seed < first_seed + count; ++seed) {
    if (only != 0 && only != seed) continue;
    options.seed = seed;
    AgentCluster cluster(options);
    const std::string violation = cluster.run();
    EXPECT_EQ(violation, "") << "seed " << seed;
    if (!violation.empty()) break;
    restarts += cluster.restarts();
  }
  return restarts;
}

TEST(AgentSimTest, EveryJobSucceedsThroughKillsCutsAndCrashesAndNoTwoEpochsRun) {
  EXPECT_GT(run_seeds(1, {}), 0) << "the faults must have hit something";
}

TEST(AgentSimTest, ShortCutsAndCoordinatorCrashesAloneRestartNothing) {
  AgentClusterOptions options;
  options.rank_kills = 0;
  options.daemon_kills = 0;
  options.cuts = 0.005;
  options.longest_cut = std::chrono::milliseconds(500);
  EXPECT_EQ(run_seeds(1'000'001, options), 0);
}

TEST(AgentSimTest, LongCutsOfBusyWorkersEndWell) {
  AgentClusterOptions options;
  options.cuts = 0.02;
  options.longest_cut = std::chrono::seconds(30);
  options.worker_count = 2;
  EXPECT_GT(run_seeds(2'000'001, options), 0);
}

}  // namespace
}  // namespace penstock
