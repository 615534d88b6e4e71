// Thousands of failure schedules against the real core. A failing seed is printed; run it alone
// with PENSTOCK_SIM_SEED=<seed>, or other numbers of seeds with PENSTOCK_SIM_SEEDS=<count>.
#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/coordinator/sim_cluster.h"

namespace penstock {
namespace {

// Optimised builds replay 4000 schedules in well under a minute; others are ten times slower.
#if defined(NDEBUG) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
constexpr uint64_t kSeedsPerTest = 1000;
#else
constexpr uint64_t kSeedsPerTest = 150;
#endif

uint64_t from_environment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

struct Totals {
  int64_t steps = 0;
  int64_t recoveries = 0;
};

Totals run_seeds(uint64_t first_seed, SimOptions options) {
  const uint64_t count = from_environment("PENSTOCK_SIM_SEEDS", kSeedsPerTest);
  const uint64_t only = from_environment("PENSTOCK_SIM_SEED", 0);
  Totals totals;
  for (uint64_t seed = first_seed; seed < first_seed + count; ++seed) {
    if (only != 0 && seed != only) continue;
    options.seed = seed;
    SimCluster cluster(options);
    const std::string violation = cluster.run();
    EXPECT_EQ(violation, "") << "seed " << seed;
    if (!violation.empty()) break;
    totals.steps += cluster.core_steps();
    totals.recoveries += cluster.recoveries();
  }
  return totals;
}

TEST(CoreSimTest, WithoutPartitionsNoTwoEpochsOfAJobEverRun) {
  SimOptions options;
  options.partitions = false;
  const Totals totals = run_seeds(1, options);
  EXPECT_GT(totals.recoveries, 0) << "the faults must have hit something";
}

TEST(CoreSimTest, WithPartitionsEveryJobStillEndsAndNothingOldIsAccepted) {
  EXPECT_GT(run_seeds(1'000'001, {}).recoveries, 0);
}

TEST(CoreSimTest, WithHalfTheMessagesLostNothingIsViolated) {
  SimOptions options;
  options.loss = 0.5;
  options.repetition = 0.2;
  EXPECT_GT(run_seeds(2'000'001, options).steps, 0);
}

TEST(CoreSimTest, OneWorkerBarelyLargeEnoughServesTheQueue) {
  SimOptions options;
  options.worker_count = 1;
  options.devices_per_worker = 4;
  options.job_count = 3;
  EXPECT_GT(run_seeds(3'000'001, options).recoveries, 0);
}

}  // namespace
}  // namespace penstock
