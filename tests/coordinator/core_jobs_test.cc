// A job's life without failures: submission, placement, running, saving, ending, cancelling,
// resuming.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

class CoreJobsTest : public ::testing::Test {
 protected:
  // It has trained 50 steps and saved step 40.
  JobId cancelled_after_checkpoint() {
    h.add_worker("w0", 4);
    const JobId job = h.submit_ok(four_rank_spec());
    h.run(job);
    h.train(job, 1, 50);
    h.checkpoint(job, 40);
    h.cancel(job);
    h.confirm_stops(job);
    return job;
  }

  CoreHarness h;
};

TEST_F(CoreJobsTest, AWholeLifePassesEveryStateInOrder) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.train(job, 1, 100);
  h.checkpoint(job, 100);
  h.finish_ranks(job);
  h.confirm_stops(job);
  EXPECT_EQ(h.path(job), "QUEUED>PLACING>STARTING>LOADING>RUNNING>STOPPING>SUCCEEDED");
  EXPECT_TRUE(h.record(job).started.has_value());
  EXPECT_TRUE(h.record(job).finished.has_value());
}

TEST_F(CoreJobsTest, AnAcceptedJobIsStoredBeforeItIsAnswered) {
  h.add_worker("w0", 4);
  const Answer answer = h.submit(four_rank_spec());
  ASSERT_TRUE(answer.status.ok());
  EXPECT_TRUE(h.store.contains(job_key(answer.job)));
  EXPECT_EQ(parse_job_spec(h.store.at(spec_key(answer.job)), "stored").value(), four_rank_spec());
}

TEST_F(CoreJobsTest, AJobBiggerThanTheClusterIsRefusedWithTheRule) {
  h.add_worker("w0", 3);
  const Answer answer = h.submit(four_rank_spec());
  EXPECT_EQ(answer.status.code(), Code::kInvalidArgument);
  EXPECT_NE(answer.status.message().find("pipeline 2 x expert 2 x data 1 = 4 ranks"),
            std::string::npos);
  EXPECT_NE(answer.status.message().find("the cluster has 3 devices on 1 known worker;"),
            std::string::npos);
  EXPECT_TRUE(h.core().jobs().empty());
}

TEST_F(CoreJobsTest, ANameInUseIsAConflict) {
  h.add_worker("w0", 8);
  h.submit_ok(four_rank_spec("a"));
  EXPECT_EQ(h.submit(four_rank_spec("a")).status.code(), Code::kAlreadyExists);
}

TEST_F(CoreJobsTest, TheNameOfAnEndedJobMayBeUsedAgainAndMeansTheNewest) {
  h.add_worker("w0", 4);
  const JobId first = h.submit_ok(four_rank_spec("a"));
  h.cancel(first);
  h.confirm_stops(first);
  const JobId second = h.submit_ok(four_rank_spec("a"));
  EXPECT_NE(first, second);
  EXPECT_EQ(h.core().find_job("a")->record.id, second);
  EXPECT_EQ(h.core().find_job(std::to_string(first.value))->record.id, first);
}

TEST_F(CoreJobsTest, TheCheckpointDirectoryOfAnotherJobIsAConflict) {
  h.add_worker("w0", 4);
  JobSpec spec = four_rank_spec();
  spec.checkpoint.dir = "/mine";
  const JobId job = h.submit_ok(spec);
  spec.name = "other";
  const Answer beside = h.submit(spec);
  EXPECT_EQ(beside.status.code(), Code::kAlreadyExists);
  EXPECT_NE(beside.status.message().find("/mine"), std::string::npos);
  h.cancel(job, 0);
  h.confirm_stops(job);
  ASSERT_TRUE(is_final(h.state(job)));
  const JobId second = h.submit_ok(spec);  // the first has saved nothing there
  h.run(second);
  h.train(second, 1, 20);
  h.checkpoint(second, 20);
  h.cancel(second, 0);
  h.confirm_stops(second);
  spec.name = "third";
  EXPECT_EQ(h.submit(spec).status.code(), Code::kAlreadyExists);
  EXPECT_EQ(h.resume(job).status.code(), Code::kAlreadyExists);
  EXPECT_TRUE(h.resume(second).status.ok()) << "its own directory is nobody else's";
}

