// Some thousand seeds of every scenario. A seed that violates something prints how to run it again
// and what led to it. PENSTOCK_SIM_SEEDS=<count> runs another number of seeds of each scenario, and
// `simulate` (simulate.cc) as many as one likes on all cores.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

#include "comm/base/log.h"
#include "tests/simulation/scenarios.h"

namespace penstock {
namespace {

#if defined(NDEBUG) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
constexpr double kSeeds = 350;
#else
constexpr double kSeeds = 50;  // ten times slower
#endif
constexpr size_t kLines = 60;

uint64_t seeds_of(const Scenario& scenario) {
  const char* text = std::getenv("PENSTOCK_SIM_SEEDS");
  const double all = text == nullptr ? kSeeds : std::strtod(text, nullptr);
  return std::max<uint64_t>(1, static_cast<uint64_t>(all * scenario.share));
}

class SimulationTest : public testing::TestWithParam<Scenario> {};

TEST_P(SimulationTest, NoSeedViolatesAnything) {
  ::setenv("PENSTOCK_LOG", "off", 1);
  start_logging("simulation");
  SimCounts counts;
  for (uint64_t seed = 1; seed <= seeds_of(GetParam()); ++seed) {
    const SeedOutcome outcome = run_seed(GetParam(), seed);
    counts += outcome.counts;
    if (!outcome.violation.empty()) FAIL() << report_of(GetParam(), seed, kLines);
  }
  EXPECT_GT(counts.core_events, 0);
}

INSTANTIATE_TEST_SUITE_P(Scenarios, SimulationTest, testing::ValuesIn(scenarios()),
                         [](const testing::TestParamInfo<Scenario>& scenario) {
                           std::string name(scenario.param.name);
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(SimulationTest, ASeedIsTheSameEveryTime) {
  ::setenv("PENSTOCK_LOG", "off", 1);
  start_logging("simulation");
  for (const char* name : {"hangs", "messages"}) {
    const Scenario& scenario = *find_scenario(name);
    const std::string first = report_of(scenario, 7, 1'000'000);
    EXPECT_EQ(report_of(scenario, 7, 1'000'000), first);
    EXPECT_NE(first.find("nothing is violated"), std::string::npos) << first;
  }
}

// Of every kind, so that nobody takes a fault that never happens for one that is survived.
TEST(SimulationTest, EveryKindOfFaultHappens) {
  ::setenv("PENSTOCK_LOG", "off", 1);
  start_logging("simulation");
  SimCounts counts;
  for (const Scenario& scenario : scenarios()) {
    if (scenario.share < 1.0) continue;
    for (uint64_t seed = 1; seed <= 40; ++seed) counts += run_seed(scenario, seed).counts;
  }
  for (size_t i = 0; i < kFaultNames.size(); ++i) EXPECT_GT(counts.faults[i], 0) << kFaultNames[i];
  EXPECT_GT(counts.restarts, 0);
  EXPECT_GT(counts.memory_starts, 0);
  EXPECT_GT(counts.mirrored, 0);
  EXPECT_GT(counts.fetched, 0);
  EXPECT_GT(counts.rebalances, 0);
  EXPECT_GT(counts.suspensions, 0);
  EXPECT_GT(counts.quarantines, 0);
}

}  // namespace
}  // namespace penstock
