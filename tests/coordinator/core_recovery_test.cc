// Failures: of ranks, of workers, of the coordinator itself.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

class CoreRecoveryTest : public ::testing::Test {
 protected:
  CoreRecoveryTest() {
    h.add_worker("w0", 2);
    h.add_worker("w1", 2);
    job = h.submit_ok(four_rank_spec());
    h.run(job);
    h.train(job, 1, 30);
    h.checkpoint(job, 20);
    h.clear();
  }
  // Stops confirmed, checkpoint found: the next epoch is placed.
  void recover() {
    h.confirm_stops(job);
    h.pass(seconds(2));  // any back-off of this test
    if (!h.finds.empty()) h.answer_find();
  }
  void lose(const std::string& worker) {
    h.workers.at(worker).alive = false;
    h.pass(seconds(4));
  }
  // A job that needs `devices`, one of them on `worker`, waits until its old ranks are stopped.
  void expect_nothing_new_before_stops(const std::string& worker, int64_t devices) {
    const JobId next = h.submit_ok(flat_spec("next", devices));
    EXPECT_EQ(h.record(next).reason.code, "waiting_for_devices");
    h.say(worker, RanksStopped{job, Epoch{1}});
    EXPECT_EQ(h.state(next), JobState::kStarting);
  }

  CoreHarness h;
  JobId job;
};

TEST_F(CoreRecoveryTest, AKilledRankMakesTheJobRecoverFromTheNewestCheckpoint) {
  h.kill_rank(job, 2);
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_EQ(h.record(job).reason.code, "rank_killed");
  EXPECT_EQ(h.record(job).last_failure->rank, Rank{2});
  EXPECT_EQ(h.record(job).last_failure->step, 30);
  EXPECT_EQ(h.sent<StopRanks>().size(), 2u);
  EXPECT_EQ(h.sent<StopRanks>()[0].grace_ms, 0);
  h.confirm_stops(job);
  h.answer_find();
  const auto orders = h.sent<StartRank>();
  ASSERT_EQ(orders.size(), 4u);
  EXPECT_EQ(orders[0].epoch, Epoch{2});
  EXPECT_EQ(orders[0].restore_step, 20);
  h.run(job);
  h.train(job, 21, 31);
  EXPECT_EQ(h.record(job).restarts, 1);
  EXPECT_EQ(h.record(job).last_step->step, 31);
}

TEST_F(CoreRecoveryTest, StepsTrainedAgainAreMarkedReplayed) {
  h.kill_rank(job, 2);
  recover();
  h.run(job);
  h.train(job, 21, 30);
  EXPECT_TRUE(h.record(job).last_step->replayed);
  h.train(job, 31, 31);
  EXPECT_FALSE(h.record(job).last_step->replayed);
}

TEST_F(CoreRecoveryTest, NoNewEpochBeforeEveryWorkerConfirmed) {
  h.kill_rank(job, 0);
  h.say("w0", RanksStopped{job, Epoch{1}});
  h.pass(seconds(2));
  EXPECT_TRUE(h.finds.empty());
  EXPECT_TRUE(h.sent<StartRank>().empty());
  h.say("w1", RanksStopped{job, Epoch{1}});
  EXPECT_EQ(h.finds.size(), 1u);
}

TEST_F(CoreRecoveryTest, AConfirmationOfAnOlderEpochDoesNotCount) {
  h.kill_rank(job, 0);
  recover();
  h.run(job);
  h.kill_rank(job, 0);
  h.say("w0", RanksStopped{job, Epoch{1}});
  h.say("w1", RanksStopped{job, Epoch{1}});
  h.pass(seconds(2));
  EXPECT_TRUE(h.finds.empty());
}

TEST_F(CoreRecoveryTest, OfAnEpochThatIsBeingStoppedStepsAreRecordedAndNothingIsCommitted) {
  h.kill_rank(job, 2);
  h.train(job, 31, 35);
  h.save_all(job, 40);
  EXPECT_EQ(h.record(job).last_step->step, 35);
  EXPECT_TRUE(h.commits.empty());
  h.cancel(job);
  h.train(job, 36, 37);
  EXPECT_EQ(h.record(job).last_step->step, 35) << "nobody goes on from there";
}