// A job of 4 ranks that was cancelled after step 30, with a checkpoint of step 20.
class CoreRelayoutTest : public CoreJobsTest {
 protected:
  void SetUp() override {
    h.add_worker("w0", 8);
    JobSpec spec = four_rank_spec();
    spec.parallelism.microbatches = 8;
    job = h.submit_ok(spec);
    h.run(job);
    h.train(job, 1, 20);
    h.checkpoint(job, 20);
    h.train(job, 21, 30);
    h.cancel(job);
    h.confirm_stops(job);
    h.clear();
    next = h.job(job).spec;
  }
  // As many sequences a step on twice as many ranks.
  void use_eight_ranks() {
    next.parallelism.schedule = Schedule::kOneForwardOneBackward;
    next.parallelism.data *= 2;
    next.parallelism.microbatches /= 2;
  }

  JobId job;
  JobSpec next;
};

TEST_F(CoreRelayoutTest, AJobGoesOnInAnotherLayoutFromItsCheckpoint) {
  use_eight_ranks();
  const Answer answer = h.resume(job, 0, next);
  ASSERT_TRUE(answer.status.ok()) << answer.status.to_string();
  CheckpointFound found;
  found.job = job;
  found.step = 20;
  found.manifest = "/c/20.manifest";
  h.answer_find(found);
  const auto starts = h.sent<StartRank>();
  ASSERT_EQ(starts.size(), 8u);
  for (const StartRank& start : starts) {
    EXPECT_EQ(start.restore_step, 20);
    EXPECT_EQ(start.spec_json, to_json(next));
  }
  h.run(job);
  h.train(job, 21, 30);
  EXPECT_EQ(h.state(job), JobState::kRunning);
  h.save_all(job, 40);
  EXPECT_EQ(h.commits.back().layout.find("pipeline 2, data 2, expert 2"), 0u)
      << h.commits.back().layout;
  h.restart_coordinator();
  EXPECT_EQ(h.job(job).spec, next);
}

TEST_F(CoreRelayoutTest, StepsOfTheOtherLayoutCannotBeProved) {
  use_eight_ranks();
  EXPECT_EQ(h.resume(job, 10, next).status.code(), Code::kInvalidArgument);
  ASSERT_TRUE(h.resume(job, 0, next).status.ok());
  h.answer_find();
  h.run(job);
  h.cancel(job);
  h.confirm_stops(job);
  const Answer answer = h.resume(job, 10);
  EXPECT_EQ(answer.status.code(), Code::kFailedPrecondition);
  EXPECT_NE(answer.status.message().find("the layout changed at step 30"), std::string::npos)
      << answer.status.message();
}

TEST_F(CoreRelayoutTest, WhatIsComputedMustStayAndNothingChangesOtherwise) {
  const std::pair<const char*, std::function<void(JobSpec&)>> changes[] = {
      {"metadata.name is not", [](JobSpec& spec) { spec.name = "other"; }},
      {"model is not", [](JobSpec& spec) { ++spec.model.vocab_size; }},
      {"data is not", [](JobSpec& spec) { spec.data.seq_length *= 2; }},
      {"optimizer is not", [](JobSpec& spec) { spec.optimizer.lr *= 2; }},
      {"training is not", [](JobSpec& spec) { spec.training.seed += 1; }},
      {"checkpoint.dir is not", [](JobSpec& spec) { spec.checkpoint.dir = "/elsewhere"; }},
      {"checkpoint.init_from is not", [](JobSpec& spec) { spec.checkpoint.init_from = "/hf"; }},
      {"parallelism gives step 1", [](JobSpec& spec) { spec.parallelism.micro_batch_size *= 2; }},
      {"parallelism gives step 50",
       [](JobSpec& spec) {
         spec.parallelism.microbatch_levels = {{50, spec.parallelism.microbatches * 2}};
       }},
      {"16 ranks", [](JobSpec& spec) {
         spec.parallelism.schedule = Schedule::kOneForwardOneBackward;
         spec.parallelism.data *= 4;
         spec.parallelism.microbatches /= 4;
       }}};
  const JobSpec before = next;
  for (const auto& [words, change] : changes) {
    next = before;
    change(next);
    const Answer answer = h.resume(job, 0, next);
    EXPECT_EQ(answer.status.code(), Code::kInvalidArgument) << words;
    EXPECT_NE(answer.status.message().find(words), std::string::npos)
        << words << " in " << answer.status.message();
    EXPECT_EQ(h.state(job), JobState::kCancelled);
    EXPECT_EQ(h.job(job).spec, before);
  }
}

