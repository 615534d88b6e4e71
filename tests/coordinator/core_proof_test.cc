// resume --prove: what was trained is trained again, and compared.
#include <gtest/gtest.h>

#include <cmath>

#include "coordinator/core/failure.h"
#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

// A job that was cancelled after step 50, with checkpoints of steps 20 and 40.
class CoreProofTest : public ::testing::Test {
 protected:
  void SetUp() override {
    h.add_worker("w0", 4);
    job = h.submit_ok(four_rank_spec());
    h.run(job);
    for (const int64_t step : {20, 40}) {
      h.train(job, step - 19, step);
      h.checkpoint(job, step);
    }
    h.train(job, 41, 50);
    h.cancel(job);
    h.confirm_stops(job);
    h.events.clear();
    h.finds.clear();
  }
  // Up to training again, from the checkpoint of step 20.
  void start_proof(int64_t steps = 25) {
    ASSERT_TRUE(h.resume(job, steps).status.ok());
    ASSERT_EQ(h.finds.size(), 1u);
    h.answer_find(found(20));
    h.run(job);
  }
  CheckpointFound found(int64_t step) const {
    CheckpointFound answer;
    answer.job = job;
    answer.step = step;
    answer.manifest = step > 0 ? "/c/" + std::to_string(step) + ".manifest" : "";
    answer.steps = {20, 40};
    return answer;
  }
  std::string message_of(const std::string& code) const {
    for (const JobEvent& event : h.events) {
      if (event.reason.code == code) return event.reason.message;
    }
    return {};
  }
  // The checkpoint of step 40 is saved again.
  void save_again(const std::string& difference = {}) {
    h.save_all(job, 40);
    ASSERT_TRUE(h.commits.back().compare);
    h.finish_commit({}, [&](CheckpointDone& done) {
      done.tensors_equal = 300;
      done.difference = difference;
    });
  }

  CoreHarness h;
  JobId job;
};

TEST_F(CoreProofTest, TheReplayBeginsWhereEnoughRecordedStepsFollow) {
  ASSERT_TRUE(h.resume(job, 25).status.ok());
  ASSERT_EQ(h.finds.size(), 1u);
  EXPECT_EQ(h.finds[0].steps_within, (std::pair<int64_t, int64_t>{0, 25}));
  h.answer_find(found(20));
  EXPECT_EQ(h.sent<StartRank>().back().restore_step, 20);
  EXPECT_EQ(message_of("proving"),
            "trains steps 21 to 50 again, from the checkpoint of step 20, and compares them with "
            "what is recorded");
  EXPECT_EQ(h.record(job).checkpoint->step, 40) << "what is committed stays so";
}

TEST_F(CoreProofTest, EqualStepsAndAnEqualCheckpointAreAProof) {
  start_proof();
  h.train(job, 21, 40);
  save_again();
  h.train(job, 41, 49);
  EXPECT_FALSE(h.has_event("proved"));
  EXPECT_EQ(h.record(job).proof->compared, 29);
  h.train(job, 50, 50);
  EXPECT_EQ(message_of("proved"),
            "steps 21 to 50 were trained again, and every loss and gradient norm is equal bit for "
            "bit; so are the digests of 300 tensors saved again");
  EXPECT_FALSE(h.record(job).proof.has_value());
  h.train(job, 51, 60);
  EXPECT_EQ(h.state(job), JobState::kRunning) << "and it goes on";
}

TEST_F(CoreProofTest, TheProofWaitsForTheCheckpointThatIsSavedAgain) {
  start_proof();
  h.train(job, 21, 50);
  EXPECT_FALSE(h.has_event("proved"));
  save_again();
  EXPECT_TRUE(h.has_event("proved"));
}

TEST_F(CoreProofTest, AReplayThatIsNotProvedLeavesTheNewestCheckpointOfBefore) {
  const std::string before = h.record(job).checkpoint->manifest;
  for (const bool cancelled : {false, true}) {
    start_proof();
    h.train(job, 21, 40);
    save_again();
    EXPECT_FALSE(h.has_event("checkpoint_committed"));
    h.train(job, 41, 49);
    if (cancelled) {
      h.cancel(job);
    } else {
      h.train(job, 50, 50, [](StepReport& report) { report.loss = 9.0; });
    }
    h.confirm_stops(job);
    EXPECT_EQ(h.record(job).checkpoint->manifest, before);
    EXPECT_EQ(h.record(job).checkpoint->epoch, Epoch{1});
  }
  ASSERT_TRUE(h.resume(job).status.ok());
  EXPECT_FALSE(h.finds.back().steps_within.has_value());
  h.answer_find();
  EXPECT_EQ(h.sent<StartRank>().back().restore_manifest, before);
}

