// Epochs that end on purpose with their state saved: suspended jobs.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

using std::chrono::seconds;

class CorePausesTest : public ::testing::Test {
 protected:
  CorePausesTest() {
    h.add_worker("w0", 2);
    h.add_worker("w1", 2);
  }
  void start(const JobSpec& spec = four_rank_spec()) {
    job = h.submit_ok(spec);
    h.run(job);
  }
  std::string reason() const { return h.record(job).reason.code; }

  CoreHarness h;
  JobId job;
};

TEST_F(CorePausesTest, ASuspendedJobIsSavedFirstAndGoesOnWithTheNextStep) {
  start();
  h.train(job, 1, 33);
  h.clear();
  ASSERT_TRUE(h.suspend(job).status.ok());
  EXPECT_EQ(h.state(job), JobState::kRunning) << "until its state is saved";
  EXPECT_EQ(reason(), "suspending");
  ASSERT_EQ(h.sent<PauseRanks>().size(), 2u) << "one per worker";
  EXPECT_EQ(h.sent<PauseRanks>()[0], (PauseRanks{job, Epoch{1}}));
  h.train(job, 34, 34);
  h.pause(job, 34);
  EXPECT_EQ(h.state(job), JobState::kStopping);
  EXPECT_EQ(h.sent<StopRanks>().size(), 2u);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kSuspended);
  EXPECT_EQ(h.core().free_devices(WorkerId{1}).size(), 2u);
  EXPECT_FALSE(h.record(job).finished) << "it has not ended";
  h.pass(seconds(60));
  EXPECT_EQ(h.state(job), JobState::kSuspended) << "and stays so";

  ASSERT_TRUE(h.resume(job).status.ok());
  h.answer_find();
  EXPECT_EQ(h.record(job).restore_step, 34);
  h.run(job);
  EXPECT_EQ(h.record(job).failures, 0);
  EXPECT_EQ(h.record(job).restarts, 0);
  h.pass(seconds(10));
  EXPECT_EQ(h.state(job), JobState::kRunning) << "it is not suspended again";
}

// Seed 276 of the simulation's scenario "message-suspensions": the cancel was acknowledged, and the
// job suspended.
TEST_F(CorePausesTest, AJobThatIsCancelledWhileItStopsForASuspensionIsCancelled) {
  start();
  h.train(job, 1, 2);
  ASSERT_TRUE(h.suspend(job).status.ok());
  h.train(job, 3, 3);
  h.pause(job, 3);
  ASSERT_EQ(h.state(job), JobState::kStopping);
  h.cancel(job);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kCancelled);
  EXPECT_EQ(reason(), "cancelled");
  EXPECT_TRUE(h.record(job).finished);
}

TEST_F(CorePausesTest, AnOrdinaryCheckpointUnderWayDoesNotEndTheEpoch) {
  start();
  h.train(job, 1, 20);
  h.save_all(job, 20);
  ASSERT_TRUE(h.suspend(job).status.ok());
  h.finish_commit();
  EXPECT_EQ(h.state(job), JobState::kRunning) << "steps after it would be lost";
  h.train(job, 21, 22);
  h.pause(job, 22);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kSuspended);
  EXPECT_EQ(h.record(job).checkpoint->step, 22);
}

TEST_F(CorePausesTest, TheOrderIsRepeatedUntilTheRanksHaveSaved) {
  start();
  h.train(job, 1, 3);
  ASSERT_TRUE(h.suspend(job).status.ok());
  h.clear();
  h.pass(seconds(5));
  EXPECT_GE(h.sent<PauseRanks>().size(), 4u);
}

TEST_F(CorePausesTest, ARestartedCoordinatorGoesOnWithThePause) {
  start();
  h.train(job, 1, 3);
  ASSERT_TRUE(h.suspend(job).status.ok());
  h.restart_coordinator();
  h.register_worker("w0");
  h.register_worker("w1");
  h.clear();
  h.pass(seconds(3));
  EXPECT_GE(h.sent<PauseRanks>().size(), 2u);
  h.pause(job, 4);
  h.restart_coordinator();
  h.register_worker("w0");
  h.register_worker("w1");
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kSuspended);
  h.restart_coordinator();
  EXPECT_EQ(h.state(job), JobState::kSuspended);
}

TEST_F(CorePausesTest, RanksWhoseStateCannotBeSavedTrainOnAndPauseLater) {
  start();
  h.train(job, 1, 5);
  ASSERT_TRUE(h.suspend(job).status.ok());
  h.save_segment(job, 0, 5, true);
  h.say(h.host_of(job, 1), SaveFailed{job, Epoch{1}, Rank{1}, 5, "disk full"});
  EXPECT_EQ(h.state(job), JobState::kRunning);
  EXPECT_EQ(reason(), "pause_delayed");
  EXPECT_NE(h.record(job).reason.message.find("disk full"), std::string::npos);
  ASSERT_FALSE(h.sent<CheckpointOutcome>().empty());
  EXPECT_FALSE(h.sent<CheckpointOutcome>().back().committed);
  h.clear();
  h.pass(seconds(20));
  EXPECT_TRUE(h.sent<PauseRanks>().empty()) << "not at every step of a full disk";
  h.pass(seconds(20));
  EXPECT_FALSE(h.sent<PauseRanks>().empty());
  EXPECT_EQ(reason(), "suspending");
  h.pause(job, 60);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kSuspended);
}

