// Steps whose loss or gradient norm is out of the ordinary, as the coordinator sees them.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

using std::chrono::seconds;

constexpr GuardFinding kSkipped = {GuardSignal::kLossSpike, GuardPolicy::kSkip, 9.5, 4.25, 6.5};
constexpr GuardFinding kRollback = {GuardSignal::kLossSpike, GuardPolicy::kRollback, 9.5, 4.25,
                                    6.5};
constexpr GuardFinding kWarned = {GuardSignal::kGradNormSpike, GuardPolicy::kWarn, 30.0, 1.0, 2.0};

class CoreGuardsTest : public ::testing::Test {
 protected:
  CoreGuardsTest() {
    h.add_worker("w0", 2);
    h.add_worker("w1", 2);
    JobSpec spec = four_rank_spec();
    spec.guards.loss_spike.policy = GuardPolicy::kRollback;
    spec.guards.rollback_steps = 10;
    spec.guards.max_rollbacks = 2;
    job = h.submit_ok(spec);
    h.run(job);
  }
  void find(int64_t step, const GuardFinding& finding) {
    h.train(job, step, step, [&](StepReport& report) { report.guard = finding; });
  }
  int64_t count(const std::string& code) const {
    return std::count_if(h.events.begin(), h.events.end(),
                         [&](const JobEvent& event) { return event.reason.code == code; });
  }
  // From the checkpoint of step 20 into the next epoch.
  void recover() {
    h.kill_rank(job, 1);
    h.confirm_stops(job);
    h.pass(seconds(2));
    if (!h.finds.empty()) h.answer_find();
    h.run(job);
  }

  // Steps up to `last`, with a checkpoint every 20.
  void train_to(int64_t first, int64_t last) {
    for (int64_t step = first; step <= last; ++step) {
      h.train(job, step, step);
      if (step % 20 == 0) h.checkpoint(job, step);
    }
  }
  static CheckpointFound found_of(JobId job, int64_t step, std::vector<int64_t> steps) {
    CheckpointFound found;
    found.job = job;
    found.step = step;
    if (step > 0) found.manifest = "/c/" + std::to_string(step) + ".manifest";
    found.steps = std::move(steps);
    return found;
  }
  // A rollback at `step`, up to the question for a checkpoint.
  void spike(int64_t step) {
    h.clear();
    find(step, kRollback);
    ASSERT_EQ(h.record(job).reason.code, kRollingBack) << h.record(job).reason.message;
    h.confirm_stops(job);
    h.pass(seconds(1));
    ASSERT_EQ(h.finds.size(), 1u);
  }

  CoreHarness h;
  JobId job;
};

TEST_F(CoreGuardsTest, ARollbackTakesStepsBackAndIsNoFailure) {
  train_to(1, 45);
  spike(46);
  EXPECT_EQ(h.finds[0].before, (StepRange{37, 46}));
  EXPECT_TRUE(h.finds[0].rolled_back.empty());
  h.answer_find(found_of(job, 20, {20, 40}));
  const std::vector<StartRank> orders = h.sent<StartRank>();
  ASSERT_EQ(orders.size(), 4u);
  for (const StartRank& order : orders) {
    EXPECT_EQ(order.restore_step, 20);
    EXPECT_EQ(order.left_out, (std::vector<StepRange>{{37, 46}}));
    EXPECT_EQ(order.first_unreported_step, 37) << "those after it have not happened";
  }
  EXPECT_EQ(h.record(job).checkpoint->step, 20);
  EXPECT_EQ(h.record(job).failures, 0);
  EXPECT_EQ(h.record(job).restarts, 0);
  EXPECT_TRUE(h.has_event("rolled_back"));
  EXPECT_FALSE(h.has_event("checkpoint_missing"));
  h.run(job);
  train_to(21, 50);
  EXPECT_EQ(h.record(job).last_step->step, 50);
  EXPECT_EQ(h.record(job).checkpoint->step, 40) << "of the new epoch";
}