TEST_F(CoreProofTest, WhatIsSavedAfterTheRecordedStepsIsCommittedOnceTheyAreProved) {
  start_proof();
  h.train(job, 21, 40);
  h.save_all(job, 40);
  h.train(job, 41, 80);
  h.save_all(job, 60);
  h.save_all(job, 80);
  ASSERT_EQ(h.commits.size(), 1u) << "nothing is committed before";
  h.finish_commit({}, [](CheckpointDone& done) { done.tensors_equal = 300; });
  EXPECT_TRUE(h.has_event("proved"));
  ASSERT_EQ(h.commits.size(), 1u);
  EXPECT_EQ(h.commits[0].step, 80);
  EXPECT_FALSE(h.commits[0].compare);
  h.clear();
  h.finish_commit();
  EXPECT_EQ(h.record(job).checkpoint->step, 80);
  const auto outcomes = h.sent<CheckpointOutcome>();
  ASSERT_EQ(outcomes.size(), 2u);
  EXPECT_TRUE(outcomes[1].step == 60 ? outcomes[0].committed : outcomes[1].committed);
}

TEST_F(CoreProofTest, WhatIsComparedAfterARankHasFailedDecidesNothing) {
  start_proof();
  h.train(job, 21, 40);
  h.save_all(job, 40);
  h.kill_rank(job, 1);
  h.finish_commit({}, [](CheckpointDone& done) { done.difference = "another lm_head.weight"; });
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  h.answer_find(found(20));
  h.pass(std::chrono::seconds(2));
  h.run(job);
  ASSERT_TRUE(h.record(job).proof.has_value());
  h.train(job, 21, 40);
  save_again("another lm_head.weight");
  EXPECT_EQ(h.record(job).last_failure->reason.code, kCauseNotReproduced);
}

TEST_F(CoreProofTest, ACheckpointThatWasLeftOutDoesNotHoldUpTheProof) {
  start_proof();
  h.train(job, 21, 60);
  h.save_all(job, 60);
  EXPECT_NE(message_of("proved").find("no checkpoint was saved again"), std::string::npos);
  ASSERT_EQ(h.commits.size(), 1u);
  EXPECT_FALSE(h.commits[0].compare);
}

TEST_F(CoreProofTest, RanksHearOfACheckpointThatWasComparedHoweverOftenTheySaySoThatItIsSaved) {
  start_proof();
  h.train(job, 21, 40);
  h.clear();
  save_again();
  h.save_segment(job, 3, 40);  // its daemon was away
  const auto outcomes = h.sent<CheckpointOutcome>();
  ASSERT_EQ(outcomes.size(), 2u);
  for (const CheckpointOutcome& outcome : outcomes) EXPECT_TRUE(outcome.committed);
  EXPECT_TRUE(h.commits.empty());
}

TEST_F(CoreProofTest, ACheckpointThatCannotBeSavedAgainDoesNotHoldUpTheProof) {
  start_proof();
  h.train(job, 21, 50);
  h.say("w0", SaveFailed{job, h.record(job).epoch, Rank{1}, 40, "disk full"});
  EXPECT_NE(message_of("proved").find("no checkpoint was saved again"), std::string::npos);
}

TEST_F(CoreProofTest, TheLastBitOfALossFailsTheJobAndNamesTheStep) {
  start_proof();
  h.train(job, 21, 29);
  h.train(job, 30, 30, [](StepReport& report) { report.loss = std::nextafter(report.loss, 1e9); });
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kFailed);
  const Failure& failure = *h.record(job).last_failure;
  EXPECT_EQ(failure.reason.code, kCauseNotReproduced);
  EXPECT_EQ(failure.reason.message,
            "step 30, trained again from step 20, has another loss: 4.7000000000000011, not the "
            "4.7000000000000002 of epoch 1");
  EXPECT_FALSE(h.record(job).proof.has_value());
  ASSERT_TRUE(h.resume(job).status.ok()) << "without a proof it may go on";
  EXPECT_FALSE(h.finds.back().steps_within.has_value());
}