TEST_F(CoreRecoveryTest, MessagesOfAnOlderEpochAreRefusedByTheNext) {
  h.kill_rank(job, 2);
  recover();
  h.run(job);
  const std::string host = h.host_of(job, 0);
  h.say(host, StepReport{.job = job, .epoch = Epoch{1}, .step = 40, .loss = 1.0});
  h.say(host, RankExited{job, Epoch{1}, Rank{0}, 1, 0, "old"});
  SegmentSaved segment;
  segment.job = job;
  segment.epoch = Epoch{1};
  segment.step = 40;
  h.say(host, segment);
  EXPECT_EQ(h.state(job), JobState::kRunning);
  EXPECT_EQ(h.record(job).last_step->step, 30);
  EXPECT_TRUE(h.job(job).rounds.empty());
}

TEST_F(CoreRecoveryTest, AnExitOfAnOldEpochIsAcknowledgedSoThatItIsNotRepeated) {
  h.kill_rank(job, 2);
  recover();
  h.clear();
  h.say("w0", RankExited{job, Epoch{1}, Rank{0}, 15, 0, "peer lost"});
  ASSERT_EQ(h.sent<StopRanks>().size(), 1u);
  EXPECT_EQ(h.sent<StopRanks>()[0].epoch, Epoch{1});
}

TEST_F(CoreRecoveryTest, ACommitInFlightFinishesBeforeTheNextEpoch) {
  h.save_all(job, 40);
  h.kill_rank(job, 2);
  h.confirm_stops(job);
  EXPECT_TRUE(h.finds.empty());
  h.finish_commit();
  EXPECT_EQ(h.record(job).checkpoint->step, 40);
  ASSERT_EQ(h.finds.size(), 1u);
  h.answer_find();
  EXPECT_EQ(h.sent<StartRank>().at(0).restore_step, 40);
}

TEST_F(CoreRecoveryTest, ALostPeerIsNeverTheCause) {
  h.exit_rank(job, 0, ExitCode::kPeerLost, "rank 2 went away");
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  h.exit_rank(job, 2, ExitCode::kOutOfMemory, "arena of 9 GiB");
  EXPECT_EQ(h.record(job).last_failure->reason.code, "out_of_memory");
  EXPECT_EQ(h.record(job).last_failure->rank, Rank{2});
  EXPECT_EQ(h.record(job).reason.code, "out_of_memory");
  h.exit_rank(job, 1, ExitCode::kPeerLost);
  EXPECT_EQ(h.record(job).last_failure->rank, Rank{2});
}

TEST_F(CoreRecoveryTest, TheFirstRealCauseStays) {
  h.exit_rank(job, 2, ExitCode::kOutOfMemory);
  h.exit_rank(job, 3, ExitCode::kFailure, "second");
  EXPECT_EQ(h.record(job).last_failure->rank, Rank{2});
  EXPECT_EQ(h.record(job).failures, 1);
}

TEST_F(CoreRecoveryTest, ARankKilledByOurOwnOrderIsNoCause) {
  h.exit_rank(job, 0, ExitCode::kPeerLost);
  h.stop_rank(job, 1);
  EXPECT_EQ(h.record(job).last_failure->reason.code, "peer_lost");
  h.exit_rank(job, 2, ExitCode::kPreempted,  // how a rank answers SIGTERM
              std::string(kStoppedByDaemon) + "this attempt is over");
  EXPECT_EQ(h.record(job).last_failure->reason.code, "peer_lost");
}

// Such as after a coordinator was away: what the daemons have to say arrives in any order.
TEST_F(CoreRecoveryTest, ARankThatSomebodyKilledIsTheCauseAlsoWhenItsPeersAreHeardFirst) {
  h.exit_rank(job, 0, ExitCode::kPeerLost, "rank 2 went away");
  h.stop_rank(job, 1);
  h.kill_rank(job, 2);
  EXPECT_EQ(h.record(job).last_failure->reason.code, "rank_killed");
  EXPECT_EQ(h.record(job).last_failure->rank, Rank{2});
  EXPECT_EQ(h.record(job).failures, 1);
}

