// Workers that are drained for maintenance: their jobs move without losing a step, or wait.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

using std::chrono::seconds;

class CoreDrainsTest : public ::testing::Test {
 protected:
  CoreDrainsTest() {
    for (const char* name : {"w0", "w1", "w2"}) h.add_worker(name, 2);
  }
  // On two of the three workers.
  void start() {
    job = h.submit_ok(four_rank_spec());
    h.run(job);
    h.train(job, 1, 10);
  }
  std::string idle_worker() {
    for (const auto& [name, worker] : h.workers) {
      if (h.core().free_devices(id_of(name)).size() == 2) return name;
    }
    return "";
  }
  WorkerId id_of(const std::string& name) { return h.core().find_worker(name)->record.id; }
  bool drained(const std::string& name) { return h.core().find_worker(name)->record.drain_done; }

  CoreHarness h;
  JobId job;
};

TEST_F(CoreDrainsTest, JobsMoveOffADrainedWorkerWithoutLosingAStep) {
  start();
  const std::string worker = h.host_of(job, 0);
  h.clear();
  ASSERT_TRUE(h.drain(worker, "new memory").status.ok());
  EXPECT_EQ(h.sent<PauseRanks>().size(), 2u);
  EXPECT_NE(h.record(job).reason.message.find("new memory"), std::string::npos);
  EXPECT_FALSE(drained(worker));
  h.train(job, 11, 11);
  h.pause(job, 11);
  EXPECT_EQ(h.record(job).reason.code, kDraining);
  h.confirm_stops(job);
  h.answer_find();
  ASSERT_EQ(h.state(job), JobState::kStarting);
  for (int32_t rank = 0; rank < 4; ++rank) EXPECT_NE(h.host_of(job, rank), worker);
  EXPECT_EQ(h.record(job).restore_step, 11);
  h.run(job);
  h.pass(seconds(2));
  EXPECT_TRUE(drained(worker));
  EXPECT_TRUE(h.has_event("worker_drained"));
  EXPECT_EQ(h.record(job).failures, 0);
  EXPECT_EQ(h.record(job).restarts, 0);
}

TEST_F(CoreDrainsTest, WithoutRoomElsewhereTheJobWaitsAndSaysForWhat) {
  start();
  const std::string spare = idle_worker();
  ASSERT_TRUE(h.drain(spare, "").status.ok());
  h.pass(seconds(1));
  EXPECT_TRUE(drained(spare)) << "nothing ran there";
  const std::string worker = h.host_of(job, 0);
  ASSERT_TRUE(h.drain(worker, "fan").status.ok());
  h.pause(job, 10);
  h.confirm_stops(job);
  h.answer_find();
  h.pass(seconds(2));
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_EQ(h.record(job).reason.code, "waiting_for_devices");
  EXPECT_NE(h.record(job).reason.message.find("drained"), std::string::npos)
      << h.record(job).reason.message;
  EXPECT_TRUE(drained(worker));
  ASSERT_TRUE(h.undrain(spare).status.ok());
  EXPECT_EQ(h.state(job), JobState::kStarting);
  EXPECT_EQ(h.record(job).restore_step, 10);
  EXPECT_FALSE(drained(spare));
}

TEST_F(CoreDrainsTest, NothingNewIsPlacedOnADrainedWorker) {
  ASSERT_TRUE(h.drain("w0", "").status.ok());
  ASSERT_TRUE(h.drain("w1", "").status.ok());
  job = h.submit_ok(four_rank_spec());
  EXPECT_EQ(h.state(job), JobState::kQueued);
  ASSERT_TRUE(h.undrain("w0").status.ok());
  EXPECT_EQ(h.state(job), JobState::kStarting);
  for (int32_t rank = 0; rank < 4; ++rank) EXPECT_NE(h.host_of(job, rank), "w1");
}

TEST_F(CoreDrainsTest, ARestartOfCoordinatorOrDaemonUndrainsNothing) {
  start();
  const std::string worker = h.host_of(job, 0);
  ASSERT_TRUE(h.drain(worker, "fan").status.ok());
  h.restart_coordinator();
  for (const auto& [name, known] : h.workers) h.register_worker(name);
  h.clear();
  h.pass(seconds(3));
  EXPECT_FALSE(h.sent<PauseRanks>().empty()) << "the drain goes on";
  h.pause(job, 12);
  h.confirm_stops(job);
  h.answer_find();
  h.pass(seconds(1));
  ASSERT_TRUE(drained(worker));
  h.restart_worker(worker);
  h.restart_coordinator();
  for (const auto& [name, known] : h.workers) h.register_worker(name);
  EXPECT_TRUE(drained(worker));
  EXPECT_EQ(h.core().find_worker(worker)->record.drain, "fan");
}

