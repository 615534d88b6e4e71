// Recovery from what daemons hold in memory.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

using std::chrono::seconds;

class CoreMemoryTest : public ::testing::Test {
 protected:
  CoreMemoryTest() {
    h.add_worker("w0", 2);
    h.add_worker("w1", 2);
    start(four_rank_spec());
  }
  void start(const JobSpec& spec) {
    job = h.submit_ok(spec);
    h.run(job);
    h.train(job, 1, 30);
    h.checkpoint(job, 20);
    h.clear();
  }
  void stopped(const std::string& worker, const std::vector<HeldRank>& held) {
    h.workers.at(worker).ranks.clear();
    h.say(worker, RanksStopped{job, Epoch{1}, held});
  }
  void expect_from_checkpoint() {
    h.pass(seconds(2));
    ASSERT_EQ(h.finds.size(), 1u);
    h.answer_find();
    EXPECT_FALSE(h.record(job).restored_from_memory);
    EXPECT_EQ(h.record(job).restore_step, 20);
    const auto orders = h.sent<StartRank>();
    ASSERT_EQ(orders.size(), 4u);
    for (const StartRank& order : orders) EXPECT_FALSE(order.from_memory);
  }

  CoreHarness h;
  JobId job;
};

TEST_F(CoreMemoryTest, AKilledRankComesBackWithTheNewestRecordedStep) {
  const auto placement = h.record(job).placement;
  h.kill_rank(job, 2);
  for (const StopRanks& stop : h.sent<StopRanks>()) EXPECT_TRUE(stop.keep_state);
  h.confirm_stops(job, {29, 30, 31});
  EXPECT_TRUE(h.finds.empty()) << "nothing is looked for on disk";
  const auto orders = h.sent<StartRank>();
  ASSERT_EQ(orders.size(), 4u);
  for (const StartRank& order : orders) {
    EXPECT_TRUE(order.from_memory);
    EXPECT_EQ(order.restore_step, 30) << "31 is on no record";
    EXPECT_TRUE(order.restore_manifest.empty());
    EXPECT_EQ(order.saved_step, 20);
    EXPECT_EQ(order.first_unreported_step, 31);
  }
  for (size_t rank = 0; rank < placement.size(); ++rank) {
    EXPECT_EQ(h.record(job).placement[rank].worker, placement[rank].worker) << rank;
  }
  EXPECT_NE(h.record(job).reason.message.find("held in memory"), std::string::npos);
  h.run(job);
  h.train(job, 31, 32);
  EXPECT_FALSE(h.record(job).last_step->replayed);
  EXPECT_EQ(h.record(job).highest_step, 32);
}

TEST_F(CoreMemoryTest, AStepReportedWhileTheAttemptStopsCounts) {
  h.kill_rank(job, 2);
  h.train(job, 31, 31);
  h.confirm_stops(job, {30, 31});
  EXPECT_EQ(h.sent<StartRank>().at(0).restore_step, 31);
}

TEST_F(CoreMemoryTest, TheNewestStepThatEveryRankHasIsTaken) {
  h.kill_rank(job, 0);
  stopped("w0", {{Rank{0}, {28, 29}}, {Rank{1}, {29, 30}}});
  stopped("w1", {{Rank{2}, {29, 30}}, {Rank{3}, {29, 30}}});
  ASSERT_EQ(h.sent<StartRank>().size(), 4u);
  EXPECT_EQ(h.sent<StartRank>()[0].restore_step, 29);
}

TEST_F(CoreMemoryTest, ARankWhoseStateIsNotHeldMeansTheCheckpoint) {
  h.kill_rank(job, 0);
  h.clear();
  stopped("w0", {{Rank{1}, {29, 30}}});
  stopped("w1", {{Rank{2}, {29, 30}}, {Rank{3}, {29, 30}}});
  const auto stops = h.sent<StopRanks>();
  ASSERT_EQ(stops.size(), 2u) << "those that hold something let go of it";
  for (const StopRanks& stop : stops) EXPECT_FALSE(stop.keep_state);
  expect_from_checkpoint();
}

