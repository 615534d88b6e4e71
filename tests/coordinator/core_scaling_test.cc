// Other data-parallel widths: which are possible, and how a job comes to one.
#include <gtest/gtest.h>

#include "coordinator/core/scaling.h"
#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

using std::chrono::seconds;

JobSpec spec_of(int64_t data, int64_t microbatches, int64_t size) {
  JobSpec spec = flat_spec("scaled", data);
  spec.parallelism.microbatches = microbatches;
  spec.parallelism.micro_batch_size = size;
  return spec;
}

TEST(WithDataWidthTest, EveryStepKeepsItsSequences) {
  const JobSpec spec = spec_of(2, 6, 2);
  for (const int64_t data : {1, 2, 3, 4, 6, 12, 24}) {
    const Result<JobSpec> scaled = with_data_width(spec, data);
    ASSERT_TRUE(scaled.ok()) << data << ": " << scaled.status().message();
    EXPECT_EQ(scaled->parallelism.data, data);
    EXPECT_EQ(scaled->tokens_per_step(), spec.tokens_per_step()) << data;
    EXPECT_LE(scaled->parallelism.micro_batch_size, 2) << "larger ones might not fit";
  }
  EXPECT_EQ(with_data_width(spec, 4)->parallelism.micro_batch_size, 2) << "kept where it can be";
  EXPECT_EQ(with_data_width(spec, 24)->parallelism.micro_batch_size, 1);
}

TEST(WithDataWidthTest, ARampKeepsItsSequencesToo) {
  JobSpec spec = spec_of(1, 4, 1);
  spec.parallelism.microbatch_levels = {{11, 8}, {21, 12}};
  const Result<JobSpec> scaled = with_data_width(spec, 4);
  ASSERT_TRUE(scaled.ok()) << scaled.status().message();
  for (const int64_t step : {1, 11, 21}) EXPECT_EQ(scaled->tokens_at(step), spec.tokens_at(step));
  EXPECT_FALSE(with_data_width(spec, 8).ok()) << "steps 1 to 10 have 4 sequences";
}

TEST(WithDataWidthTest, WhatDoesNotDivideIsRefusedWithTheNumbers) {
  const Result<JobSpec> refused = with_data_width(spec_of(2, 6, 2), 5);
  EXPECT_EQ(refused.status().code(), Code::kInvalidArgument);
  EXPECT_NE(refused.status().message().find("24 sequences"), std::string::npos)
      << refused.status().message();
  EXPECT_FALSE(with_data_width(spec_of(1, 4, 1), 0).ok());
}

TEST(WithDataWidthTest, TheScheduleSetsTheFewestMicroBatches) {
  JobSpec spec = four_rank_spec();  // dualpipe, pipeline 2: four or more, and even
  spec.parallelism.microbatches = 4;
  spec.parallelism.micro_batch_size = 1;
  EXPECT_FALSE(with_data_width(spec, 2).ok());
  spec.parallelism.micro_batch_size = 2;
  const Result<JobSpec> scaled = with_data_width(spec, 2);
  ASSERT_TRUE(scaled.ok()) << scaled.status().message();
  EXPECT_EQ(scaled->parallelism.microbatches, 4);
  EXPECT_EQ(scaled->parallelism.micro_batch_size, 1);
}

class CoreScalingTest : public ::testing::Test {
 protected:
  CoreScalingTest() {
    h.add_worker("w0", 2);
    h.add_worker("w1", 2);
  }
  void start(int64_t data) {
    job = h.submit_ok(spec_of(data, 8 / data, 1));
    h.run(job);
    h.train(job, 1, 10);
  }
  int64_t width() const { return h.job(job).spec.parallelism.data; }

  CoreHarness h;
  JobId job;
};