TEST_F(CoreRecoveryTest, AUsageErrorIsNeverRetried) {
  h.exit_rank(job, 1, ExitCode::kUsage, "no such file: /data/corpus.bin");
  EXPECT_EQ(h.state(job), JobState::kStopping);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kFailed);
  EXPECT_EQ(h.record(job).reason.code, "usage");
  EXPECT_NE(h.record(job).reason.message.find("no such file"), std::string::npos);
}

TEST(CoreFirstStartTest, DataThatIsMissingAtTheFirstStartIsNotRetried) {
  for (const ExitCode code : {ExitCode::kNotFound, ExitCode::kPermission}) {
    CoreHarness h;
    h.add_worker("w0", 4);
    const JobId job = h.submit_ok(four_rank_spec());
    h.spawn_ranks(job);
    h.exit_rank(job, 1, code, "open /data/corpus_train.idx");
    h.confirm_stops(job);
    EXPECT_EQ(h.state(job), JobState::kFailed);
    EXPECT_NE(h.record(job).reason.message.find("open /data/corpus_train.idx"), std::string::npos);
  }
}

TEST_F(CoreRecoveryTest, DataThatIsMissingLaterIsRetried) {
  h.exit_rank(job, 1, ExitCode::kNotFound, "open /data/corpus_train.bin");
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_EQ(h.record(job).reason.code, "not_found");
}

TEST_F(CoreRecoveryTest, DamagedDataWhileTrainingIsNeverRetried) {
  h.exit_rank(job, 1, ExitCode::kDataCorrupt, "corpus.bin: token 70000");
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kFailed);
  EXPECT_EQ(h.record(job).reason.code, "data_corrupt");
}

TEST_F(CoreRecoveryTest, WhatARankPrintedLastStaysOutOfTheSentenceAboutItsEnd) {
  const std::string host = h.host_of(job, 1);
  h.say(host, RankExited{job, Epoch{1}, Rank{1}, 1, 0, "exited with code 1: no space",
                         "21:01:13 step 30\npenstock-rank: no space\n"});
  const Reason reason = h.record(job).reason;
  EXPECT_EQ(reason.message, "rank 1 on " + host + " exited with code 1: no space");
  EXPECT_EQ(reason.log_tail, "21:01:13 step 30\npenstock-rank: no space\n");
  EXPECT_EQ(h.record(job).last_failure->reason, reason);
  EXPECT_EQ(h.events.back().reason, reason);
}

TEST_F(CoreRecoveryTest, ADivergedTrainingIsNeverRetriedAndNamesTheLastGoodCheckpoint) {
  h.exit_rank(job, 3, ExitCode::kPeerLost);
  h.exit_rank(job, 1, ExitCode::kDiverged, "exited with code 16: step 31: loss nan");
  h.confirm_stops(job);
  h.pass(seconds(60));
  EXPECT_EQ(h.state(job), JobState::kFailed);
  EXPECT_EQ(h.record(job).reason.code, "diverged");
  EXPECT_EQ(h.record(job).reason.message,
            "rank 1 on " + h.record(job).last_failure->worker +
                " exited with code 16: step 31: loss nan; the last good checkpoint is of step 20");
}

TEST_F(CoreRecoveryTest, ATrainingThatDivergesBeforeItsFirstCheckpointSaysThatThereIsNone) {
  const JobId other = h.submit_ok(flat_spec("other", 1));
  h.cancel(job);
  h.confirm_stops(job);
  h.run(other);
  h.exit_rank(other, 0, ExitCode::kDiverged, "exited with code 16: step 1: loss inf");
  h.confirm_stops(other);
  EXPECT_EQ(h.state(other), JobState::kFailed);
  EXPECT_NE(h.record(other).reason.message.find("there is no checkpoint"), std::string::npos);
}

