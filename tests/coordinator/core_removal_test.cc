// Forgetting jobs that have ended.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

class CoreRemovalTest : public ::testing::Test {
 protected:
  void SetUp() override {
    h.add_worker("w0", 4);
    job = h.submit_ok(four_rank_spec());
    h.run(job);
    h.train(job, 1, 20);
    h.checkpoint(job, 20);
  }
  void end() {
    h.cancel(job);
    h.confirm_stops(job);
  }

  CoreHarness h;
  JobId job;
};

TEST_F(CoreRemovalTest, NothingIsLeftOfARemovedJobButItsLinesInTheListOfAllEvents) {
  end();
  const Answer answer = h.remove(job);
  EXPECT_TRUE(answer.status.ok()) << answer.status.to_string();
  EXPECT_EQ(answer.job, job);
  EXPECT_EQ(h.core().find_job(job), nullptr);
  EXPECT_EQ(h.core().find_job("tiny"), nullptr);
  bool listed = false;
  for (const auto& [key, value] : h.store) {
    for (const std::string& prefix : prefixes_of(job)) EXPECT_FALSE(key.starts_with(prefix)) << key;
    listed = listed || (key.starts_with(kEventPrefix) && decode_event(value)->job == job);
  }
  EXPECT_TRUE(listed);
  EXPECT_TRUE(h.has_event("job_removed"));
  EXPECT_TRUE(h.removals.empty()) << "its checkpoints were not asked for";
}

TEST_F(CoreRemovalTest, AJobThatHasNotEndedStays) {
  const Answer answer = h.remove(job);
  EXPECT_EQ(answer.status.code(), Code::kFailedPrecondition);
  EXPECT_NE(answer.status.message().find("is RUNNING; cancel it first"), std::string::npos);
  EXPECT_EQ(h.state(job), JobState::kRunning);
  EXPECT_EQ(h.remove(JobId{99}).status.code(), Code::kNotFound);
}

TEST_F(CoreRemovalTest, TheIdOfARemovedJobIsNeverGivenAgainNotEvenByANewCoordinator) {
  end();
  h.remove(job);
  h.restart_coordinator();
  h.register_worker("w0");
  EXPECT_EQ(h.submit_ok(four_rank_spec()), JobId{job.value + 1});
}

TEST_F(CoreRemovalTest, CheckpointsGoFirstAndTheAnswerWaitsForThat) {
  end();
  const size_t answers = h.answers.size();
  h.remove(job, true);
  EXPECT_EQ(h.answers.size(), answers);
  ASSERT_EQ(h.removals.size(), 1u);
  EXPECT_EQ(h.removals[0].directory, h.record(job).checkpoint_dir);
  EXPECT_EQ(h.removals[0].newest_step, 20);
  EXPECT_EQ(h.resume(job).status.code(), Code::kFailedPrecondition) << "its checkpoints are going";
  EXPECT_EQ(h.remove(job).status.code(), Code::kFailedPrecondition);
  h.feed(CheckpointsRemoved{job, {}});
  EXPECT_TRUE(h.answers.back().status.ok());
  EXPECT_EQ(h.core().find_job(job), nullptr);
}

TEST_F(CoreRemovalTest, WhenCheckpointsCannotBeRemovedTheJobStaysAndMayBeResumed) {
  end();
  h.remove(job, true);
  h.feed(CheckpointsRemoved{job, internal_error("the disk is read-only")});
  EXPECT_EQ(h.answers.back().status.message(), "the disk is read-only");
  EXPECT_TRUE(h.has_event("removal_failed")) << "for who has stopped waiting";
  ASSERT_NE(h.core().find_job(job), nullptr);
  EXPECT_TRUE(h.resume(job).status.ok());
  h.feed(CheckpointsRemoved{job, {}});  // nobody asked
  EXPECT_NE(h.core().find_job(job), nullptr);
}

TEST_F(CoreRemovalTest, ADirectoryThatAnotherJobHasAsWellIsLeftAlone) {
  end();
  JobSpec spec = four_rank_spec("first");
  spec.checkpoint.dir = "/shared/run";
  const JobId first = h.submit_ok(spec);  // ends without having saved anything
  h.cancel(first);
  h.confirm_stops(first);
  spec.name = "second";
  h.submit_ok(spec);
  const Answer answer = h.remove(first, true);
  EXPECT_EQ(answer.status.code(), Code::kFailedPrecondition);
  EXPECT_NE(answer.status.message().find("\"second\""), std::string::npos);
  EXPECT_TRUE(h.removals.empty());
  EXPECT_TRUE(h.remove(first).status.ok()) << "the job alone may go";
}

TEST_F(CoreRemovalTest, NoJobGetsADirectoryThatIsBeingRemoved) {
  end();
  JobSpec spec = four_rank_spec("first");
  spec.checkpoint.dir = "/shared/run";
  const JobId first = h.submit_ok(spec);
  h.cancel(first);
  h.confirm_stops(first);
  h.remove(first, true);
  ASSERT_EQ(h.removals.size(), 1u);
  EXPECT_FALSE(h.removals[0].newest_step.has_value()) << "it saved nothing";
  spec.name = "second";
  EXPECT_EQ(h.submit(spec).status.code(), Code::kAlreadyExists);
  h.feed(CheckpointsRemoved{first, {}});
  EXPECT_TRUE(h.submit(spec).status.ok());
}

TEST_F(CoreRemovalTest, ALateWordFromARemovedJobsRanksIsAnsweredWithTheOrderToStop) {
  const std::string host = h.host_of(job, 0);
  end();
  h.remove(job);
  h.clear();
  h.workers.at(host).ranks[{job, Epoch{1}, Rank{0}}] = {job, Epoch{1}, Rank{0}};
  h.heartbeat(host);
  const auto stops = h.sent<StopRanks>();
  ASSERT_EQ(stops.size(), 1u);
  EXPECT_EQ(stops[0].job, job);
}

}  // namespace
}  // namespace penstock