TEST_F(CoreRelayoutTest, WhenCheckpointsAreSavedMayChangeAndTheLayoutStays) {
  next.checkpoint.interval = 0;
  next.checkpoint.automatic = true;
  next.recovery.max_restarts = 9;
  ASSERT_TRUE(h.resume(job, 0, next).status.ok());
  EXPECT_TRUE(h.record(job).saving.has_value());
  EXPECT_EQ(h.record(job).rebalanced_step, 0) << "the recorded steps may still be proved";
}

TEST_F(CoreJobsTest, AJobWithoutANameGetsOneFromItsId) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec(""));
  EXPECT_EQ(h.record(job).name, "job-1");
}

TEST_F(CoreJobsTest, EveryRankGetsOneStartOrderWithItsProgramAndDevice) {
  h.add_worker("w0", 2);
  h.add_worker("w1", 2);
  const JobId job = h.submit_ok(four_rank_spec());
  const auto orders = h.sent<StartRank>();
  ASSERT_EQ(orders.size(), 4u);
  for (int32_t rank = 0; rank < 4; ++rank) {
    EXPECT_EQ(orders[rank].rank, Rank{rank});
    EXPECT_EQ(orders[rank].epoch, Epoch{1});
    EXPECT_EQ(orders[rank].program.pipeline_index, rank / 2);
    EXPECT_FALSE(orders[rank].program.training.empty());
    EXPECT_EQ(orders[rank].checkpoint_dir, "/state/checkpoints/1");
    EXPECT_TRUE(orders[rank].restore_manifest.empty());
    EXPECT_EQ(orders[rank].first_unreported_step, 1);
  }
  EXPECT_EQ(h.host_of(job, 0), h.host_of(job, 1));
  EXPECT_EQ(h.host_of(job, 2), h.host_of(job, 3));
  EXPECT_NE(h.host_of(job, 0), h.host_of(job, 2));
}

TEST_F(CoreJobsTest, TwoJobsNeverShareADevice) {
  h.add_worker("w0", 8);
  const JobId a = h.submit_ok(four_rank_spec("a"));
  const JobId b = h.submit_ok(four_rank_spec("b"));
  std::set<int32_t> devices;
  for (const JobId job : {a, b}) {
    for (const RankPlacement& at : h.record(job).placement) {
      EXPECT_TRUE(devices.insert(at.device).second) << at.device;
    }
  }
  EXPECT_EQ(devices.size(), 8u);
}

TEST_F(CoreJobsTest, AJobThatDoesNotFitNowWaitsAndSaysForWhat) {
  h.add_worker("w0", 6);
  h.submit_ok(four_rank_spec("a"));
  const JobId b = h.submit_ok(four_rank_spec("b"));
  EXPECT_EQ(h.state(b), JobState::kQueued);
  EXPECT_EQ(h.record(b).reason.code, "waiting_for_devices");
  EXPECT_EQ(h.record(b).reason.message,
            "needs 4 devices; of the 6 devices on workers that are up, 2 are free");
  EXPECT_TRUE(h.record(b).placement.empty());
}

TEST_F(CoreJobsTest, TheQueueIsServedInOrderOfSubmission) {
  h.add_worker("w0", 6);
  const JobId a = h.submit_ok(four_rank_spec("a"));
  const JobId big = h.submit_ok(flat_spec("big", 6));
  const JobId small = h.submit_ok(flat_spec("small", 1));
  EXPECT_EQ(h.record(small).reason.code, "waiting_in_queue");
  h.cancel(a);
  h.confirm_stops(a);
  EXPECT_EQ(h.state(big), JobState::kStarting);
  EXPECT_EQ(h.state(small), JobState::kQueued);
}

TEST_F(CoreJobsTest, AJobTooBigForTheWorkersThatAreUpDoesNotBlockTheQueue) {
  h.add_worker("w0", 2);
  h.add_worker("w1", 2);
  h.workers.at("w1").alive = false;
  h.pass(std::chrono::seconds(5));
  const JobId big = h.submit_ok(four_rank_spec("big"));
  const JobId small = h.submit_ok(flat_spec("small", 2));
  EXPECT_EQ(h.state(big), JobState::kQueued);
  EXPECT_EQ(h.state(small), JobState::kStarting);
}