TEST_F(CoreMemoryTest, MemoryOfAHostThatChangesBitsIsNotTrusted) {
  h.exit_rank(job, 1, ExitCode::kMiscomputed, "exited with code 18: step 31: its memory");
  EXPECT_EQ(h.record(job).reason.code, "silent_corruption");
  h.confirm_stops(job, {29, 30});
  expect_from_checkpoint();
  EXPECT_EQ(h.record(job).reason.code, "starting") << "it is retried";
}

TEST_F(CoreMemoryTest, WhatAnotherWorkerSaysItHoldsOfARankIsIgnored) {
  h.kill_rank(job, 0);
  const std::vector<HeldRank> all = {
      {Rank{0}, {30}}, {Rank{1}, {30}}, {Rank{2}, {30}}, {Rank{3}, {30}}};
  stopped("w0", all);
  stopped("w1", {});
  expect_from_checkpoint();
}

TEST(CoreHeldStateTest, WhatAnotherWorkerSaysItHoldsIsNotUsedThoughThereIsRoom) {
  CoreHarness h;
  h.add_worker("w0", 3);
  h.add_worker("w1", 3);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.train(job, 1, 30);
  h.checkpoint(job, 20);
  const std::string own = h.host_of(job, 0);
  const std::string other = h.host_of(job, 3);
  ASSERT_NE(own, other);
  h.kill_rank(job, 0);
  h.clear();
  for (const std::string& worker : {own, other}) {
    RanksStopped stopped{job, Epoch{1}, {}};
    for (int32_t rank = 0; rank < 4; ++rank) {
      const std::string& holder = rank == 0 ? other : h.host_of(job, rank);
      if (holder == worker) stopped.held.push_back({Rank{rank}, {30}});
    }
    h.workers.at(worker).ranks.clear();
    h.say(worker, stopped);
  }
  h.pass(seconds(2));
  EXPECT_EQ(h.finds.size(), 1u);
  EXPECT_FALSE(h.record(job).restored_from_memory);
}

TEST_F(CoreMemoryTest, NothingOlderThanTheCheckpointIsTaken) {
  h.kill_rank(job, 0);
  h.confirm_stops(job, {18, 19});
  expect_from_checkpoint();
}

TEST_F(CoreMemoryTest, TheLastStepIsTrainedAgainSoThatItIsSaved) {
  h.train(job, 31, 100);
  h.kill_rank(job, 0);
  h.confirm_stops(job, {99, 100});
  EXPECT_EQ(h.sent<StartRank>().at(0).restore_step, 99);
}

TEST_F(CoreMemoryTest, AStartFromMemoryThatFailsIsNotTriedTwice) {
  h.kill_rank(job, 2);
  h.confirm_stops(job, {29, 30});
  h.spawn_ranks(job);
  h.exit_rank(job, 1, ExitCode::kNotFound);
  for (const StopRanks& stop : h.sent<StopRanks>()) EXPECT_FALSE(stop.keep_state);
  h.confirm_stops(job, {29, 30});
  expect_from_checkpoint();
  h.run(job);
  h.train(job, 21, 35);
  h.clear();
  h.kill_rank(job, 2);
  h.confirm_stops(job, {34, 35});
  EXPECT_EQ(h.sent<StartRank>().at(0).restore_step, 35) << "after a step it is tried again";
}

TEST_F(CoreMemoryTest, AWorkerThatIsLostMeanwhileMeansTheCheckpoint) {
  h.add_worker("w2", 2);
  h.kill_rank(job, 2);
  stopped("w0", {{Rank{0}, {30}}, {Rank{1}, {30}}});
  h.workers.at("w1").alive = false;
  h.pass(seconds(4));
  expect_from_checkpoint();
  EXPECT_TRUE(h.job(job).held.empty());
}

TEST_F(CoreMemoryTest, ADaemonThatIsRestartedMeanwhileHoldsNothing) {
  h.kill_rank(job, 2);
  stopped("w0", {{Rank{0}, {30}}, {Rank{1}, {30}}});
  h.restart_worker("w0");
  stopped("w1", {{Rank{2}, {30}}, {Rank{3}, {30}}});
  expect_from_checkpoint();
}

