// Steps whose loss or gradient norm is out of the ordinary, as the coordinator sees them.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

using std::chrono::seconds;

constexpr GuardFinding kSkipped = {GuardSignal::kLossSpike, GuardPolicy::kSkip, 9.5, 4.25, 6.5};
constexpr GuardFinding kWarned = {GuardSignal::kGradNormSpike, GuardPolicy::kWarn, 30.0, 1.0, 2.0};

class CoreGuardsTest : public ::testing::Test {
 protected:
  CoreGuardsTest() {
    h.add_worker("w0", 2);
    h.add_worker("w1", 2);
    job = h.submit_ok(four_rank_spec());
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

  CoreHarness h;
  JobId job;
};

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