TEST_F(CoreRecoveryTest, AFatalCauseThatArrivesAfterItsConsequenceStillEndsTheJob) {
  h.exit_rank(job, 0, ExitCode::kPeerLost);
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  h.exit_rank(job, 2, ExitCode::kDataCorrupt);
  EXPECT_EQ(h.state(job), JobState::kStopping);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kFailed);
}

TEST_F(CoreRecoveryTest, ACheckpointThatARankRefusesIsVerifiedAndAnOlderOneUsed) {
  h.kill_rank(job, 2);
  recover();
  EXPECT_FALSE(h.finds.size());
  h.spawn_ranks(job);
  h.exit_rank(job, 1, ExitCode::kDataCorrupt, "block 7 of e1-r1.segment: checksum differs");
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  h.confirm_stops(job);
  h.pass(seconds(2));
  ASSERT_EQ(h.finds.size(), 1u);
  EXPECT_TRUE(h.finds[0].read_everything);
  h.clear();
  h.answer_find(
      {job, {}, 10, "/state/checkpoints/1/10.manifest", {"20.manifest: block 7 damaged"}, {}});
  EXPECT_TRUE(h.has_event("checkpoint_refused"));
  EXPECT_EQ(h.sent<StartRank>().at(0).restore_step, 10);
  EXPECT_EQ(h.record(job).checkpoint->step, 10);
}

TEST_F(CoreRecoveryTest, ARefusedCheckpointThatProvesGoodMeansTheDataAreDamaged) {
  h.kill_rank(job, 2);
  recover();
  h.spawn_ranks(job);
  h.exit_rank(job, 1, ExitCode::kDataCorrupt, "corpus.idx: magic number");
  h.confirm_stops(job);
  h.pass(seconds(2));
  h.answer_find();  // the same checkpoint again
  EXPECT_EQ(h.state(job), JobState::kFailed);
  EXPECT_EQ(h.record(job).reason.code, "data_corrupt");
}

TEST_F(CoreRecoveryTest, WithOnlyDamagedCheckpointsTheJobFailsInsteadOfStartingOver) {
  h.kill_rank(job, 2);
  h.confirm_stops(job);
  h.answer_find({job, {}, 0, {}, {"20.manifest: truncated"}, {}});
  EXPECT_EQ(h.state(job), JobState::kFailed);
  EXPECT_EQ(h.record(job).reason.code, "no_usable_checkpoint");
}

TEST_F(CoreRecoveryTest, AnUnreadableCheckpointDirectoryIsTriedAgain) {
  h.kill_rank(job, 2);
  h.confirm_stops(job);
  h.answer_find({job, unavailable("stale file handle"), 0, {}, {}, {}});
  EXPECT_EQ(h.record(job).reason.code, "checkpoints_unreadable");
  h.pass(seconds(2));
  h.answer_find();
  EXPECT_EQ(h.state(job), JobState::kStarting);
}

TEST_F(CoreRecoveryTest, ACommittedCheckpointThatIsGoneIsWaitedForInsteadOfStartingOver) {
  h.kill_rank(job, 2);
  h.confirm_stops(job);
  h.answer_find({job, {}, 0, {}, {}, {}});  // its file system is not mounted
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_EQ(h.record(job).reason.code, "checkpoint_missing");
  EXPECT_NE(h.record(job).reason.message.find("step 20"), std::string::npos);
  EXPECT_TRUE(h.sent<StartRank>().empty());
  h.pass(seconds(2));
  h.answer_find();
  EXPECT_EQ(h.state(job), JobState::kStarting);
  EXPECT_EQ(h.sent<StartRank>().at(0).restore_step, 20);
}

TEST_F(CoreRecoveryTest, AnOlderCheckpointInPlaceOfOneThatIsGoneIsSaid) {
  h.checkpoint(job, 30);
  h.kill_rank(job, 2);
  h.confirm_stops(job);
  h.answer_find({job, {}, 20, "/state/checkpoints/1/20.manifest", {}, {}});
  EXPECT_EQ(h.state(job), JobState::kStarting);
  EXPECT_EQ(h.sent<StartRank>().at(0).restore_step, 20);
  EXPECT_TRUE(std::any_of(h.events.begin(), h.events.end(), [](const JobEvent& event) {
    return event.reason.code == "checkpoint_missing";
  }));
}