TEST_F(CoreMemoryTest, AWorkerThatIsAwayWhenNobodyNeedsWhatItHoldsHearsSoWhenItIsBack) {
  h.kill_rank(job, 2);
  for (int failed = 0; failed < 3; ++failed) {  // so that the next start waits for a while
    h.confirm_stops(job);
    h.pass(seconds(8));
    h.answer_find();
    h.spawn_ranks(job);
    h.kill_rank(job, 2);
  }
  h.confirm_stops(job, {20});
  ASSERT_EQ(h.job(job).held.size(), 4u);
  h.workers.at("w0").alive = false;
  h.pass(seconds(5));
  ASSERT_TRUE(h.job(job).held.empty());
  h.clear();
  h.register_worker("w0");
  const auto stops = h.sent<StopRanks>();
  ASSERT_FALSE(stops.empty());
  for (const StopRanks& stop : stops) EXPECT_FALSE(stop.keep_state);
}

// The order to let go was lost with its connection.
TEST_F(CoreMemoryTest, WhatADaemonStillHoldsForNobodyIsLetGo) {
  h.cancel(job);
  h.confirm_stops(job);
  ASSERT_EQ(h.state(job), JobState::kCancelled);
  h.clear();
  stopped("w0", {{Rank{0}, {30}}});
  const auto orders = h.sent<StopRanks>();
  ASSERT_EQ(orders.size(), 1u);
  EXPECT_FALSE(orders[0].keep_state);
  EXPECT_EQ(orders[0].epoch, Epoch{1});
}

TEST_F(CoreMemoryTest, WhatTheNextStartNeedsIsHeldOnThoughItIsSaidAgain) {
  h.kill_rank(job, 2);
  h.clear();
  stopped("w0", {{Rank{0}, {30}}, {Rank{1}, {30}}});
  stopped("w0", {{Rank{0}, {30}}, {Rank{1}, {30}}});
  EXPECT_TRUE(h.sent<StopRanks>().empty());
  stopped("w1", {{Rank{2}, {30}}, {Rank{3}, {30}}});
  EXPECT_EQ(h.sent<StartRank>().size(), 4u);
}

TEST_F(CoreMemoryTest, CancellingAJobThatWaitsLetsGoOfWhatIsHeld) {
  h.kill_rank(job, 2);
  h.clear();
  stopped("w0", {{Rank{0}, {30}}, {Rank{1}, {30}}});
  h.cancel(job);
  h.confirm_stops(job, {30});
  EXPECT_EQ(h.state(job), JobState::kCancelled);
  EXPECT_TRUE(h.job(job).held.empty());
}

TEST_F(CoreMemoryTest, ASpecThatDoesNotWantItGetsTheCheckpoint) {
  h.cancel(job);
  h.confirm_stops(job);
  JobSpec spec = four_rank_spec();
  spec.recovery.from_memory = false;
  start(spec);
  h.kill_rank(job, 2);
  for (const StopRanks& stop : h.sent<StopRanks>()) EXPECT_FALSE(stop.keep_state);
  h.confirm_stops(job, {29, 30});
  expect_from_checkpoint();
}

TEST_F(CoreMemoryTest, ACoordinatorThatIsRestartedMeanwhileAsksAgain) {
  h.kill_rank(job, 2);
  h.clear();
  h.restart_coordinator();
  h.workers.at("w0").ranks.clear();
  h.workers.at("w1").ranks.clear();
  h.register_worker("w0");
  h.register_worker("w1");
  ASSERT_FALSE(h.sent<StopRanks>().empty());
  for (const StopRanks& stop : h.sent<StopRanks>()) EXPECT_TRUE(stop.keep_state);
  h.confirm_stops(job, {29, 30});
  ASSERT_EQ(h.sent<StartRank>().size(), 4u);
  EXPECT_EQ(h.sent<StartRank>()[0].restore_step, 30);
}

}  // namespace
}  // namespace penstock