TEST_F(CoreGuardsTest, EveryLaterStartLeavesOutTheSameAndIgnoresWhatWasTakenBack) {
  train_to(1, 45);
  spike(46);
  h.answer_find(found_of(job, 20, {20, 40}));
  h.run(job);
  h.train(job, 21, 30);
  const std::vector<StepRange> ranges = {{37, 46}};
  const std::vector<Rollback> rolled_back = {{{37, 46}, Epoch{1}}};
  const auto expect_start = [&] {
    h.pass(seconds(2));
    ASSERT_EQ(h.finds.size(), 1u);
    EXPECT_EQ(h.finds[0].rolled_back, rolled_back);
    EXPECT_FALSE(h.finds[0].before.has_value());
    h.clear();
    h.answer_find(found_of(job, 20, {20, 40}));
    ASSERT_FALSE(h.sent<StartRank>().empty());
    EXPECT_EQ(h.sent<StartRank>()[0].left_out, ranges);
    EXPECT_EQ(h.sent<StartRank>()[0].restore_step, 20);
  };
  h.kill_rank(job, 1);
  h.confirm_stops(job);
  expect_start();
  h.run(job);
  h.restart_coordinator();
  for (auto& [name, worker] : h.workers) h.register_worker(name);
  h.cancel(job);
  h.confirm_stops(job);
  ASSERT_EQ(h.state(job), JobState::kCancelled);
  ASSERT_TRUE(h.resume(job).status.ok());
  expect_start();
}

TEST_F(CoreGuardsTest, ACoordinatorThatDiesBeforeItKnowsWhereToGoBackToAsksAgain) {
  train_to(1, 45);
  spike(46);
  h.finds.clear();
  h.restart_coordinator();
  for (auto& [name, worker] : h.workers) h.register_worker(name);
  h.pass(seconds(2));
  ASSERT_EQ(h.finds.size(), 1u);
  EXPECT_EQ(h.finds[0].before, (StepRange{37, 46}));
  h.answer_find(found_of(job, 20, {20, 40}));
  EXPECT_EQ(h.sent<StartRank>().at(0).left_out, (std::vector<StepRange>{{37, 46}}));
}

// The daemon repeats what it reported when it registers anew; with a second rollback on record the
// checkpoints that are left for the first would be those that it took back.
TEST_F(CoreGuardsTest, ARollbackThatIsReportedAgainIsOne) {
  train_to(1, 45);
  find(46, kRollback);
  find(46, kRollback);
  h.restart_coordinator();
  for (auto& [name, worker] : h.workers) h.register_worker(name);
  h.train(job, 45, 45);
  find(46, kRollback);
  EXPECT_EQ(count(kRollingBack), 1);
  h.confirm_stops(job);
  h.pass(seconds(1));
  ASSERT_EQ(h.finds.size(), 1u);
  EXPECT_EQ(h.finds[0].before, (StepRange{37, 46}));
  EXPECT_TRUE(h.finds[0].rolled_back.empty());
  EXPECT_EQ(h.record(job).guards.rollbacks, 1);
  h.answer_find(found_of(job, 40, {40}));
  EXPECT_EQ(h.sent<StartRank>().at(0).left_out, (std::vector<StepRange>{{41, 46}}));
}

TEST_F(CoreGuardsTest, WithNoCheckpointOldEnoughItGoesBackLess) {
  train_to(1, 45);
  spike(46);
  h.answer_find(found_of(job, 40, {40}));
  EXPECT_EQ(h.sent<StartRank>().at(0).left_out, (std::vector<StepRange>{{41, 46}}));
  EXPECT_EQ(h.sent<StartRank>().at(0).restore_step, 40);
}

TEST_F(CoreGuardsTest, BeforeTheFirstCheckpointItStartsOver) {
  h.train(job, 1, 6);
  spike(7);
  EXPECT_EQ(h.finds[0].before, (StepRange{1, 7}));
  h.answer_find(found_of(job, 0, {}));
  EXPECT_EQ(h.sent<StartRank>().at(0).left_out, (std::vector<StepRange>{{1, 7}}));
  EXPECT_EQ(h.sent<StartRank>().at(0).restore_manifest, "");
}

TEST_F(CoreGuardsTest, ADirectoryThatIsNotMountedIsNotTakenForOneWithoutCheckpoints) {
  train_to(1, 45);
  spike(46);
  h.clear();
  h.answer_find(found_of(job, 0, {}));
  EXPECT_TRUE(h.sent<StartRank>().empty());
  EXPECT_TRUE(h.has_event("checkpoint_missing"));
}