TEST_F(CoreRecoveryTest, TheRestartBudgetEndsTheJobWithItsLastCause) {
  for (int i = 0; i < 5; ++i) {
    h.kill_rank(job, 2);
    recover();
    h.run(job);
    h.train(job, 21, 22);
  }
  EXPECT_EQ(h.record(job).restarts, 5);
  h.kill_rank(job, 3);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kFailed);
  EXPECT_EQ(h.record(job).reason.code, "restart_budget");
  EXPECT_NE(h.record(job).reason.message.find("rank 3"), std::string::npos);
}

TEST_F(CoreRecoveryTest, ResumingGivesANewBudget) {
  h.exit_rank(job, 1, ExitCode::kUsage);
  h.confirm_stops(job);
  ASSERT_TRUE(h.resume(job).status.ok());
  EXPECT_EQ(h.record(job).failures, 0);
  EXPECT_FALSE(h.record(job).last_failure.has_value());
}

TEST_F(CoreRecoveryTest, FailuresInARowWithoutAStepAreSpacedOut) {
  h.kill_rank(job, 2);
  h.confirm_stops(job);
  EXPECT_EQ(h.finds.size(), 1u) << "the first recovery does not wait";
  h.answer_find();
  h.spawn_ranks(job);
  h.kill_rank(job, 2);
  h.confirm_stops(job);
  EXPECT_TRUE(h.finds.empty()) << "the second waits";
  h.pass(milliseconds(1500));
  EXPECT_EQ(h.finds.size(), 1u);
}

TEST_F(CoreRecoveryTest, AFailureAfterTheFinalCheckpointIsASuccess) {
  h.train(job, 31, 100);
  h.checkpoint(job, 100);
  h.kill_rank(job, 2);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kSucceeded);
}

TEST_F(CoreRecoveryTest, CancellingDuringRecoveryWorks) {
  h.kill_rank(job, 2);
  EXPECT_TRUE(h.cancel(job).status.ok());
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kCancelled);
}

TEST_F(CoreRecoveryTest, ASilentWorkerIsLostAfterThreeBeatsAndItsJobRecovers) {
  h.workers.at("w1").alive = false;
  h.pass(seconds(3));
  EXPECT_EQ(h.state(job), JobState::kRunning);
  h.pass(seconds(1));
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_EQ(h.record(job).reason.code, "worker_lost");
  EXPECT_TRUE(h.has_event("worker_lost"));
  h.confirm_stops(job);  // w0's; the lost one cannot confirm
  h.answer_find();
  EXPECT_EQ(h.record(job).reason.code, "waiting_for_devices");
}

TEST_F(CoreRecoveryTest, TheJobGoesOnWhenASpareArrives) {
  lose("w1");
  h.confirm_stops(job);
  h.answer_find();
  h.add_worker("w2", 2);
  EXPECT_EQ(h.state(job), JobState::kStarting);
  h.run(job);
}

TEST_F(CoreRecoveryTest, ALostWorkerThatComesBackIsToldToStopWhatItStillRuns) {
  lose("w1");
  h.confirm_stops(job);
  h.answer_find();
  h.clear();
  h.heartbeat("w1");  // of a worker given up: asked to introduce itself
  ASSERT_EQ(h.sent<Registered>().size(), 1u);
  EXPECT_EQ(h.sent<Registered>()[0].worker, WorkerId{});
  EXPECT_TRUE(h.sent<Registered>()[0].refusal.empty());
  h.register_worker("w1");
  ASSERT_FALSE(h.sent<StopRanks>().empty());
  EXPECT_EQ(h.sent<StopRanks>()[0].epoch, Epoch{1});
  EXPECT_EQ(h.state(job), JobState::kRecovering) << "not before the old ranks are gone";
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kStarting);
}

TEST_F(CoreRecoveryTest, ALostWorkerThatComesBackGetsNothingNewBeforeItConfirmedItsStops) {
  lose("w1");
  h.cancel(job);
  h.confirm_stops(job);
  ASSERT_EQ(h.state(job), JobState::kCancelled);
  h.register_worker("w1");
  expect_nothing_new_before_stops("w1", 3);
}

