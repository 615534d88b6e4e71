// Thousands of failure schedules against the real core. A failing seed is printed; run it alone
// with PENSTOCK_SIM_SEED=<seed>, or other numbers of seeds with PENSTOCK_SIM_SEEDS=<count>.
#include <gtest/gtest.h>

#include "tests/coordinator/sim_cluster.h"

namespace penstock {
namespace {

struct Totals {
  int64_t steps = 0;
  int64_t recoveries = 0;
};

Totals simulate(uint64_t first_seed, SimOptions options) {
  Totals totals;
  run_seeds(first_seed, 1000, [&](uint64_t seed) {
    options.seed = seed;
    SimCluster cluster(options);
    std::string violation = cluster.run();
    if (violation.empty()) {
      totals.steps += cluster.core_steps();
      totals.recoveries += cluster.restarts();
    }
    return violation;
  });
  return totals;
}

TEST(CoreSimTest, WithoutPartitionsNoTwoEpochsOfAJobEverRun) {
  SimOptions options;
  options.partitions = false;
  const Totals totals = simulate(1, options);
  EXPECT_GT(totals.recoveries, 0) << "the faults must have hit something";
}

TEST(CoreSimTest, WithPartitionsEveryJobStillEndsAndNothingOldIsAccepted) {
  EXPECT_GT(simulate(1'000'001, {}).recoveries, 0);
}

TEST(CoreSimTest, WithHalfTheMessagesLostNothingIsViolated) {
  SimOptions options;
  options.loss = 0.5;
  options.repetition = 0.2;
  EXPECT_GT(simulate(2'000'001, options).steps, 0);
}

TEST(CoreSimTest, WhatRollbacksLeaveOutStaysOutWhateverFails) {
  SimOptions options;
  options.spikes = {3, 7, 10};
  EXPECT_GT(simulate(4'000'001, options).recoveries, 0);
}

TEST(CoreSimTest, SuspendedJobsLoseNoStepAndEndWhenResumed) {
  SimOptions options;
  options.suspensions = 0.02;
  EXPECT_GT(simulate(5'000'001, options).recoveries, 0);
}

TEST(CoreSimTest, DrainedWorkersGetNothingAndEveryJobEnds) {
  SimOptions options;
  options.drains = 0.01;
  options.suspensions = 0.005;
  EXPECT_GT(simulate(6'000'001, options).recoveries, 0);
}

TEST(CoreSimTest, JobsOfChangingWidthEnd) {
  SimOptions options;
  options.worker_count = 5;
  options.scalings = 0.01;
  options.suspensions = 0.005;
  options.drains = 0.003;
  EXPECT_GT(simulate(7'000'001, options).recoveries, 0);
}

TEST(CoreSimTest, OneWorkerBarelyLargeEnoughServesTheQueue) {
  SimOptions options;
  options.worker_count = 1;
  options.devices_per_worker = 4;
  options.job_count = 3;
  EXPECT_GT(simulate(3'000'001, options).recoveries, 0);
}

}  // namespace
}  // namespace penstock