TEST_F(CoreJobsTest, TrainingBeginsOnlyWhenEveryRankIsReady) {
  h.add_worker("w0", 2);
  h.add_worker("w1", 2);
  const JobId job = h.submit_ok(four_rank_spec());
  h.spawn_ranks(job);
  EXPECT_EQ(h.state(job), JobState::kLoading);
  for (const int32_t rank : {3, 1, 0}) h.ready(job, rank);
  EXPECT_TRUE(h.sent<BeginTraining>().empty());
  h.ready(job, 2);
  const auto begins = h.sent<BeginTraining>();
  ASSERT_EQ(begins.size(), 2u);  // one for each worker
  EXPECT_EQ(begins[0].addresses, (std::vector<std::string>{"addr0", "addr1", "addr2", "addr3"}));
  EXPECT_EQ(h.state(job), JobState::kRunning);
}

TEST_F(CoreJobsTest, ReadinessReportedTwiceBeginsOnce) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.spawn_ranks(job);
  for (const int32_t rank : {0, 0, 1, 1, 2, 2, 3, 3}) h.ready(job, rank);
  EXPECT_EQ(h.sent<BeginTraining>().size(), 1u);
}

TEST_F(CoreJobsTest, ALostStartOrderIsRepeatedUntilTheRankShows) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.clear();
  h.pass(std::chrono::seconds(3));
  EXPECT_EQ(h.sent<StartRank>().size(), 4u);
  h.spawn_ranks(job);
  h.clear();
  h.pass(std::chrono::seconds(5));
  EXPECT_TRUE(h.sent<StartRank>().empty());
}

TEST_F(CoreJobsTest, ALostBeginOrderIsRepeatedToTheWorkerWhoseRanksStillWait) {
  h.add_worker("w0", 2);
  h.add_worker("w1", 2);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  for (auto& [key, status] : h.workers.at("w1").ranks) status.state = RankState::kReady;
  h.clear();
  h.pass(std::chrono::seconds(4));
  ASSERT_FALSE(h.sent<BeginTraining>().empty());
  for (const OutgoingMessage& out : h.messages) {
    if (std::holds_alternative<BeginTraining>(out.message)) {
      EXPECT_EQ(out.peer, "peer-w1");
    }
  }
}

TEST_F(CoreJobsTest, StepsAreRecordedOnceEachInOrder) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.train(job, 1, 3);
  h.train(job, 2, 3);  // repeated
  h.train(job, 4, 4);
  size_t stored = 0;
  for (const auto& [key, value] : h.store) stored += key.starts_with(step_prefix(job));
  EXPECT_EQ(stored, 4u);
  EXPECT_EQ(h.record(job).last_step->step, 4);
  EXPECT_EQ(h.record(job).highest_step, 4);
  EXPECT_DOUBLE_EQ(h.job(job).tokens_per_second().value(), 2048.0);
  EXPECT_DOUBLE_EQ(h.job(job).eta_seconds().value(), 48.0);
}

TEST_F(CoreJobsTest, TheTimeLeftCountsTheMicrobatchesOfARamp) {
  h.add_worker("w0", 4);
  JobSpec spec = four_rank_spec();
  spec.parallelism.microbatch_levels = {{51, 8}};  // from 4
  const JobId job = h.submit_ok(spec);
  h.run(job);
  h.train(job, 1, 10);  // each 0.5 s
  EXPECT_DOUBLE_EQ(h.job(job).eta_seconds().value(), 40 * 0.5 + 50 * 1.0);
}

TEST_F(CoreJobsTest, AStepReportFromAWorkerWithoutRankZeroIsDropped) {
  h.add_worker("w0", 2);
  h.add_worker("w1", 2);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  StepReport report{.job = job, .epoch = Epoch{1}, .step = 1, .loss = 1.0};
  h.say(h.host_of(job, 2), report);
  EXPECT_FALSE(h.record(job).last_step.has_value());
}

TEST_F(CoreJobsTest, AStepBeyondTheTargetIsDropped) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.train(job, 101, 101);
  EXPECT_FALSE(h.record(job).last_step.has_value());
}

TEST_F(CoreJobsTest, EvaluationsAreKeptOncePerStepAndEpoch) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  const EvaluationReport report{job, Epoch{1}, 0, 5.5, 2048};
  h.say("w0", report);
  h.say("w0", report);
  ASSERT_EQ(h.job(job).evaluations.size(), 1u);
  EXPECT_EQ(h.job(job).evaluations[0].loss, 5.5);
}

