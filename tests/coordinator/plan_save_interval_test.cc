#include "coordinator/plan/save_interval.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace penstock {
namespace {

constexpr double kHour = 3600.0;

Instant at(double seconds) {
  return {static_cast<int64_t>(seconds * 1e9)};
}

// Steps of 2 s, saves that cost 9 s and take 60 s, a failure a day; 100 hours without one.
SaveMeasurements measured() {
  return {.step_seconds = 2.0,
          .stall_seconds = 4.0,
          .slowdown_seconds = 5.0,
          .save_seconds = 60.0,
          .save_count = 3,
          .training_seconds = 0.0,
          .failure_count = 0};
}
SaveLimits limits() {
  return {.max_overhead = 0.1, .mtbf_prior_seconds = 24 * kHour, .steps_max = 1'000'000};
}

TEST(SaveIntervalTest, TheIntervalIsYoungsOptimum) {
  const SaveChoice choice = choose_save_interval(measured(), limits());
  const double optimum = std::sqrt(2.0 * 9.0 * 24 * kHour);
  EXPECT_EQ(choice.steps, static_cast<int64_t>(std::ceil(optimum / 2.0)));
  EXPECT_EQ(choice.mtbf_seconds, 24 * kHour);
  EXPECT_NEAR(choice.overhead, 9.0 / optimum, 1e-4);
  for (const char* input : {"624 steps", "9 s", "stall 4 s", "slower steps 5 s", "takes 60 s",
                            "a step takes 2 s", "24 h", "0 failures"}) {
    EXPECT_NE(choice.reason.find(input), std::string::npos) << input << " in " << choice.reason;
  }
}

TEST(SaveIntervalTest, OfAllIntervalsTheOptimumLosesTheLeastTime) {
  SaveMeasurements m = measured();
  m.save_seconds = 0.0;
  const SaveChoice choice = choose_save_interval(m, limits());
  // Lost per second: a save per interval, and half an interval per failure.
  const auto lost = [&](double seconds) { return 9.0 / seconds + seconds / (2 * 24 * kHour); };
  const double chosen = lost(2.0 * static_cast<double>(choice.steps));
  for (const double factor : {0.5, 0.8, 1.25, 2.0}) {
    EXPECT_GT(lost(2.0 * factor * static_cast<double>(choice.steps)), chosen) << factor;
  }
}

TEST(SaveIntervalTest, FailuresOfTheJobTakeThePlaceOfWhatWasExpected) {
  SaveMeasurements m = measured();
  m.training_seconds = 26 * kHour;
  EXPECT_EQ(choose_save_interval(m, limits()).mtbf_seconds, 50 * kHour) << "no failure yet";
  m.failure_count = 9;
  const SaveChoice often = choose_save_interval(m, limits());
  EXPECT_EQ(often.mtbf_seconds, 5 * kHour);
  EXPECT_LT(often.steps, choose_save_interval(measured(), limits()).steps);
  m.training_seconds = 1e9;
  m.failure_count = 1000;
  EXPECT_NEAR(choose_save_interval(m, limits()).mtbf_seconds, 1e6, 1e4);
}

TEST(SaveIntervalTest, SavingNeverCostsMoreThanTheLimit) {
  SaveMeasurements m = measured();
  m.failure_count = 100'000;  // saving all the time would lose the least
  for (const double overhead : {0.001, 0.01, 0.2, 1.0}) {
    SaveLimits l = limits();
    l.max_overhead = overhead;
    const SaveChoice choice = choose_save_interval(m, l);
    EXPECT_LE(choice.overhead, overhead);
    EXPECT_LE(9.0 / (static_cast<double>(choice.steps) * m.step_seconds), overhead);
  }
  SaveLimits tight = limits();
  tight.max_overhead = 0.001;
  EXPECT_NE(choose_save_interval(m, tight).reason.find("max_overhead 0.1%"), std::string::npos);
}

TEST(SaveIntervalTest, ASaveLongerThanTheOptimumGetsAPauseBehindIt) {
  SaveMeasurements m = measured();
  m.save_seconds = 5000.0;
  EXPECT_EQ(choose_save_interval(m, limits()).steps, 5000);
}

TEST(SaveIntervalTest, StepsOfMillisecondsAndOfHoursAreFine) {
  SaveMeasurements m = measured();
  m.step_seconds = 0.002;
  EXPECT_EQ(choose_save_interval(m, limits()).steps, 623'539);
  m.step_seconds = 3 * kHour;
  EXPECT_EQ(choose_save_interval(m, limits()).steps, 1);
}

TEST(SaveIntervalTest, TheIntervalIsNeverLongerThanTheJob) {
  SaveLimits l = limits();
  l.steps_max = 100;
  EXPECT_EQ(choose_save_interval(measured(), l).steps, 100);
  l.steps_max = 4;
  EXPECT_EQ(choose_save_interval({}, l).steps, 4);
}

TEST(SaveIntervalTest, BeforeASaveWasMeasuredItComesEarly) {
  SaveMeasurements m = measured();
  m.save_count = 0;
  EXPECT_EQ(choose_save_interval(m, limits()).steps, kFirstSaveSteps);
  m = measured();
  m.step_seconds = 0.0;
  EXPECT_EQ(choose_save_interval(m, limits()).steps, kFirstSaveSteps);
}

TEST(SaveIntervalTest, ASaveThatCostsNothingIsMadeAfterAsManySecondsAsItNeeds) {
  SaveMeasurements m = measured();
  m.stall_seconds = m.slowdown_seconds = 0.0;
  EXPECT_EQ(choose_save_interval(m, limits()).steps, 60);
  m.save_seconds = 0.0;
  EXPECT_EQ(choose_save_interval(m, limits()).steps, 1);
}

TEST(SaveIntervalTest, ACostBeyondTheTimeBetweenFailuresGivesThatTime) {
  SaveMeasurements m = measured();
  m.stall_seconds = 1e7;
  m.save_seconds = 0.0;
  SaveLimits l = limits();
  l.max_overhead = 1e9;  // so that only the optimum counts
  EXPECT_EQ(choose_save_interval(m, l).steps, static_cast<int64_t>(24 * kHour / 2.0));
}

TEST(SaveIntervalTest, ValuesOfAnySizeGiveAnIntervalWithinTheJob) {
  const double extremes[] = {0.0, std::numeric_limits<double>::denorm_min(), 1e-9, 1e300};
  for (const double step : extremes) {
    for (const double stall : extremes) {
      for (const double prior : {1e-9, 1e300}) {
        SaveMeasurements m = measured();
        m.step_seconds = step;
        m.stall_seconds = stall;
        SaveLimits l = limits();
        l.mtbf_prior_seconds = prior;
        const SaveChoice choice = choose_save_interval(m, l);
        EXPECT_GE(choice.steps, 1);
        EXPECT_LE(choice.steps, l.steps_max);
      }
    }
  }
}

TEST(SaveIntervalTest, SmallChangesLeaveTheIntervalAndTheLimitDoesNot) {
  const SaveMeasurements m = measured();
  SaveChoice choice;
  choice.steps = 110;
  SaveLimits l = limits();
  l.max_overhead = 0.05;
  EXPECT_FALSE(worth_changing(100, choice, m, l));
  EXPECT_FALSE(worth_changing(120, choice, m, l));
  EXPECT_TRUE(worth_changing(0, choice, m, l)) << "nothing chosen yet";
  EXPECT_TRUE(worth_changing(91, choice, m, l));
  EXPECT_TRUE(worth_changing(132, choice, m, l));
  l.max_overhead = 0.044;  // 9 s in 200 s are more, in 220 s are not
  EXPECT_TRUE(worth_changing(100, choice, m, l));
  EXPECT_FALSE(worth_changing(110, choice, m, l));
}

TEST(SaveIntervalTest, MeasurementsAreMeansOverTheLastFewSaves) {
  SaveMeasurements m;
  for (const double stall : {1.0, 3.0}) {
    SaveMeasurements save;
    save.stall_seconds = stall;
    save.slowdown_seconds = 2 * stall;
    save.save_seconds = 10 * stall;
    m.add(save);
  }
  EXPECT_EQ(m.save_count, 2);
  EXPECT_DOUBLE_EQ(m.stall_seconds, 2.0);
  EXPECT_DOUBLE_EQ(m.slowdown_seconds, 4.0);
  EXPECT_DOUBLE_EQ(m.save_seconds, 20.0);
  for (int i = 0; i < 50; ++i) m.add({.stall_seconds = 7.0});
  EXPECT_NEAR(m.stall_seconds, 7.0, 1e-3) << "old saves are forgotten";
}

TEST(SaveMeterTest, ASaveCostsItsStallAndWhatTheStepsBesideItTookLonger) {
  SaveMeter meter;
  double now = 0.0;
  for (int step = 1; step <= 10; ++step) meter.on_step(at(now += 1.0), step, 1.0, 0.0);
  meter.on_step(at(now += 1.5), 11, 1.0, 0.5);  // saved after step 11
  for (int step = 12; step <= 14; ++step) meter.on_step(at(now += 1.25), step, 1.25, 0.0);
  EXPECT_FALSE(meter.on_commit(at(now), 10).has_value()) << "another save";
  const auto cost = meter.on_commit(at(now + 0.25), 11);
  ASSERT_TRUE(cost.has_value());
  EXPECT_DOUBLE_EQ(cost->stall_seconds, 0.5);
  EXPECT_DOUBLE_EQ(cost->slowdown_seconds, 0.75);
  EXPECT_DOUBLE_EQ(cost->save_seconds, 4.0);
  EXPECT_EQ(meter.step_seconds(), 1.0) << "the steps beside the save do not count";
  EXPECT_FALSE(meter.on_commit(at(now), 11).has_value()) << "counted once";
}

TEST(SaveMeterTest, StepsThatHappenToBeFasterBesideASaveCostNothing) {
  SaveMeter meter;
  meter.on_step(at(1), 1, 1.0, 0.1);
  meter.on_step(at(2), 2, 0.5, 0.0);
  EXPECT_EQ(meter.on_commit(at(3), 1)->slowdown_seconds, 0.0);
}

TEST(SaveMeterTest, WhenEveryStepHasASaveBesideItTheirOwnTimeIsTaken) {
  SaveMeter meter;
  EXPECT_EQ(meter.step_seconds(), 0.0);
  meter.on_step(at(1), 1, 9.0, 0.1);
  for (int step = 2; step <= 40; ++step) meter.on_step(at(step), step, 2.0, 0.1);
  EXPECT_EQ(meter.step_seconds(), 9.0) << "the only one that had none";
}

TEST(SaveMeterTest, StepsAfterASaveThatFailedAreNotBesideIt) {
  SaveMeter meter;
  meter.on_step(at(1), 1, 1.0, 0.5);
  meter.on_step(at(2), 2, 9.0, 0.0);
  meter.on_failure(7);  // another one
  meter.on_step(at(3), 3, 9.0, 0.0);
  meter.on_failure(1);
  for (int step = 4; step <= 8; ++step) meter.on_step(at(step), step, 2.0, 0.0);
  EXPECT_EQ(meter.step_seconds(), 2.0);
  EXPECT_FALSE(meter.on_commit(at(9), 1).has_value());
}

TEST(SaveMeterTest, TheStepTimeFollowsThoseOfTheLastSteps) {
  SaveMeter meter;
  for (int step = 1; step <= 100; ++step) meter.on_step(at(step), step, 1.0, 0.0);
  for (int step = 101; step <= 111; ++step) meter.on_step(at(step), step, 3.0, 0.0);
  EXPECT_EQ(meter.step_seconds(), 3.0);
}

}  // namespace
}  // namespace penstock
