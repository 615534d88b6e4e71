#include "worker/optim/lr_schedule.h"

#include <gtest/gtest.h>

namespace penstock {
namespace {

OptimizerSpec spec() {
  OptimizerSpec optimizer;
  optimizer.lr = 2.0;
  optimizer.warmup_steps = 10;
  optimizer.min_lr_ratio = 0.1;
  return optimizer;
}

TEST(LrScheduleTest, RisesInAStraightLineToTheFullRateAtTheEndOfWarmUp) {
  EXPECT_DOUBLE_EQ(learning_rate_at(spec(), 110, 0), 0.0);
  EXPECT_DOUBLE_EQ(learning_rate_at(spec(), 110, 1), 0.2);
  EXPECT_DOUBLE_EQ(learning_rate_at(spec(), 110, 5), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate_at(spec(), 110, 10), 2.0);
}

TEST(LrScheduleTest, FallsAlongHalfACosineToTheFloorAtTheLastStep) {
  EXPECT_DOUBLE_EQ(learning_rate_at(spec(), 110, 60), 1.1);  // half way: the mean of 2.0 and 0.2
  EXPECT_NEAR(learning_rate_at(spec(), 110, 35), 0.2 + 1.8 * 0.8535533905932737, 1e-12);
  EXPECT_DOUBLE_EQ(learning_rate_at(spec(), 110, 110), 0.2);
}

TEST(LrScheduleTest, StaysAtTheFloorPastTheLastStep) {
  EXPECT_DOUBLE_EQ(learning_rate_at(spec(), 110, 500), 0.2);
}

TEST(LrScheduleTest, WithoutWarmUpStartsBelowTheFullRateAtOnce) {
  OptimizerSpec optimizer = spec();
  optimizer.warmup_steps = 0;
  EXPECT_DOUBLE_EQ(learning_rate_at(optimizer, 100, 0), 2.0);
  EXPECT_LT(learning_rate_at(optimizer, 100, 1), 2.0);
  EXPECT_DOUBLE_EQ(learning_rate_at(optimizer, 100, 100), 0.2);
}

// The report's five parts (DeepSeek-V3 report §4.2), a step standing for 10B tokens after the
// warm-up.
TEST(LrScheduleTest, RunsThroughTheFivePartsOfDeepSeekV3) {
  OptimizerSpec v3;
  v3.lr = 2.2e-4;
  v3.warmup_steps = 20;
  v3.hold_steps = 980;
  v3.decay_steps = 430;
  v3.min_lr_ratio = 0.1;
  v3.lr_levels = {{1464, 7.3e-6 / 2.2e-4}};
  const auto rate = [&](int64_t step) { return learning_rate_at(v3, 1480, step); };
  EXPECT_DOUBLE_EQ(rate(10), 1.1e-4);
  EXPECT_DOUBLE_EQ(rate(20), 2.2e-4);
  EXPECT_DOUBLE_EQ(rate(1000), 2.2e-4);
  EXPECT_LT(rate(1001), 2.2e-4);
  EXPECT_DOUBLE_EQ(rate(1215), 1.21e-4);  // half way down
  EXPECT_DOUBLE_EQ(rate(1430), 2.2e-5);
  EXPECT_DOUBLE_EQ(rate(1463), 2.2e-5);
  EXPECT_DOUBLE_EQ(rate(1464), 7.3e-6);
  EXPECT_DOUBLE_EQ(rate(1480), 7.3e-6);
}

TEST(LrScheduleTest, WithoutItsOwnLengthTheCosineEndsWhereTheLevelsBegin) {
  OptimizerSpec optimizer = spec();
  optimizer.hold_steps = 10;
  optimizer.lr_levels = {{61, 0.05}, {71, 0.0}};
  EXPECT_DOUBLE_EQ(learning_rate_at(optimizer, 110, 20), 2.0);
  EXPECT_DOUBLE_EQ(learning_rate_at(optimizer, 110, 40), 1.1);
  EXPECT_DOUBLE_EQ(learning_rate_at(optimizer, 110, 60), 0.2);
  EXPECT_DOUBLE_EQ(learning_rate_at(optimizer, 110, 61), 0.1);
  EXPECT_DOUBLE_EQ(learning_rate_at(optimizer, 110, 110), 0.0);
}

TEST(LrScheduleTest, ARunThatEndsInItsWarmUpNeverDecays) {
  EXPECT_DOUBLE_EQ(learning_rate_at(spec(), 5, 5), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate_at(spec(), 10, 10), 2.0);
}

}  // namespace
}  // namespace penstock