TEST_F(CorePausesTest, ACommitThatFailsDoesNotSuspend) {
  start();
  h.train(job, 1, 5);
  ASSERT_TRUE(h.suspend(job).status.ok());
  h.save_all(job, 5, true);
  h.finish_commit(resource_exhausted("disk full"));
  EXPECT_EQ(h.state(job), JobState::kRunning);
  EXPECT_EQ(reason(), "pause_delayed");
}

TEST_F(CorePausesTest, AJobThatWaitsIsSuspendedAtOnce) {
  start();
  const JobId waiting = h.submit_ok(four_rank_spec("waiting"));
  ASSERT_TRUE(h.suspend(waiting).status.ok());
  EXPECT_EQ(h.state(waiting), JobState::kSuspended);
  ASSERT_TRUE(h.cancel(job).status.ok());
  h.confirm_stops(job);
  EXPECT_EQ(h.state(waiting), JobState::kSuspended) << "though there is room";
  ASSERT_TRUE(h.resume(waiting).status.ok());
  EXPECT_EQ(h.state(waiting), JobState::kStarting);
}

TEST_F(CorePausesTest, RanksThatHaveNotBegunAreStoppedAtOnce) {
  job = h.submit_ok(four_rank_spec());
  h.spawn_ranks(job);
  ASSERT_EQ(h.state(job), JobState::kLoading);
  ASSERT_TRUE(h.suspend(job).status.ok());
  EXPECT_EQ(h.state(job), JobState::kStopping);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kSuspended);
}

TEST_F(CorePausesTest, AFailureOnTheWayGoesOnFromMemoryAndThenSuspends) {
  start();
  h.train(job, 1, 7);
  ASSERT_TRUE(h.suspend(job).status.ok());
  h.kill_rank(job, 3);
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  h.confirm_stops(job, {6, 7});
  ASSERT_EQ(h.state(job), JobState::kStarting) << "what daemons hold is not on disk";
  EXPECT_TRUE(h.record(job).restored_from_memory);
  h.clear();
  h.run(job);
  EXPECT_FALSE(h.sent<PauseRanks>().empty());
  h.train(job, 8, 8);
  h.pause(job, 8);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kSuspended);
}

TEST_F(CorePausesTest, AFailureOnTheWaySuspendsWhenNothingIsHeld) {
  start();
  h.train(job, 1, 20);
  h.checkpoint(job, 20);
  h.train(job, 21, 27);
  ASSERT_TRUE(h.suspend(job).status.ok());
  h.kill_rank(job, 3);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kSuspended);
  EXPECT_NE(h.record(job).reason.message.find("step 20"), std::string::npos);
}

TEST_F(CorePausesTest, SuspendedJobsAreNeitherRemovedNorDoneAndKeepTheirName) {
  start();
  ASSERT_TRUE(h.suspend(job).status.ok());
  h.pause(job, 1);
  h.confirm_stops(job);
  EXPECT_TRUE(h.suspend(job).status.ok()) << "once more is no mistake";
  EXPECT_EQ(h.remove(job).status.code(), Code::kFailedPrecondition);
  EXPECT_EQ(h.submit(four_rank_spec()).status.code(), Code::kAlreadyExists);
  ASSERT_TRUE(h.cancel(job).status.ok());
  EXPECT_EQ(h.state(job), JobState::kCancelled);
  EXPECT_EQ(h.suspend(job).status.code(), Code::kFailedPrecondition);
  EXPECT_TRUE(h.remove(job).status.ok());
}

TEST_F(CorePausesTest, CancelWinsOverASuspensionUnderWay) {
  start();
  h.train(job, 1, 3);
  ASSERT_TRUE(h.suspend(job).status.ok());
  ASSERT_TRUE(h.cancel(job).status.ok());
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kCancelled);
  EXPECT_FALSE(h.record(job).suspend);
  ASSERT_TRUE(h.resume(job).status.ok());
  h.answer_find();
  h.run(job);
  h.clear();
  h.pass(seconds(5));
  EXPECT_TRUE(h.sent<PauseRanks>().empty());
}

TEST_F(CorePausesTest, AJobAtItsLastStepJustEnds) {
  start();
  h.train(job, 1, 100);
  h.clear();
  ASSERT_TRUE(h.suspend(job).status.ok());
  EXPECT_TRUE(h.sent<PauseRanks>().empty());
  h.checkpoint(job, 100);
  h.finish_ranks(job);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kSucceeded);
}

TEST_F(CorePausesTest, AReplayThatIsSuspendedBeginsAnewLater) {
  start();
  h.train(job, 1, 20);
  h.checkpoint(job, 20);
  h.train(job, 21, 30);
  ASSERT_TRUE(h.cancel(job).status.ok());
  h.confirm_stops(job);
  ASSERT_TRUE(h.resume(job, 5).status.ok());
  CheckpointFound found;
  found.job = job;
  found.step = 20;
  found.manifest = h.record(job).checkpoint->manifest;
  found.steps = {20};
  h.answer_find(found);
  h.run(job);
  h.train(job, 21, 23);
  ASSERT_TRUE(h.suspend(job).status.ok());
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kSuspended) << "it has nothing to save";
  ASSERT_TRUE(h.resume(job).status.ok());
  h.answer_find(found);
  h.run(job);
  ASSERT_TRUE(h.record(job).proof);
  EXPECT_EQ(h.record(job).proof->compared, 0);
  h.train(job, 21, 30);
  EXPECT_TRUE(h.has_event("proved"));
}

}  // namespace
}  // namespace penstock