TEST_F(CoreScalingTest, AJobGrowsAndShrinksAtAStepWithoutLosingOne) {
  start(1);
  int64_t step = 10;
  for (const int64_t data : {4, 2, 1}) {
    h.clear();
    ASSERT_TRUE(h.scale(job, data).status.ok());
    EXPECT_EQ(h.state(job), JobState::kRunning);
    EXPECT_FALSE(h.sent<PauseRanks>().empty());
    h.train(job, step + 1, step + 1);
    h.pause(job, ++step);
    EXPECT_EQ(h.record(job).reason.code, kScaling);
    h.confirm_stops(job);
    h.answer_find();
    ASSERT_EQ(h.state(job), JobState::kStarting);
    EXPECT_EQ(width(), data);
    EXPECT_EQ(std::ssize(h.record(job).placement), data);
    EXPECT_EQ(h.record(job).restore_step, step);
    EXPECT_EQ(h.record(job).scale_to, 0);
    h.run(job);
  }
  EXPECT_EQ(h.record(job).failures, 0);
  EXPECT_EQ(h.record(job).restarts, 0);
  h.clear();
  h.pass(seconds(5));
  EXPECT_TRUE(h.sent<PauseRanks>().empty());
}

TEST_F(CoreScalingTest, MissingDevicesAreCountedAndNothingHappens) {
  start(2);
  const Answer answer = h.scale(job, 8);
  EXPECT_EQ(answer.status.code(), Code::kFailedPrecondition);
  for (const char* part : {"8 devices", "has 2", "2 more are free", "4 are missing"}) {
    EXPECT_NE(answer.status.message().find(part), std::string::npos) << answer.status.message();
  }
  EXPECT_EQ(h.scale(job, 3).status.code(), Code::kInvalidArgument);
  EXPECT_EQ(h.record(job).scale_to, 0);
  EXPECT_EQ(h.record(job).reason.code, "running");
}

TEST_F(CoreScalingTest, ARestartedCoordinatorGoesOnWithIt) {
  start(2);
  ASSERT_TRUE(h.scale(job, 4).status.ok());
  h.restart_coordinator();
  h.register_worker("w0");
  h.register_worker("w1");
  h.pass(seconds(2));
  h.pause(job, 11);
  h.restart_coordinator();
  h.register_worker("w0");
  h.register_worker("w1");
  h.confirm_stops(job);
  h.restart_coordinator();
  h.register_worker("w0");
  h.register_worker("w1");
  h.answer_find();
  EXPECT_EQ(h.state(job), JobState::kStarting);
  EXPECT_EQ(width(), 4);
  h.restart_coordinator();
  EXPECT_EQ(width(), 4) << "the new spec and the record agree";
}

TEST_F(CoreScalingTest, WhenDevicesGoAwayInBetweenTheJobStaysAsItWas) {
  start(2);
  ASSERT_TRUE(h.scale(job, 4).status.ok());
  const std::string here = h.host_of(job, 0);
  h.workers.at(here == "w0" ? "w1" : "w0").alive = false;
  h.pass(seconds(5));
  h.pause(job, 11);
  h.confirm_stops(job);
  h.answer_find();
  EXPECT_TRUE(h.has_event("scale_dropped"));
  EXPECT_EQ(h.state(job), JobState::kStarting);
  EXPECT_EQ(width(), 2);
}

TEST_F(CoreScalingTest, AFailureOnTheWayGoesOnFromMemoryInTheOldWidthFirst) {
  start(2);
  ASSERT_TRUE(h.scale(job, 4).status.ok());
  h.kill_rank(job, 1);
  h.confirm_stops(job, {9, 10});
  ASSERT_EQ(h.state(job), JobState::kStarting);
  EXPECT_TRUE(h.record(job).restored_from_memory);
  EXPECT_EQ(width(), 2);
  h.run(job);
  h.train(job, 11, 11);
  h.pause(job, 11);
  h.confirm_stops(job);
  h.answer_find();
  EXPECT_EQ(width(), 4);
  EXPECT_EQ(h.state(job), JobState::kStarting);
}

TEST_F(CoreScalingTest, AJobWithoutRanksJustGetsTheWidth) {
  start(2);
  ASSERT_TRUE(h.suspend(job).status.ok());
  h.pause(job, 10);
  h.confirm_stops(job);
  ASSERT_TRUE(h.scale(job, 4).status.ok());
  EXPECT_EQ(h.state(job), JobState::kSuspended);
  EXPECT_EQ(width(), 4);
  EXPECT_EQ(h.scale(job, 8).status.code(), Code::kInvalidArgument) << "the cluster has 4 devices";
  ASSERT_TRUE(h.resume(job).status.ok());
  h.answer_find();
  EXPECT_EQ(std::ssize(h.record(job).placement), 4);
  ASSERT_TRUE(h.cancel(job).status.ok());
  h.confirm_stops(job);
  EXPECT_EQ(h.scale(job, 2).status.code(), Code::kFailedPrecondition);
}