TEST_F(CoreProofTest, EveryFieldIsCompared) {
  const std::pair<const char*, std::function<void(StepReport&)>> changes[] = {
      {"gradient norm", [](StepReport& report) { report.grad_norm = 1e-300; }},
      {"learning rate", [](StepReport& report) { report.learning_rate = -0.0; }},
      {"prediction loss", [](StepReport& report) { report.mtp_loss = 1.0; }},
      {"balance loss", [](StepReport& report) { report.balance_loss = 1.0; }},
      {"1023 tokens, not the 1024", [](StepReport& report) { report.tokens = 1023; }}};
  for (const auto& [words, change] : changes) {
    start_proof();
    h.train(job, 21, 21, change);
    h.confirm_stops(job);
    EXPECT_EQ(h.state(job), JobState::kFailed);
    EXPECT_NE(h.record(job).last_failure->reason.message.find(words), std::string::npos) << words;
  }
}

TEST_F(CoreProofTest, WhatAReplayRecordedThatFailedOrWasCancelledMeasuresNoOther) {
  const auto worse = [](StepReport& report) { report.loss = 9.0; };
  for (const bool cancelled : {false, true}) {
    // Of a step that is not recorded nothing can be compared, and the replay goes on.
    if (cancelled) h.store.erase(record_of(StepRecord{.job = job, .epoch = {1}, .step = 21}).key);
    start_proof();
    h.train(job, 21, 21, worse);
    EXPECT_EQ(h.state(job), cancelled ? JobState::kRunning : JobState::kStopping);
    if (cancelled) h.cancel(job);
    h.confirm_stops(job);
  }
  start_proof();
  EXPECT_FALSE(h.job(job).recorded.contains(21));
  h.train(job, 21, 40);
  save_again();
  h.train(job, 41, 50);
  EXPECT_NE(message_of("proved").find("equal bit for bit, but for 1 step"), std::string::npos)
      << message_of("proved");
}

TEST_F(CoreProofTest, StepsBeyondTheRecordedOnesOfAFailedReplayHaveNotHappened) {
  start_proof();
  h.train(job, 21, 55);  // while the checkpoint of step 40 is compared
  EXPECT_EQ(h.record(job).highest_step, 55);
  save_again("another lm_head.weight");
  h.confirm_stops(job);
  EXPECT_EQ(h.record(job).highest_step, 50);
  start_proof();
  EXPECT_EQ(h.record(job).proof->through, 50);
}

TEST_F(CoreProofTest, StepsThatAreReportedBeforeTheirRecordsAreReadAreComparedThen) {
  h.answers_reads = false;
  start_proof();
  h.train(job, 21, 40);
  save_again();
  h.train(job, 41, 49);
  h.train(job, 50, 50, [](StepReport& report) { report.loss = 9.0; });
  EXPECT_EQ(h.state(job), JobState::kRunning);
  EXPECT_FALSE(h.has_event("proved"));
  h.answers_reads = true;
  h.answer_reads();
  EXPECT_EQ(h.state(job), JobState::kStopping);
  EXPECT_EQ(h.record(job).last_failure->reason.message.find("step 50, "), 0u);
}

TEST_F(CoreProofTest, RecordsAreReadInPiecesUntilEveryOneIsThere) {
  JobSpec spec = flat_spec("long", 4);
  spec.training.steps = 5000;
  job = h.submit_ok(spec);
  h.run(job);
  h.train(job, 1, 1234);
  h.cancel(job);
  h.confirm_stops(job);
  h.answers_reads = false;
  ASSERT_TRUE(h.resume(job, 1234).status.ok());
  CheckpointFound nothing = found(0);
  nothing.steps.clear();
  h.answer_find(nothing);
  h.run(job);
  for (int64_t next = 1; next <= 1234;) {
    ASSERT_EQ(h.reads.size(), 1u);
    const ReadSteps read = std::exchange(h.reads, {}).front();
    EXPECT_EQ(read.first, next);
    EXPECT_LE(read.last - read.first, 500);
    EXPECT_EQ(h.job(job).recorded.size(), static_cast<size_t>(next - 1));
    MemoryStore records;
    records.map = h.store;
    const StepsRead piece = read_steps(records, read);
    h.feed(piece);
    next = read.last + 1;
    h.feed(piece);  // of a replay before this one
  }
  EXPECT_TRUE(h.reads.empty());
  EXPECT_EQ(h.job(job).recorded.size(), 1234u);
  h.train(job, 1, 1234);
  EXPECT_TRUE(h.has_event("proved"));
}