TEST_F(CoreDrainsTest, AJobThatIsStartingMovesAtOnce) {
  job = h.submit_ok(four_rank_spec());
  h.spawn_ranks(job);
  const std::string worker = h.host_of(job, 0);
  ASSERT_TRUE(h.drain(worker, "").status.ok());
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  h.confirm_stops(job);
  ASSERT_EQ(h.finds.size(), 1u);
  h.answer_find();
  ASSERT_EQ(h.state(job), JobState::kStarting);
  for (int32_t rank = 0; rank < 4; ++rank) EXPECT_NE(h.host_of(job, rank), worker);
}

TEST_F(CoreDrainsTest, StateHeldOnADrainedWorkerIsNotThrownAway) {
  start();
  h.kill_rank(job, 3);
  const std::string worker = h.host_of(job, 0);
  ASSERT_TRUE(h.drain(worker, "").status.ok());
  h.confirm_stops(job, {9, 10});
  ASSERT_EQ(h.state(job), JobState::kStarting);
  EXPECT_TRUE(h.record(job).restored_from_memory) << "for one more step, which is saved";
  EXPECT_FALSE(drained(worker));
  h.clear();
  h.run(job);
  EXPECT_FALSE(h.sent<PauseRanks>().empty());
  h.train(job, 11, 11);
  h.pause(job, 11);
  h.confirm_stops(job);
  h.answer_find();
  for (int32_t rank = 0; rank < 4; ++rank) EXPECT_NE(h.host_of(job, rank), worker);
  h.pass(seconds(1));
  EXPECT_TRUE(drained(worker));
}

TEST_F(CoreDrainsTest, ADrainThatIsTakenBackInTimeMovesNothing) {
  start();
  const std::string worker = h.host_of(job, 0);
  ASSERT_TRUE(h.drain(worker, "").status.ok());
  ASSERT_TRUE(h.undrain(worker).status.ok());
  h.pass(seconds(2));
  EXPECT_EQ(h.record(job).reason.code, "running");
  h.pause(job, 11);  // it was too late for that
  EXPECT_EQ(h.record(job).reason.code, kPauseOver);
  h.confirm_stops(job);
  h.answer_find();
  EXPECT_EQ(h.record(job).restore_step, 11);
  h.run(job);
  EXPECT_EQ(h.record(job).failures, 0);
}

TEST_F(CoreDrainsTest, ADaemonThatIsAskedToEndIsReleasedWhenItsJobHasMoved) {
  start();
  const std::string worker = h.host_of(job, 0);
  h.clear();
  h.say(worker, WorkerLeaving{1, false});
  EXPECT_FALSE(h.sent<PauseRanks>().empty());
  EXPECT_TRUE(h.sent<WorkerReleased>().empty());
  h.pause(job, 11);
  h.confirm_stops(job);
  h.answer_find();
  ASSERT_EQ(h.state(job), JobState::kStarting);
  for (int32_t rank = 0; rank < 4; ++rank) EXPECT_NE(h.host_of(job, rank), worker);
  h.pass(seconds(1));
  EXPECT_FALSE(h.sent<WorkerReleased>().empty());
  h.workers.at(worker).alive = false;
  h.say(worker, WorkerLeaving{1, true});
  EXPECT_EQ(h.core().find_worker(worker)->state, WorkerState::kLost);
  EXPECT_TRUE(h.has_event("worker_left"));
  h.run(job);
  EXPECT_EQ(h.record(job).failures, 0);
  h.workers.at(worker).alive = true;
  h.restart_worker(worker);
  EXPECT_TRUE(h.core().find_worker(worker)->takes_ranks()) << "a new process is a new start";
}

TEST_F(CoreDrainsTest, ADaemonThatEndsBeforeItsJobHasSavedCostsNoBudget) {
  start();
  h.checkpoint(job, 10);
  const std::string worker = h.host_of(job, 0);
  h.say(worker, WorkerLeaving{1, false});
  h.rank_ended_by_daemon(job, 0);
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_EQ(h.record(job).reason.code, "worker_left");
  h.workers.at(worker).alive = false;
  h.say(worker, WorkerLeaving{1, true});
  h.confirm_stops(job, {9, 10});
  h.answer_find();
  EXPECT_EQ(h.state(job), JobState::kStarting) << "it waits for nobody";
  EXPECT_EQ(h.record(job).failures, 0);
}

TEST_F(CoreDrainsTest, NorDoesOneThatEndsBeforeItHasSaidSo) {
  start();
  h.rank_ended_by_daemon(job, 0);
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_EQ(h.record(job).reason.code, "worker_left");
  EXPECT_EQ(h.record(job).failures, 0);
}

TEST_F(CoreDrainsTest, AnUnknownWorkerIsRefusedAndARepeatedDrainIsNone) {
  EXPECT_EQ(h.drain("w9", "").status.code(), Code::kNotFound);
  ASSERT_TRUE(h.drain("w0", "fan").status.ok());
  const size_t events = h.events.size();
  ASSERT_TRUE(h.drain("w0", "fan").status.ok());
  EXPECT_EQ(h.events.size(), events);
  ASSERT_TRUE(h.undrain("w1").status.ok()) << "it takes ranks already";
  EXPECT_EQ(h.events.size(), events);
}

}  // namespace
}  // namespace penstock
