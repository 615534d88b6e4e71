// checkpoint.interval: auto.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

JobSpec automatic_spec() {
  JobSpec spec = four_rank_spec();
  spec.training.steps = 100'000;
  spec.checkpoint.interval = 0;
  spec.checkpoint.automatic = true;
  spec.checkpoint.max_overhead = 0.5;
  spec.checkpoint.device_mtbf_hours = 4.0;  // of the four ranks one fails in an hour
  return spec;
}

class CoreSavesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    h.add_worker("w0", 4);
    job = h.submit_ok(automatic_spec());
    h.run(job);
  }
  const SavingRecord& saving() const { return *h.record(job).saving; }
  int64_t steps() const { return saving().choice.steps; }
  int events() const {
    int count = 0;
    for (const JobEvent& event : h.events) count += event.reason.code == "checkpoint_interval";
    return count;
  }
  // Trains up to `step`, after which the state is saved with this stall and committed 5 s later.
  void save_after(int64_t step, double stall_seconds) {
    const int64_t done = h.record(job).last_step ? h.record(job).last_step->step : 0;
    h.train(job, done + 1, step - 1);
    h.train(job, step, step, [&](StepReport& report) {
      report.checkpoint_seconds = stall_seconds;
      report.step_seconds += stall_seconds;
    });
    h.jump(std::chrono::seconds(5));
    h.checkpoint(job, step);
  }
  // A rank dies, and a new attempt is ordered.
  void begin_anew() {
    h.kill_rank(job, 2);
    h.confirm_stops(job);
    h.clear();
    h.answer_find();
    h.pass(std::chrono::seconds(2));
  }

  CoreHarness h;
  JobId job;
};

TEST_F(CoreSavesTest, RanksBeginWithAnEarlySaveThatIsThereToBeMeasured) {
  const auto starts = h.sent<StartRank>();
  ASSERT_EQ(starts.size(), 4u);
  for (const StartRank& start : starts) EXPECT_EQ(start.save_interval, kFirstSaveSteps);
  EXPECT_EQ(steps(), kFirstSaveSteps);
  EXPECT_EQ(events(), 1);
  EXPECT_TRUE(h.sent<SaveInterval>().empty());
}

TEST_F(CoreSavesTest, TheFirstCommitGivesTheOptimumForWhatWasMeasured) {
  h.clear();
  save_after(10, 2.0);
  // sqrt(2 x 2 s x 1 h) = 120 s, in steps of 0.5 s; the 7 s trained move the hour a little.
  EXPECT_NEAR(static_cast<double>(steps()), 240.0, 1.0);
  EXPECT_EQ(saving().measured.stall_seconds, 2.0);
  EXPECT_EQ(saving().measured.save_seconds, 5.0);
  EXPECT_EQ(saving().commits, 1);
  EXPECT_EQ(events(), 2);
  const auto told = h.sent<SaveInterval>();
  ASSERT_FALSE(told.empty());
  EXPECT_EQ(told.back(), (SaveInterval{job, Epoch{1}, steps()}));
}

TEST_F(CoreSavesTest, TheStepsAfterASaveThatFailedAreMeasured) {
  const auto stalled = [](StepReport& report) { report.checkpoint_seconds = 0.25; };
  const auto slower = [](StepReport& report) { report.step_seconds = 3.0; };
  h.train(job, 1, 9);
  h.train(job, 10, 10, stalled);
  h.say("w0", SaveFailed{job, Epoch{1}, Rank{1}, 10, "disk full"});
  h.train(job, 11, 40, slower);
  EXPECT_EQ(saving().measured.step_seconds, 3.0);
  h.say("w0", SaveFailed{job, Epoch{1}, Rank{1}, 41, "disk full"});
  h.train(job, 41, 41, stalled);  // which comes after the word of its failure
  h.train(job, 42, 70);
  EXPECT_EQ(saving().measured.step_seconds, 0.5);
}

TEST_F(CoreSavesTest, EveryOutcomeRepeatsTheIntervalInCaseItWasLost) {
  save_after(10, 2.0);
  h.clear();
  save_after(250, 2.0);
  EXPECT_EQ(events(), 2) << "it did not change";
  EXPECT_EQ(h.sent<SaveInterval>().size(), 1u);
  h.clear();
  h.say("w0", SaveFailed{job, Epoch{1}, Rank{1}, 490, "disk full"});
  EXPECT_EQ(h.sent<SaveInterval>().size(), 1u);
}

TEST_F(CoreSavesTest, StepsThatBecomeLongerMoveItWithoutWaitingForASave) {
  save_after(10, 2.0);
  const int64_t before = steps();
  h.train(job, 11, 60, [](StepReport& report) { report.step_seconds = 2.0; });
  EXPECT_NEAR(static_cast<double>(steps()), static_cast<double>(before) / 4.0, 2.0);
  EXPECT_EQ(h.sent<SaveInterval>().back().steps, steps());
}

TEST_F(CoreSavesTest, AFailureMakesItShorter) {
  save_after(10, 2.0);
  const int64_t before = steps();
  begin_anew();
  const auto starts = h.sent<StartRank>();
  ASSERT_FALSE(starts.empty());
  EXPECT_EQ(saving().measured.failure_count, 1);
  EXPECT_NEAR(static_cast<double>(steps()), static_cast<double>(before) / std::sqrt(2.0), 2.0);
  EXPECT_EQ(starts.back().save_interval, steps());
}

TEST_F(CoreSavesTest, ANewCoordinatorGoesByWhatTheOldOneMeasured) {
  save_after(10, 2.0);
  h.train(job, 11, 30);
  const SavingRecord before = saving();
  h.restart_coordinator();
  EXPECT_EQ(saving(), before);
  h.register_worker("w0");
  for (int32_t rank = 0; rank < 4; ++rank) h.ready(job, rank);
  ASSERT_EQ(h.state(job), JobState::kRunning);
  h.train(job, 31, 60);
  EXPECT_EQ(steps(), before.choice.steps);
  EXPECT_GT(saving().measured.training_seconds, before.measured.training_seconds);
}

TEST_F(CoreSavesTest, TheFirstStepsOfAnAttemptWhichAreLongerDoNotMoveIt) {
  save_after(10, 2.0);
  const int64_t before = steps();
  begin_anew();
  h.run(job);
  const int64_t after = steps();
  EXPECT_LT(after, before);
  h.clear();
  h.train(job, 11, 12, [](StepReport& report) { report.step_seconds = 5.0; });
  h.train(job, 13, 40);
  EXPECT_EQ(steps(), after);
  EXPECT_TRUE(h.sent<SaveInterval>().empty());
}

TEST_F(CoreSavesTest, AJobWithAFixedIntervalMeasuresNothingAndTellsItsRanksNothing) {
  h.add_worker("w1", 4);
  h.clear();
  const JobId fixed = h.submit_ok(four_rank_spec("fixed"));
  EXPECT_EQ(h.sent<StartRank>().back().save_interval, 0);
  h.run(fixed);
  h.train(fixed, 1, 20);
  h.clear();
  h.checkpoint(fixed, 20);
  EXPECT_TRUE(h.sent<SaveInterval>().empty());
  EXPECT_FALSE(h.record(fixed).saving.has_value());
}

}  // namespace
}  // namespace penstock