// Seed 2000126 of the simulation found its devices given away.
TEST_F(CoreRecoveryTest, ALostWorkerGetsItsStopsAlsoFromARestartedCoordinator) {
  lose("w1");
  h.restart_coordinator();
  h.register_worker("w0");
  h.cancel(job);
  h.register_worker("w1");  // still runs its ranks
  h.say("w0", RanksStopped{job, Epoch{1}});
  EXPECT_EQ(h.state(job), JobState::kCancelled);
  expect_nothing_new_before_stops("w1", 4);
}

TEST_F(CoreRecoveryTest, AWorkerLostForGoodDoesNotKeepARestartedCoordinatorWaiting) {
  lose("w1");
  h.cancel(job);
  h.restart_coordinator();
  h.register_worker("w0");
  h.say("w0", RanksStopped{job, Epoch{1}});
  EXPECT_EQ(h.state(job), JobState::kCancelled);
}

TEST_F(CoreRecoveryTest, AJobWaitsForItsOldRanksAlsoWhenOtherWorkersHaveRoom) {
  lose("w1");
  h.confirm_stops(job);
  h.answer_find();
  h.register_worker("w1");
  h.clear();
  h.add_worker("w2", 4);
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_TRUE(h.sent<StartRank>().empty());
  h.say("w1", RanksStopped{job, Epoch{1}});
  EXPECT_EQ(h.state(job), JobState::kStarting);
}

TEST_F(CoreRecoveryTest, AnUnkindExitOfARankThatHadFinishedIsNoFailure) {
  h.checkpoint(job, 100);
  h.finish_ranks(job);
  h.exit_rank(job, 1, ExitCode::kFailure, "while closing its sockets");
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kSucceeded);
  EXPECT_FALSE(h.record(job).last_failure.has_value());
}

TEST_F(CoreRecoveryTest, ARankThatFinishedMayExitBeforeTheOthersHaveFinished) {
  h.say(h.host_of(job, 1), RankFinished{job, Epoch{1}, Rank{1}, 100});
  h.exit_rank(job, 1, ExitCode::kFailure, "while closing its sockets");
  EXPECT_EQ(h.state(job), JobState::kRunning);
}

TEST_F(CoreRecoveryTest, AFinalCheckpointFoundOnDiskEndsTheJob) {
  h.kill_rank(job, 2);
  h.confirm_stops(job);
  h.answer_find({job, {}, 100, "/state/checkpoints/1/100.manifest", {}, {}});
  EXPECT_EQ(h.state(job), JobState::kSucceeded);
}

TEST_F(CoreRecoveryTest, ARestartedDaemonMeansItsRanksAreGone) {
  h.restart_worker("w1");
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_EQ(h.record(job).reason.code, "worker_restarted");
  recover();
  EXPECT_EQ(h.state(job), JobState::kStarting);
}

TEST_F(CoreRecoveryTest, ARankThatVanishesWithoutAReportIsNoticed) {
  h.workers.at("w1").ranks.erase(h.workers.at("w1").ranks.begin());
  h.pass(seconds(4));
  EXPECT_EQ(h.record(job).last_failure->reason.code, "rank_missing");
}

TEST_F(CoreRecoveryTest, RanksThatNeverStartMakeTheJobRecover) {
  h.kill_rank(job, 0);
  recover();
  h.pass(seconds(61));
  EXPECT_EQ(h.record(job).last_failure->reason.code, "start_timeout");
}

TEST_F(CoreRecoveryTest, APauseOfTheCoordinatorItselfLosesNoWorker) {
  h.pass(seconds(1));
  h.jump(seconds(20));  // stopped, or swapped out; then the timer fires before the sockets are read
  h.feed(Tick{});
  h.pass(seconds(1));
  EXPECT_EQ(h.state(job), JobState::kRunning);
}

// ---- restart of the coordinator