TEST_F(CoreJobsTest, ACheckpointIsCommittedWhenTheLastRankHasSaved) {
  h.add_worker("w0", 4);
  JobSpec spec = four_rank_spec();
  spec.checkpoint.keep_every = 40;
  const JobId job = h.submit_ok(spec);
  h.run(job);
  for (const int32_t rank : {2, 0, 3, 3}) h.save_segment(job, rank, 20);
  EXPECT_TRUE(h.commits.empty());
  h.save_segment(job, 1, 20);
  ASSERT_EQ(h.commits.size(), 1u);
  EXPECT_EQ(h.commits[0].step, 20);
  EXPECT_EQ(h.commits[0].keep_last, 3);
  EXPECT_EQ(h.commits[0].keep_every, 40);
  ASSERT_EQ(h.commits[0].segments.size(), 4u);
  EXPECT_EQ(h.commits[0].segments[2].rank, Rank{2});
  EXPECT_FALSE(h.record(job).checkpoint.has_value());
  h.clear();
  h.finish_commit();
  EXPECT_EQ(h.record(job).checkpoint->step, 20);
  const auto outcomes = h.sent<CheckpointOutcome>();
  ASSERT_EQ(outcomes.size(), 1u);
  EXPECT_TRUE(outcomes[0].committed);
  EXPECT_TRUE(h.has_event("checkpoint_committed"));
}

TEST_F(CoreJobsTest, ARepeatedSegmentAfterTheCommitIsAnsweredAgain) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.checkpoint(job, 20);
  h.clear();
  h.save_segment(job, 1, 20);
  ASSERT_EQ(h.sent<CheckpointOutcome>().size(), 1u);
  EXPECT_TRUE(h.sent<CheckpointOutcome>()[0].committed);
  EXPECT_TRUE(h.commits.empty());
}

TEST_F(CoreJobsTest, AFailedSaveLeavesTheRunAndThePreviousCheckpoint) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.checkpoint(job, 20);
  h.save_segment(job, 0, 40);
  h.clear();
  h.say("w0",
        SaveFailed{job, Epoch{1}, Rank{1}, 40, "write e1-r1.segment: No space left on device"});
  ASSERT_EQ(h.sent<CheckpointOutcome>().size(), 1u);
  EXPECT_FALSE(h.sent<CheckpointOutcome>()[0].committed);
  EXPECT_EQ(h.events.back().reason.code, "checkpoint_failed");
  EXPECT_NE(h.events.back().reason.message.find("No space left on device"), std::string::npos);
  EXPECT_NE(h.events.back().reason.message.find("the one of step 20 stays"), std::string::npos);
  EXPECT_EQ(h.state(job), JobState::kRunning);
  EXPECT_EQ(h.record(job).checkpoint->step, 20);
  h.save_segment(job, 2, 40);  // late: told the same, and no commit follows
  EXPECT_FALSE(h.sent<CheckpointOutcome>().back().committed);
  EXPECT_TRUE(h.commits.empty());
}

TEST_F(CoreJobsTest, AFailedCommitIsReportedAndTheNextOneWorks) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.save_all(job, 20);
  h.finish_commit(data_loss("segment-1: footer damaged"));
  EXPECT_TRUE(h.has_event("checkpoint_failed"));
  EXPECT_FALSE(h.record(job).checkpoint.has_value());
  h.checkpoint(job, 40);
  EXPECT_EQ(h.record(job).checkpoint->step, 40);
}

TEST_F(CoreJobsTest, ARoundThatNeverCompletesIsGivenUp) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.save_segment(job, 0, 20);
  h.clear();
  h.pass(std::chrono::minutes(11));
  EXPECT_TRUE(h.has_event("checkpoint_failed"));
  EXPECT_EQ(h.state(job), JobState::kRunning);
}