TEST_F(CoreProofTest, AnotherDigestFailsTheJobAndNamesTheTensor) {
  start_proof();
  h.train(job, 21, 40);
  save_again("another lm_head.weight, the first of 2 tensors that differ");
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kFailed);
  EXPECT_EQ(h.record(job).last_failure->reason.message,
            "the checkpoint of step 40, saved again, has another lm_head.weight, the first of 2 "
            "tensors that differ");
}

TEST_F(CoreProofTest, ANewCoordinatorGoesOnComparing) {
  start_proof();
  h.train(job, 21, 40);
  save_again();
  h.restart_coordinator();
  h.register_worker("w0");
  for (int32_t rank = 0; rank < 4; ++rank) h.ready(job, rank);
  EXPECT_EQ(h.record(job).proof->saved_again, 40);
  h.train(job, 41, 41, [](StepReport& report) { report.grad_norm = 7.0; });
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kFailed);
  EXPECT_NE(h.record(job).last_failure->reason.message.find("step 41"), std::string::npos);
}

// As in SetUp(), with checkpoints of steps 10 and 30 that no fixed interval would save again.
TEST_F(CoreProofTest, WithAChosenIntervalTheNewestRecordedCheckpointIsSavedAgain) {
  JobSpec spec = flat_spec("automatic", 4);
  spec.training.steps = 100'000;
  spec.checkpoint.interval = 0;
  spec.checkpoint.automatic = true;
  job = h.submit_ok(spec);
  h.run(job);
  for (const int64_t step : {10, 20, 30}) {
    h.train(job, step - 9, step);
    h.checkpoint(job, step);
  }
  h.train(job, 31, 50);
  h.cancel(job);
  h.confirm_stops(job);
  h.clear();
  ASSERT_TRUE(h.resume(job, 35).status.ok());
  CheckpointFound answer = found(10);
  answer.steps = {10, 20, 30};
  h.answer_find(answer);
  for (const StartRank& start : h.sent<StartRank>()) EXPECT_EQ(start.save_interval, 20);
  h.run(job);
  h.train(job, 11, 30);
  for (const SaveInterval& told : h.sent<SaveInterval>()) EXPECT_EQ(told.steps, 20);
  h.clear();
  h.save_all(job, 30);
  ASSERT_TRUE(h.commits.back().compare);
  h.finish_commit({}, [](CheckpointDone& done) { done.tensors_equal = 7; });
  ASSERT_FALSE(h.sent<SaveInterval>().empty());
  EXPECT_EQ(h.sent<SaveInterval>().back().steps, 20);
  h.train(job, 31, 50);
  EXPECT_NE(message_of("proved").find("so are the digests of 7 tensors"), std::string::npos);
  EXPECT_EQ(h.sent<SaveInterval>().back().steps, h.record(job).saving->choice.steps);
  EXPECT_NE(h.record(job).saving->choice.steps, 20) << "or this would show nothing";
}

TEST_F(CoreProofTest, AfterAFailureTheReplayBeginsAnewAndComparesWithTheFirstRecords) {
  start_proof();
  h.train(job, 21, 30);
  h.kill_rank(job, 1);
  h.confirm_stops(job);
  ASSERT_EQ(h.finds.size(), 1u);
  EXPECT_TRUE(h.finds[0].steps_within.has_value());
  h.answer_find(found(20));
  h.pass(std::chrono::seconds(2));
  h.run(job);
  for (const auto& [step, record] : h.job(job).recorded) EXPECT_EQ(record.epoch, Epoch{1}) << step;
  EXPECT_EQ(h.job(job).recorded.size(), 30u);
  EXPECT_EQ(h.record(job).proof->compared, 0);
}