TEST_F(CoreRecoveryTest, ARestartedCoordinatorAdoptsARunWithoutTouchingItsRanks) {
  h.restart_coordinator();
  EXPECT_EQ(h.state(job), JobState::kRunning);
  h.clear();
  h.register_worker("w0");
  h.register_worker("w1");
  h.pass(seconds(5));
  EXPECT_TRUE(h.sent<StopRanks>().empty());
  EXPECT_TRUE(h.sent<StartRank>().empty());
  h.train(job, 31, 32);
  EXPECT_EQ(h.record(job).last_step->step, 32);
  EXPECT_EQ(h.record(job).epoch, Epoch{1});
}

TEST_F(CoreRecoveryTest, ARestartOfTheWholeClusterDoesNotCountAsAFailureOfTheJob) {
  for (int i = 1; i <= 6; ++i) {  // more often than recovery.max_restarts allows failures
    h.restart_coordinator();
    h.restart_worker("w0");
    EXPECT_EQ(h.state(job), JobState::kRecovering);
    EXPECT_EQ(h.record(job).reason.code, "cluster_restarted");
    h.restart_worker("w1");
    if (h.finds.empty()) h.pass(seconds(1));
    h.answer_find();
    h.run(job);
    EXPECT_EQ(h.record(job).restarts, i);
    EXPECT_EQ(h.record(job).failures, 0);
  }
  h.restart_worker("w1");  // it alone is a failure
  EXPECT_EQ(h.record(job).failures, 1);
}

TEST_F(CoreRecoveryTest, ARestartedCoordinatorAsksUnknownWorkersToRegister) {
  h.restart_coordinator();
  h.clear();
  h.heartbeat("w0");
  ASSERT_EQ(h.sent<Registered>().size(), 1u);
  EXPECT_EQ(h.sent<Registered>()[0].worker, WorkerId{});
}

TEST_F(CoreRecoveryTest, WorkersKeepTheirIdsOverARestart) {
  const WorkerId before = h.record(job).placement[0].worker;
  const std::string name = h.host_of(job, 0);
  h.restart_coordinator();
  h.register_worker("w1");
  h.register_worker("w0");
  EXPECT_EQ(h.core().find_worker(before)->record.name, name);
  EXPECT_EQ(h.core().workers().size(), 2u);
}

TEST_F(CoreRecoveryTest, ARankThatDiedWhileTheCoordinatorWasAwayMeansRecovery) {
  h.restart_coordinator();
  h.workers.at("w1").ranks.erase(h.workers.at("w1").ranks.begin());
  h.register_worker("w0");
  h.register_worker("w1");
  h.pass(seconds(3));
  EXPECT_EQ(h.state(job), JobState::kRecovering);
}

TEST_F(CoreRecoveryTest, AWorkerThatDoesNotComeBackAfterARestartIsLostAfterTheGrace) {
  h.restart_coordinator();
  h.workers.at("w1").alive = false;
  h.register_worker("w0");
  h.pass(seconds(9));
  EXPECT_EQ(h.state(job), JobState::kRunning);
  h.pass(seconds(3));
  EXPECT_EQ(h.record(job).last_failure->reason.code, "worker_lost");
}

TEST_F(CoreRecoveryTest, OldRanksFoundAfterARestartAreStopped) {
  h.kill_rank(job, 2);
  recover();
  h.restart_coordinator();
  h.workers.at("w0").ranks[{job, Epoch{1}, Rank{0}}] = {job, Epoch{1}, Rank{0}};
  h.clear();
  h.register_worker("w0");
  ASSERT_EQ(h.sent<StopRanks>().size(), 1u);
  EXPECT_EQ(h.sent<StopRanks>()[0].epoch, Epoch{1});
}

TEST_F(CoreRecoveryTest, RanksOfAnUnknownJobAreStopped) {
  h.workers.at("w0").ranks[{JobId{77}, Epoch{3}, Rank{0}}] = {JobId{77}, Epoch{3}, Rank{0}};
  h.heartbeat("w0");
  ASSERT_EQ(h.sent<StopRanks>().size(), 1u);
  EXPECT_EQ(h.sent<StopRanks>()[0].job, JobId{77});
}