TEST_F(CoreJobsTest, AnOlderCheckpointIsNeverCommittedAfterANewerOne) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  for (const int32_t rank : {0, 1, 2}) h.save_segment(job, rank, 20);
  h.checkpoint(job, 40);
  EXPECT_TRUE(h.job(job).rounds.empty()) << "the round of step 20 is overtaken";
  h.clear();
  h.save_all(job, 20);  // repeated after a reconnection, say
  EXPECT_TRUE(h.commits.empty());
  EXPECT_EQ(h.record(job).checkpoint->step, 40);
  ASSERT_EQ(h.sent<CheckpointOutcome>().size(), 4u);
  EXPECT_FALSE(h.sent<CheckpointOutcome>()[0].committed);
  EXPECT_NE(h.sent<CheckpointOutcome>()[0].reason.find("step 40"), std::string::npos);
}

TEST_F(CoreJobsTest, AnOlderCheckpointIsNotCommittedBesideANewerOneInProgress) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  for (const int32_t rank : {0, 1, 2}) h.save_segment(job, rank, 20);
  h.save_all(job, 40);
  h.save_segment(job, 3, 20);
  EXPECT_EQ(h.commits.size(), 1u);
  h.finish_commit();
  EXPECT_EQ(h.record(job).checkpoint->step, 40);
}

TEST_F(CoreJobsTest, SuccessWaitsForTheFinalCommit) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.train(job, 1, 100);
  h.save_all(job, 100);
  h.finish_ranks(job);
  EXPECT_EQ(h.state(job), JobState::kRunning);
  h.finish_commit();
  EXPECT_EQ(h.state(job), JobState::kStopping);
  EXPECT_EQ(h.record(job).outcome, JobState::kSucceeded);
}

TEST_F(CoreJobsTest, AJobWhoseFinalCheckpointFailedHasFailedAndCanBeResumed) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.checkpoint(job, 80);
  h.say("w0", SaveFailed{job, Epoch{1}, Rank{1}, 100, "No space left on device"});
  h.finish_ranks(job);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kFailed);
  EXPECT_EQ(h.record(job).reason.code, "final_checkpoint");
  EXPECT_NE(h.record(job).reason.message.find("No space left on device"), std::string::npos);
  EXPECT_TRUE(h.resume(job).status.ok());
}

TEST_F(CoreJobsTest, ACleanExitCountsAsFinished) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.checkpoint(job, 100);
  for (int32_t rank = 0; rank < 4; ++rank) h.exit_rank(job, rank, ExitCode::kOk);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kSucceeded);
}

TEST_F(CoreJobsTest, DevicesAreFreeOnlyWhenTheStopIsConfirmed) {
  h.add_worker("w0", 4);
  const JobId a = h.submit_ok(four_rank_spec("a"));
  h.run(a);
  const JobId b = h.submit_ok(four_rank_spec("b"));
  h.cancel(a);
  EXPECT_EQ(h.state(a), JobState::kStopping);
  EXPECT_EQ(h.state(b), JobState::kQueued);
  h.confirm_stops(a);
  EXPECT_EQ(h.state(a), JobState::kCancelled);
  EXPECT_EQ(h.state(b), JobState::kStarting);
}

TEST_F(CoreJobsTest, AQueuedJobIsCancelledAtOnce) {
  h.add_worker("w0", 4);
  h.submit_ok(four_rank_spec("a"));
  const JobId b = h.submit_ok(four_rank_spec("b"));
  EXPECT_TRUE(h.cancel(b).status.ok());
  EXPECT_EQ(h.path(b), "QUEUED>CANCELLED");
}

TEST_F(CoreJobsTest, CancellingStopsRanksWithTheGraceAsked) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.clear();
  h.cancel(job, 1234);
  ASSERT_EQ(h.sent<StopRanks>().size(), 1u);
  EXPECT_EQ(h.sent<StopRanks>()[0].grace_ms, 1234);
  EXPECT_EQ(h.sent<StopRanks>()[0].reason, "cancelled by the user");
}

TEST_F(CoreJobsTest, ASecondCancelWithLessGraceIsPassedOn) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.cancel(job, 60000);
  h.clear();
  EXPECT_TRUE(h.cancel(job, 0).status.ok());
  ASSERT_EQ(h.sent<StopRanks>().size(), 1u);
  EXPECT_EQ(h.sent<StopRanks>()[0].grace_ms, 0);
}

TEST_F(CoreJobsTest, ALostStopOrderIsRepeated) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.cancel(job);
  h.clear();
  h.pass(std::chrono::seconds(3));
  EXPECT_FALSE(h.sent<StopRanks>().empty());
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kCancelled);
}