TEST_F(CoreProofTest, WithoutACheckpointTheReplayBeginsAtInitialWeights) {
  job = h.submit_ok(four_rank_spec("unsaved"));
  h.run(job);
  h.train(job, 1, 10);
  h.cancel(job);
  h.confirm_stops(job);
  ASSERT_TRUE(h.resume(job, 10).status.ok());
  CheckpointFound nothing = found(0);
  nothing.steps.clear();
  h.answer_find(nothing);
  EXPECT_EQ(h.sent<StartRank>().back().restore_manifest, "");
  EXPECT_NE(message_of("proving").find("initial weights"), std::string::npos);
}

TEST_F(CoreProofTest, AnEmptyDirectoryIsNotTakenForARunThatWasNeverSaved) {
  ASSERT_TRUE(h.resume(job, 50).status.ok());
  CheckpointFound nothing = found(0);  // its file system is not mounted
  nothing.steps.clear();
  h.answer_find(nothing);
  EXPECT_EQ(h.state(job), JobState::kFailed);
  EXPECT_EQ(h.record(job).reason.code, "no_proof");
}

TEST_F(CoreProofTest, AFinalCheckpointFromBeforeTheReplayMakesNoSuccessOfAnotherOutcome) {
  ASSERT_TRUE(h.resume(job).status.ok());
  h.answer_find();
  h.run(job);
  h.train(job, 41, 100);
  h.checkpoint(job, 100);
  h.cancel(job);  // before the ranks have ended
  h.confirm_stops(job);
  ASSERT_EQ(h.state(job), JobState::kCancelled);
  h.events.clear();
  start_proof();
  h.kill_rank(job, 1);
  EXPECT_EQ(h.state(job), JobState::kRecovering) << "there is something to compare yet";
  h.confirm_stops(job);
  h.answer_find(found(20));
  h.pass(std::chrono::seconds(2));
  h.run(job);
  h.train(job, 21, 21, [](StepReport& report) { report.loss = 1.0; });
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kFailed);
  EXPECT_EQ(h.record(job).last_failure->reason.code, kCauseNotReproduced);
}

TEST_F(CoreProofTest, AReplayThatIsCutShortIsForgottenAndHoldsNoMemory) {
  start_proof();
  h.train(job, 21, 30);
  EXPECT_FALSE(h.job(job).recorded.empty());
  h.cancel(job);
  h.confirm_stops(job);
  EXPECT_FALSE(h.record(job).proof.has_value());
  EXPECT_TRUE(h.job(job).recorded.empty());
}

TEST_F(CoreProofTest, AReplayFromInitialWeightsDoesNotPushOutWhatWasSaved) {
  ASSERT_TRUE(h.resume(job, 35).status.ok());
  h.answer_find(found(0));  // those there are begin too late
  EXPECT_EQ(h.state(job), JobState::kFailed);
  EXPECT_EQ(h.record(job).reason.code, "no_proof");
  EXPECT_NE(h.record(job).reason.message.find("the oldest has 30"), std::string::npos)
      << h.record(job).reason.message;
  EXPECT_FALSE(h.record(job).proof.has_value());
}

TEST_F(CoreProofTest, MoreStepsThanAreRecordedAreRefused) {
  const Answer answer = h.resume(job, 51);
  EXPECT_EQ(answer.status.code(), Code::kFailedPrecondition);
  EXPECT_NE(answer.status.message().find("has 50 steps recorded"), std::string::npos)
      << answer.status.message();
  EXPECT_EQ(h.state(job), JobState::kCancelled);
  EXPECT_EQ(h.resume(job, 100'001).status.code(), Code::kInvalidArgument);
}

TEST_F(CoreProofTest, StepsWithoutARecordAreSaidAndNoneAtAllIsNoProof) {
  for (auto at = h.store.begin(); at != h.store.end();) {
    at = at->first.starts_with("step/") ? h.store.erase(at) : std::next(at);
  }
  start_proof();
  h.train(job, 21, 40);
  save_again();
  h.train(job, 41, 50);
  h.confirm_stops(job);
  EXPECT_EQ(h.state(job), JobState::kFailed);
  EXPECT_NE(h.record(job).last_failure->reason.message.find("nothing is recorded"),
            std::string::npos);
}

}  // namespace
}  // namespace penstock
