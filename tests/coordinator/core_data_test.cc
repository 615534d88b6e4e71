// A job trains on the data that its first ranks found, and on no other.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

const std::vector<DataIdentity> kOld = {{"/c/train", 1000, {1, 1}}, {"/c/heldout", 10, {2, 2}}};
const std::vector<DataIdentity> kNew = {{"/c/train", 1000, {3, 3}}, {"/c/heldout", 10, {2, 2}}};

class CoreDataTest : public ::testing::Test {
 protected:
  CoreDataTest() {
    h.add_worker("w0", 2);
    h.add_worker("w1", 2);
    h.data = kOld;
    job = h.submit_ok(four_rank_spec());
  }
  // Up to a checkpoint; then a rank dies and the ranks of the next epoch are there.
  void train_and_recover() {
    h.run(job);
    h.train(job, 1, 30);
    h.checkpoint(job, 20);
    h.kill_rank(job, 2);
    h.confirm_stops(job);
    h.answer_find();
    ASSERT_EQ(h.state(job), JobState::kStarting);
    h.spawn_ranks(job);
  }
  // A resumed job finds its checkpoint and is placed.
  void resume() {
    ASSERT_TRUE(h.resume(job).status.ok());
    if (!h.finds.empty()) h.answer_find();
    ASSERT_EQ(h.state(job), JobState::kStarting);
  }
  void expect_failed_for_data(int32_t rank) {
    EXPECT_EQ(h.state(job), JobState::kStopping);
    h.confirm_stops(job);
    h.pass(std::chrono::minutes(1));
    EXPECT_EQ(h.state(job), JobState::kFailed) << "never retried";
    const Failure& failure = *h.record(job).last_failure;
    EXPECT_EQ(failure.reason.code, "data_changed");
    EXPECT_EQ(failure.rank, Rank{rank});
    EXPECT_TRUE(failure.fatal);
  }

  CoreHarness h;
  JobId job;
};

TEST_F(CoreDataTest, TheSameDataLetsEveryLaterStartTrain) {
  train_and_recover();
  h.run(job);
  EXPECT_EQ(h.job(job).data, kOld);
}

TEST_F(CoreDataTest, OtherDataAtALaterStartFailsTheJobAndSaysHowToGoOn) {
  train_and_recover();
  h.data = kNew;
  h.ready(job, 1);
  expect_failed_for_data(1);
  const std::string& message = h.record(job).last_failure->reason.message;
  const std::vector<std::string> words = {"/c/train.bin",
                                          "1000 tokens with digest " + to_hex({3, 3}),
                                          to_hex({1, 1}),
                                          "rank 1",
                                          h.record(job).last_failure->worker,
                                          "put the old files back and resume",
                                          "checkpoint.init_from"};
  for (const std::string& word : words) {
    EXPECT_NE(message.find(word), std::string::npos) << word << " in: " << message;
  }
}

TEST_F(CoreDataTest, TheOldDataPutBackLetsAResumedJobGoOn) {
  train_and_recover();
  h.data = kNew;
  h.ready(job, 0);
  expect_failed_for_data(0);
  h.data = kOld;
  resume();
  h.run(job);
}

TEST_F(CoreDataTest, AResumeWithTheNewDataStillFails) {
  train_and_recover();
  h.data = kNew;
  h.ready(job, 0);
  expect_failed_for_data(0);
  resume();
  h.spawn_ranks(job);
  h.ready(job, 3);
  expect_failed_for_data(3);
}

TEST_F(CoreDataTest, ARestartedCoordinatorKnowsTheData) {
  h.run(job);
  h.restart_coordinator();
  EXPECT_EQ(h.job(job).data, kOld);
}

TEST_F(CoreDataTest, RanksOfTheFirstStartThatDisagreeFailTheJob) {
  h.spawn_ranks(job);
  h.ready(job, 0);
  h.data = kNew;
  h.ready(job, 3);
  expect_failed_for_data(3);
}

TEST_F(CoreDataTest, AJobThatNeverTrainedMayFindOtherDataWhenItIsResumed) {
  h.spawn_ranks(job);
  h.ready(job, 0);
  h.exit_rank(job, 1, ExitCode::kNotFound, "no such file");
  h.confirm_stops(job);
  ASSERT_EQ(h.state(job), JobState::kFailed);
  h.data = kNew;
  resume();
  h.restart_coordinator();
  h.register_worker("w0");
  h.register_worker("w1");
  h.run(job);
  EXPECT_EQ(h.job(job).data, kNew);
}

TEST_F(CoreDataTest, ANumberOfDataSetsThatIsNotTheSpecsFailsTheJob) {
  h.spawn_ranks(job);
  h.ready(job, 0);
  h.data.pop_back();
  h.ready(job, 3);
  expect_failed_for_data(3);
}

TEST_F(CoreDataTest, AWorkerOfBeforeDataWasNamedIsTakenAsItIs) {
  h.data.clear();
  h.run(job);
  EXPECT_TRUE(h.job(job).data.empty());
  h.kill_rank(job, 2);
  h.confirm_stops(job);
  h.answer_find();
  h.data = kOld;
  h.run(job);
  EXPECT_EQ(h.job(job).data, kOld);
}

}  // namespace
}  // namespace penstock
