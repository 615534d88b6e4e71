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

TEST(LrScheduleTest, ARunThatEndsInItsWarmUpNeverDecays) {
  EXPECT_DOUBLE_EQ(learning_rate_at(spec(), 5, 5), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate_at(spec(), 10, 10), 2.0);
}

}  // namespace
}  // namespace penstock