TEST_F(CoreScalingTest, AskingForTheWidthItHasTakesARequestBack) {
  start(2);
  ASSERT_TRUE(h.scale(job, 2).status.ok());
  EXPECT_FALSE(h.has_event("scale_requested"));
  ASSERT_TRUE(h.scale(job, 4).status.ok());
  ASSERT_TRUE(h.scale(job, 2).status.ok());
  h.clear();
  h.pass(seconds(5));
  EXPECT_TRUE(h.sent<PauseRanks>().empty());
  EXPECT_EQ(h.record(job).reason.code, "running");
}

class CoreElasticTest : public CoreScalingTest {
 protected:
  void start_elastic(int64_t data, int64_t least, int64_t most) {
    JobSpec spec = spec_of(data, 8 / data, 1);
    spec.parallelism.elastic = {least, most};
    job = h.submit_ok(spec);
    h.run(job);
    h.train(job, 1, 10);
  }
  void lose(const std::string& name) {
    h.workers.at(name).alive = false;
    h.workers.at(name).ranks.clear();
    h.pass(seconds(5));
    h.confirm_stops(job);
    h.pass(seconds(5));
    if (!h.finds.empty()) h.answer_find();
  }
  void return_worker(const std::string& name) {
    h.workers.at(name).alive = true;
    h.restart_worker(name);
    h.confirm_stops(job);
  }
};

TEST_F(CoreElasticTest, AJobShrinksWhenAWorkerDiesAndGrowsWhenItIsBack) {
  start_elastic(4, 1, 4);
  h.checkpoint(job, 20);
  lose("w1");
  ASSERT_EQ(h.state(job), JobState::kStarting) << "instead of waiting";
  EXPECT_EQ(width(), 2);
  EXPECT_EQ(h.record(job).restore_step, 20);
  EXPECT_TRUE(h.has_event(kScaled));
  h.run(job);
  h.train(job, 21, 40);
  return_worker("w1");
  h.clear();
  h.pass(seconds(5));
  EXPECT_TRUE(h.sent<PauseRanks>().empty()) << "not before a checkpoint";
  h.checkpoint(job, 40);
  EXPECT_EQ(h.record(job).scale_to, 4);
  EXPECT_FALSE(h.sent<PauseRanks>().empty());
  h.train(job, 41, 42);
  h.pause(job, 42);
  h.confirm_stops(job);
  h.answer_find();
  ASSERT_EQ(h.state(job), JobState::kStarting);
  EXPECT_EQ(width(), 4);
  EXPECT_EQ(h.record(job).restore_step, 42);
  EXPECT_EQ(h.record(job).failures, 1) << "the worker that died";
}

TEST_F(CoreElasticTest, AJobDoesNotShrinkBelowItsLeastWidth) {
  start_elastic(4, 4, 4);
  h.checkpoint(job, 20);
  lose("w1");
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_EQ(h.record(job).reason.code, "waiting_for_devices");
  EXPECT_EQ(width(), 4);
}

TEST_F(CoreElasticTest, AJobDoesNotGrowBeforeThoseThatWait) {
  start_elastic(2, 1, 4);
  const JobId waiting = h.submit_ok(flat_spec("waiting", 4));
  ASSERT_EQ(h.state(waiting), JobState::kQueued);
  h.checkpoint(job, 20);
  EXPECT_EQ(h.record(job).scale_to, 0);
  ASSERT_TRUE(h.cancel(waiting).status.ok());
  h.train(job, 11, 40);
  h.checkpoint(job, 40);
  EXPECT_EQ(h.record(job).scale_to, 4);
}

TEST_F(CoreElasticTest, ADrainShrinksAJobThatHasNoRoomElsewhere) {
  start_elastic(4, 1, 4);
  ASSERT_TRUE(h.drain("w1", "fan").status.ok());
  h.pause(job, 10);
  h.confirm_stops(job);
  h.answer_find();
  ASSERT_EQ(h.state(job), JobState::kStarting);
  EXPECT_EQ(width(), 2);
  EXPECT_EQ(h.record(job).failures, 0);
}

}  // namespace
}  // namespace penstock