TEST_F(CoreRecoveryTest, AStopInProgressGoesOnAfterARestart) {
  h.cancel(job);
  h.restart_coordinator();
  EXPECT_EQ(h.state(job), JobState::kStopping);
  h.clear();
  h.register_worker("w0");
  h.register_worker("w1");
  EXPECT_EQ(h.sent<StopRanks>().size(), 2u);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kCancelled);
}

TEST_F(CoreRecoveryTest, ARecoveryInProgressGoesOnAfterARestart) {
  h.kill_rank(job, 2);
  h.restart_coordinator();
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  h.register_worker("w0");
  h.register_worker("w1");
  h.confirm_stops(job);
  h.answer_find();
  EXPECT_EQ(h.record(job).epoch, Epoch{2});
  EXPECT_EQ(h.state(job), JobState::kStarting);
}

TEST_F(CoreRecoveryTest, AJobThatWasStartingGoesOnAfterARestart) {
  h.kill_rank(job, 2);
  recover();
  h.restart_coordinator();
  h.register_worker("w0");
  h.register_worker("w1");
  h.clear();
  h.pass(seconds(3));
  EXPECT_EQ(h.sent<StartRank>().size(), 4u) << "the orders may have been lost with the coordinator";
  h.run(job);
}

TEST_F(CoreRecoveryTest, ABeginLostWithTheCoordinatorIsMadeUpFor) {
  h.restart_coordinator();
  for (auto& [name, worker] : h.workers) {
    for (auto& [key, status] : worker.ranks) status.state = RankState::kReady;
  }
  h.register_worker("w0");
  h.register_worker("w1");
  h.pass(seconds(3));
  EXPECT_EQ(h.sent<StartRank>().size(), 4u) << "asks the daemons to repeat the addresses";
  for (int32_t rank = 0; rank < 4; ++rank) h.ready(job, rank);
  h.clear();
  h.pass(seconds(2));
  EXPECT_EQ(h.sent<BeginTraining>().size(), 2u);
}

TEST_F(CoreRecoveryTest, ACheckpointRoundIsMadeUpForAfterARestart) {
  h.save_segment(job, 0, 40);
  h.restart_coordinator();
  h.register_worker("w0");
  h.register_worker("w1");
  h.checkpoint(job, 40);  // the daemons repeat what was not answered
  EXPECT_EQ(h.record(job).checkpoint->step, 40);
}

TEST_F(CoreRecoveryTest, EndedJobsEventsAndEvaluationsSurviveARestart) {
  h.say(h.host_of(job, 0), EvaluationReport{job, Epoch{1}, 20, 3.5, 2048});
  h.cancel(job);
  h.confirm_stops(job);
  const uint64_t events = h.core().last_event_sequence();
  h.restart_coordinator();
  EXPECT_EQ(h.state(job), JobState::kCancelled);
  EXPECT_EQ(h.core().last_event_sequence(), events + 1);  // "coordinator started"
  ASSERT_EQ(h.job(job).evaluations.size(), 1u);
  EXPECT_EQ(h.submit_ok(four_rank_spec("b")), (JobId{job.value + 1})) << "ids are never reused";
}

TEST_F(CoreRecoveryTest, ADamagedRecordStopsTheStartAndIsNamed) {
  StoredState stored;
  stored.records.push_back({job_key(JobId{1}), "{\"id\":1"});
  Coordinator core(CoreHarness::test_config());
  const auto started = core.start(h.now(), stored);
  ASSERT_FALSE(started.ok());
  EXPECT_EQ(started.status().code(), Code::kDataLoss);
  EXPECT_NE(started.status().message().find("job/0000000000000001"), std::string::npos);
}

TEST_F(CoreRecoveryTest, AJobWithoutItsSpecStopsTheStart) {
  StoredState stored;
  stored.records.push_back({job_key(job), h.store.at(job_key(job))});
  Coordinator core(CoreHarness::test_config());
  EXPECT_EQ(core.start(h.now(), stored).status().code(), Code::kDataLoss);
}

}  // namespace
}  // namespace penstock