TEST_F(CoreGuardsTest, OneRollbackTooManyFailsTheJobAndAResumeAllowsMore) {
  train_to(1, 45);
  spike(46);
  h.answer_find(found_of(job, 20, {20, 40}));
  h.run(job);
  train_to(21, 50);
  spike(51);
  EXPECT_EQ(h.finds[0].before, (StepRange{42, 51}));
  h.answer_find(found_of(job, 40, {20, 40, 40}));
  h.run(job);
  train_to(41, 60);
  find(61, kRollback);
  EXPECT_EQ(h.record(job).outcome, JobState::kFailed);
  EXPECT_EQ(h.record(job).last_failure->reason.code, "diverged");
  EXPECT_EQ(h.record(job).last_failure->reason.message,
            "step 61: loss 9.5 is above 6.5, the limit by the accepted steps before it, whose "
            "median is 4.25; it was rolled back 2 times already (guards.max_rollbacks)");
  h.confirm_stops(job);
  ASSERT_EQ(h.state(job), JobState::kFailed);
  ASSERT_TRUE(h.resume(job).status.ok());
  h.pass(seconds(1));
  h.answer_find(found_of(job, 60, {40, 60}));
  h.run(job);
  spike(61);
  EXPECT_EQ(h.record(job).guards.rolled_back.size(), 3u);
}

TEST_F(CoreGuardsTest, StepsFromBeforeARollbackAreNoMeasureForAProof) {
  train_to(1, 45);
  spike(46);
  h.answer_find(found_of(job, 20, {20, 40}));
  h.run(job);
  train_to(21, 48);
  h.cancel(job);
  h.confirm_stops(job);
  EXPECT_FALSE(h.resume(job, 5).status.ok());
  EXPECT_TRUE(h.resume(job, 2).status.ok());
}

TEST_F(CoreGuardsTest, WhatAGuardDidIsAnEventWithItsNumbers) {
  h.train(job, 1, 4);
  find(5, kSkipped);
  find(6, kWarned);
  ASSERT_TRUE(h.has_event("loss_spike"));
  ASSERT_TRUE(h.has_event("grad_norm_spike"));
  for (const JobEvent& event : h.events) {
    if (event.reason.code == "loss_spike") {
      EXPECT_EQ(event.reason.message,
                "step 5 is left out (1 of guards.max_skips 10): loss 9.5 is above 6.5, the limit "
                "by the accepted steps before it, whose median is 4.25");
    } else if (event.reason.code == "grad_norm_spike") {
      EXPECT_EQ(event.reason.message,
                "step 6 counts, with a warning: gradient norm 30 is above 2, the limit by the "
                "accepted steps before it, whose median is 1");
    }
  }
  EXPECT_EQ(h.record(job).guards, (GuardRecord{.warnings = 1, .skips = 1}));
  EXPECT_EQ(h.state(job), JobState::kRunning);
}

TEST_F(CoreGuardsTest, AReplayThatFindsTheSameIsNoNews) {
  h.train(job, 1, 20);
  h.checkpoint(job, 20);
  h.train(job, 21, 24);
  find(25, kSkipped);
  recover();
  h.train(job, 21, 24);
  find(25, kSkipped);
  EXPECT_EQ(count("loss_spike"), 1);
  EXPECT_EQ(h.record(job).guards.skips, 1);
  find(26, kSkipped);
  EXPECT_EQ(count("loss_spike"), 2);
}

TEST_F(CoreGuardsTest, ARestartedCoordinatorRemembers) {
  h.train(job, 1, 4);
  find(5, kSkipped);
  const GuardRecord before = h.record(job).guards;
  h.restart_coordinator();
  EXPECT_EQ(h.record(job).guards, before);
  EXPECT_EQ(h.record(job).last_step->guard, kSkipped);
}

TEST_F(CoreGuardsTest, AJobMayGoOnByOtherGuardsButNotProveStepsFromBefore) {
  h.train(job, 1, 20);
  h.checkpoint(job, 20);
  h.train(job, 21, 30);
  h.cancel(job);
  h.confirm_stops(job);
  JobSpec spec = h.job(job).spec;
  spec.guards.not_finite = GuardPolicy::kSkip;
  ASSERT_TRUE(h.resume(job, 0, spec).status.ok());
  EXPECT_EQ(h.job(job).spec.guards.not_finite, GuardPolicy::kSkip);
  EXPECT_EQ(h.record(job).rebalanced_step, 30);
}

}  // namespace
}  // namespace penstock