TEST_F(CoreJobsTest, AnEndedJobCannotBeCancelled) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.cancel(job);
  h.confirm_stops(job);
  EXPECT_EQ(h.cancel(job).status.code(), Code::kFailedPrecondition);
}

TEST_F(CoreJobsTest, CommandsForAJobThatDoesNotExistSaySo) {
  EXPECT_EQ(h.cancel(JobId{7}).status.code(), Code::kNotFound);
  EXPECT_EQ(h.resume(JobId{7}).status.code(), Code::kNotFound);
}

TEST_F(CoreJobsTest, OnlyFailedOrCancelledJobsCanBeResumed) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  EXPECT_EQ(h.resume(job).status.code(), Code::kFailedPrecondition);
  h.run(job);
  EXPECT_EQ(h.resume(job).status.code(), Code::kFailedPrecondition);
  h.checkpoint(job, 100);
  h.finish_ranks(job);
  h.confirm_stops(job);
  ASSERT_EQ(h.state(job), JobState::kSucceeded);
  EXPECT_EQ(h.resume(job).status.code(), Code::kFailedPrecondition);
  EXPECT_EQ(h.scale(job, 1).status.message().find("penstock resume"), std::string::npos);
}

TEST_F(CoreJobsTest, AResumedJobStartsFromItsNewestCheckpointInANewEpoch) {
  const JobId job = cancelled_after_checkpoint();
  ASSERT_TRUE(h.resume(job).status.ok());
  EXPECT_EQ(h.state(job), JobState::kQueued);
  h.clear();
  h.answer_find();
  const auto orders = h.sent<StartRank>();
  ASSERT_EQ(orders.size(), 4u);
  EXPECT_EQ(orders[0].epoch, Epoch{2});
  EXPECT_EQ(orders[0].restore_manifest, "/state/checkpoints/1/40.manifest");
  EXPECT_EQ(orders[0].restore_step, 40);
  EXPECT_EQ(orders[0].first_unreported_step, 51);
  h.run(job);
  h.train(job, 41, 51);
  EXPECT_EQ(h.record(job).last_step->step, 51);
  EXPECT_FALSE(h.record(job).last_step->replayed);
}

TEST_F(CoreJobsTest, OfSearchesForACheckpointOnlyTheAnswerToTheNewestCounts) {
  const JobId job = cancelled_after_checkpoint();
  ASSERT_TRUE(h.resume(job).status.ok());
  ASSERT_EQ(h.finds.size(), 1u);
  h.cancel(job);
  ASSERT_TRUE(h.resume(job).status.ok());
  ASSERT_EQ(h.finds.size(), 2u);
  CheckpointFound old;
  old.job = job;
  old.number = h.finds[0].number;
  old.step = 20;
  old.manifest = "/c/20.manifest";
  h.feed(old);
  EXPECT_EQ(h.state(job), JobState::kQueued);
  h.answer_find();
  EXPECT_EQ(h.record(job).restore_step, 40);
}

TEST_F(CoreJobsTest, AFindThatComesAfterACancelChangesNothing) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.cancel(job);
  h.confirm_stops(job);
  h.resume(job);
  h.cancel(job);
  h.answer_find();
  EXPECT_EQ(h.state(job), JobState::kCancelled);
  h.resume(job);
  EXPECT_EQ(h.finds.size(), 1u);
}

TEST_F(CoreJobsTest, LogLinesAreKeptForRanksThatWorkerHosts) {
  h.add_worker("w0", 2);
  h.add_worker("w1", 2);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.say(h.host_of(job, 0), LogChunk{job, Epoch{1}, Rank{0}, 0, "hello\n"});
  h.say(h.host_of(job, 2), LogChunk{job, Epoch{1}, Rank{0}, 0, "forged\n"});
  h.say(h.host_of(job, 0), LogChunk{job, Epoch{9}, Rank{0}, 0, "from nowhere\n"});
  ASSERT_EQ(h.log_chunks.size(), 1u);
  EXPECT_EQ(h.log_chunks[0].text, "hello\n");
}

TEST_F(CoreJobsTest, EventsAreNumberedWithoutGaps) {
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.cancel(job);
  h.confirm_stops(job);
  for (size_t i = 1; i < h.events.size(); ++i) {
    EXPECT_EQ(h.events[i].sequence, h.events[i - 1].sequence + 1);
  }
}

}  // namespace
}  // namespace penstock
