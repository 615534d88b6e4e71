// Copies of ranks' state in other workers' memory: who keeps whose, and when a job goes on from
// them.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

using std::chrono::seconds;

class CoreMirrorsTest : public ::testing::Test {
 protected:
  CoreMirrorsTest() {
    h.add_worker("w0", 2);
    h.add_worker("w1", 2);
    spec.recovery.mirror_automatic = true;
    spec.training.steps = 1000;
  }
  // Ranks 0 and 1 on w0, 2 and 3 on w1; w2 is a spare. When it returns, a first round is over, if
  // copies are made at all, and a second one is asked for.
  void start() {
    job = h.submit_ok(spec);
    h.add_worker("w2", 2);
    h.run(job);
    train_to(1);
    first = newest_order("w0").step;
    train_to(30);
    h.checkpoint(job, 20);
    if (first > 0) answer_all(first);
    h.clear();
    train_to(31);
  }
  void train_to(int64_t step) {
    const auto& last = h.record(job).last_step;
    h.train(job, last ? last->step + 1 : 1, step);
  }
  MirrorRanks newest_order(const std::string& worker) {
    MirrorRanks newest;
    for (const OutgoingMessage& out : h.messages) {
      const auto* order = std::get_if<MirrorRanks>(&out.message);
      if (order != nullptr && out.peer == "peer-" + worker) newest = *order;
    }
    return newest;
  }
  // Everybody says that the copies of what was ordered are there.
  int64_t mirror() {
    const int64_t step = newest_order("w0").step;
    train_to(step);
    answer_all(step);
    return step;
  }
  void answer_all(int64_t step) {
    for (const std::string worker : {"w0", "w1"}) answer(worker, step);
  }
  void answer(const std::string& worker, int64_t step, const std::string& failure = {},
              bool missed = false) {
    h.say(worker, RanksMirrored{job, h.record(job).epoch, step, failure, missed});
  }
  void lose(const std::string& worker) {
    h.workers.at(worker).alive = false;
    h.workers.at(worker).ranks.clear();
    h.feed(WorkerGone{h.core().find_worker(worker)->record.id, h.workers.at(worker).incarnation});
  }
  // w0 has stopped; its own ranks' state is of the last two steps, and it has copies.
  void stopped(const std::vector<HeldRank>& held, const std::vector<HeldRank>& copies) {
    h.workers.at("w0").ranks.clear();
    h.say("w0", RanksStopped{job, Epoch{1}, held, copies});
  }
  std::vector<HeldRank> held_of_w0() const { return {{Rank{0}, {59, 60}}, {Rank{1}, {59, 60}}}; }
  static std::vector<HeldRank> copies_of(int64_t step) {
    return {{Rank{0}, {step}}, {Rank{1}, {step}}, {Rank{2}, {step}}, {Rank{3}, {step}}};
  }
  // w1 is lost at step 60, and w0 has copies of the step that is returned.
  int64_t start_and_lose_w1() {
    start();
    const int64_t step = mirror();
    train_to(60);
    lose("w1");
    stopped(held_of_w0(), copies_of(step));
    return step;
  }
  // The same with nowhere to go: w2 is away, too.
  int64_t start_and_lose_w1_without_room() {
    start();
    h.workers.at("w2").alive = false;
    lose("w2");
    const int64_t step = mirror();
    train_to(60);
    lose("w1");
    return step;
  }
  void expect_from_checkpoint(bool read_everything = false) {
    h.pass(seconds(2));
    ASSERT_EQ(h.finds.size(), 1u);
    EXPECT_EQ(h.finds.back().read_everything, read_everything);
    h.answer_find();
    EXPECT_FALSE(h.record(job).restored_from_memory);
    EXPECT_EQ(h.record(job).restore_step, 20);
  }

  CoreHarness h;
  JobSpec spec = four_rank_spec();
  JobId job;
  int64_t first = 0;  // step that was named
};

TEST_F(CoreMirrorsTest, EveryRankIsKeptByTheOtherWorker) {
  start();
  const MirrorRanks order = newest_order("w0");
  EXPECT_EQ(first, 3) << "one that no rank can have passed yet";
  EXPECT_EQ(order.step, 33);
  EXPECT_EQ(order.kept_step, first);
  EXPECT_EQ(order.bytes_per_second, int64_t{256} << 20);
  const StatePlace w1 = {"host-w1:77", {1, 7}};
  EXPECT_EQ(order.send, (std::vector<MirrorTarget>{{Rank{0}, w1}, {Rank{1}, w1}}));
  EXPECT_EQ(order.keep, (std::vector<Rank>{Rank{2}, Rank{3}}));
  EXPECT_EQ(newest_order("w1").step, order.step) << "the same for all";
  EXPECT_EQ(newest_order("w2"), MirrorRanks()) << "it has no rank of the job";
}

TEST_F(CoreMirrorsTest, TheNextStepIsNamedWhenAllHaveCopiesOfTheOneBefore) {
  start();
  const int64_t step = newest_order("w0").step;
  train_to(step + 5);
  h.clear();
  answer("w0", step);
  train_to(step + 6);
  EXPECT_TRUE(h.sent<MirrorRanks>().empty()) << "w1 has not answered";
  answer("w1", step);
  train_to(step + 7);
  ASSERT_EQ(h.sent<MirrorRanks>().size(), 2u);
  EXPECT_EQ(newest_order("w0").kept_step, step);
  EXPECT_EQ(newest_order("w0").step, step + 9);
}

TEST_F(CoreMirrorsTest, AnOrderIsRepeatedToWhoHasNotAnswered) {
  start();
  const int64_t step = newest_order("w0").step;
  answer("w0", step);
  h.clear();
  h.pass(seconds(3));
  ASSERT_FALSE(h.sent<MirrorRanks>().empty());
  EXPECT_EQ(newest_order("w1").step, step);
  EXPECT_EQ(newest_order("w0"), MirrorRanks());
}

TEST_F(CoreMirrorsTest, StepsAreAsFarApartAsTheSpecSays) {
  spec.recovery.mirror_automatic = false;
  spec.recovery.mirror = 100;
  start();
  EXPECT_EQ(first, 100);
  EXPECT_EQ(newest_order("w0").step, 200);
}

TEST_F(CoreMirrorsTest, AMissedStepIsFollowedByOneFurtherAhead) {
  start();
  const int64_t step = newest_order("w0").step;
  train_to(step);
  answer("w0", step, "rank 0: the step is overwritten", true);
  train_to(step + 1);
  EXPECT_EQ(newest_order("w0").step, step + 1 + 4);
  EXPECT_FALSE(h.has_event("mirror_failed"));
}

// By steps that take so long; a rank must not have passed the step when it hears of it.
TEST_F(CoreMirrorsTest, TheNextStepIsAsFarAheadAsOrdersTakeToArrive) {
  spec.training.steps = 5000;
  for (const auto& [step_seconds, lead] :
       std::map<double, int64_t>{{0.5, 2}, {0.008, 14}, {1e-6, 1002}, {0.0, 2}}) {
    job = h.submit_ok(spec);
    h.run(job);
    h.train(job, 1, 1, [&](StepReport& report) { report.step_seconds = step_seconds; });
    EXPECT_EQ(newest_order("w0").step, 1 + lead) << step_seconds;
    h.cancel(job);
    h.confirm_stops(job);
  }
}

TEST_F(CoreMirrorsTest, MissesDoubleHowFarAheadTheNextStepIsAndCopiesHalveIt) {
  start();
  const auto next_lead = [&] {
    const int64_t step = h.record(job).last_step->step + 1;
    train_to(step);
    return newest_order("w0").step - step;
  };
  for (const int64_t lead : {4, 8, 16, 16, 16}) {
    answer("w0", newest_order("w0").step, "rank 0: the step is overwritten", true);
    EXPECT_EQ(next_lead(), lead);
  }
  for (const int64_t lead : {8, 4, 2, 2}) {
    mirror();
    EXPECT_EQ(next_lead(), lead);
  }
}

TEST_F(CoreMirrorsTest, TheLastStepIsNotCopied) {
  spec.training.steps = 36;
  start();
  ASSERT_EQ(mirror(), 33);
  h.clear();
  train_to(34);
  EXPECT_TRUE(h.sent<MirrorRanks>().empty());
}

TEST_F(CoreMirrorsTest, AFailureIsToldOnceAndTriedAgainLater) {
  start();
  answer("w1", newest_order("w0").step, "rank 2: refused: resource_exhausted");
  EXPECT_TRUE(h.has_event("mirror_failed"));
  h.events.clear();
  h.clear();
  train_to(40);
  EXPECT_TRUE(h.sent<MirrorRanks>().empty());
  h.pass(seconds(31));
  ASSERT_FALSE(h.sent<MirrorRanks>().empty());
  answer("w1", newest_order("w0").step, "rank 2: refused: resource_exhausted");
  EXPECT_FALSE(h.has_event("mirror_failed"));
}

TEST_F(CoreMirrorsTest, NothingIsCopiedUnasked) {
  spec.recovery.mirror_automatic = false;
  start();
  EXPECT_TRUE(h.sent<MirrorRanks>().empty());
}

TEST_F(CoreMirrorsTest, NothingIsCopiedWhereAWorkerTakesInNoCopies) {
  h.workers.at("w1").takes_copies = false;
  h.restart_worker("w1");
  start();
  EXPECT_TRUE(h.sent<MirrorRanks>().empty());
}

TEST_F(CoreMirrorsTest, AnotherHostIsPreferredToAnotherWorker) {
  CoreHarness two;
  two.add_worker("w0", 1, "a");
  two.add_worker("w1", 1, "a");
  two.add_worker("w2", 1, "b");
  two.add_worker("w3", 1, "b");
  const JobId id = two.submit_ok(spec);
  two.run(id);
  two.train(id, 1, 1);
  ASSERT_EQ(two.job(id).mirror.buddies.size(), 4u);
  std::set<WorkerId> all;
  for (const auto& [rank, buddy] : two.job(id).mirror.buddies) {
    const WorkerId own = two.record(id).placement[rank.value].worker;
    EXPECT_NE(two.core().find_worker(own)->host, two.core().find_worker(buddy)->host) << rank.value;
    all.insert(buddy);
  }
  EXPECT_EQ(all.size(), 4u) << "each has as many as the others";
}

// Ranks 0 and 1, of the first stage, on w0; 2 and 3, of the second, on w1 and w2.
TEST_F(CoreMirrorsTest, OfWorkersWithAsManyCopiesTheOneWithTheSameWeightsIsTaken) {
  CoreHarness three;
  three.add_worker("w0", 2);
  three.add_worker("w1", 1);
  three.add_worker("w2", 1);
  spec = flat_spec("stages", 2);
  spec.parallelism.pipeline = 2;
  spec.recovery.mirror_automatic = true;
  const JobId id = three.submit_ok(spec);
  three.run(id);
  three.train(id, 1, 1);
  std::vector<std::string> kept_by;
  for (const auto& [rank, buddy] : three.job(id).mirror.buddies) {
    kept_by.push_back(three.core().find_worker(buddy)->record.name);
  }
  EXPECT_EQ(kept_by, (std::vector<std::string>{"w1", "w2", "w0", "w1"}));
}

TEST_F(CoreMirrorsTest, ALostHostsRanksGoOnElsewhereFromTheirCopies) {
  const int64_t step = start_and_lose_w1();
  ASSERT_EQ(h.state(job), JobState::kStarting);
  EXPECT_TRUE(h.finds.empty()) << "nothing is looked for on disk";
  EXPECT_EQ(h.record(job).restore_step, step);
  const StatePlace w0 = {"host-w0:77", {1, 7}};
  const auto orders = h.sent<StartRank>();
  ASSERT_GE(orders.size(), 4u);
  for (size_t i = orders.size() - 4; i < orders.size(); ++i) {
    EXPECT_TRUE(orders[i].from_memory);
    EXPECT_EQ(orders[i].restore_step, step);
    EXPECT_EQ(orders[i].state_from, w0) << "all go back to the step that all have";
  }
  EXPECT_EQ(h.host_of(job, 0), "w0");
  EXPECT_EQ(h.host_of(job, 1), "w0");
  EXPECT_EQ(h.host_of(job, 2), "w2");
  EXPECT_EQ(h.host_of(job, 3), "w2");
  const std::string& reason = h.record(job).reason.message;
  EXPECT_NE(reason.find("rank 2 from a copy in the memory of w0"), std::string::npos) << reason;
  EXPECT_EQ(reason.find("rank 0 from"), std::string::npos) << reason;
}

TEST_F(CoreMirrorsTest, OfTwoCopiedStepsTheNewerThatAllHaveIsTaken) {
  start();
  train_to(60);
  lose("w1");
  stopped(held_of_w0(),
          {{Rank{0}, {40, 50}}, {Rank{1}, {40, 50}}, {Rank{2}, {40, 50}}, {Rank{3}, {40}}});
  EXPECT_EQ(h.record(job).restore_step, 40);
  EXPECT_TRUE(h.record(job).restored_from_memory);
}

TEST_F(CoreMirrorsTest, WithoutALostHostWhatDaemonsHoldIsNewer) {
  start();
  const int64_t step = mirror();
  train_to(60);
  h.kill_rank(job, 0);
  stopped(held_of_w0(), copies_of(step));
  h.workers.at("w1").ranks.clear();
  h.say("w1",
        RanksStopped{job, Epoch{1}, {{Rank{2}, {59, 60}}, {Rank{3}, {59, 60}}}, copies_of(step)});
  EXPECT_EQ(h.record(job).restore_step, 60);
  const auto orders = h.sent<StartRank>();
  ASSERT_EQ(orders.size(), 4u);
  for (const StartRank& order : orders) EXPECT_EQ(order.state_from, StatePlace());
}

TEST_F(CoreMirrorsTest, ACopyOlderThanTheCheckpointIsNotTaken) {
  start();
  const int64_t step = mirror();
  train_to(70);
  h.checkpoint(job, 60);
  lose("w1");
  stopped(held_of_w0(), copies_of(step));
  h.pass(seconds(2));
  ASSERT_EQ(h.finds.size(), 1u);
  h.answer_find();
  EXPECT_EQ(h.record(job).restore_step, 60);
}

TEST_F(CoreMirrorsTest, BothHostsLostMeansTheCheckpoint) {
  h.add_worker("w3", 2);
  start();
  mirror();
  train_to(60);
  lose("w1");
  lose("w0");
  expect_from_checkpoint();
}

TEST_F(CoreMirrorsTest, ARankOfWhichNobodyHasACopyMeansTheCheckpoint) {
  start();
  const int64_t step = mirror();
  train_to(60);
  lose("w1");
  stopped(held_of_w0(), {{Rank{0}, {step}}, {Rank{1}, {step}}, {Rank{2}, {step}}});
  expect_from_checkpoint();
}

TEST_F(CoreMirrorsTest, TheCopyOfARankThatCrashedIsNotTrusted) {
  start();
  const int64_t step = mirror();
  train_to(60);
  h.exit_rank(job, 2, ExitCode::kFailure, "exited with code 1");
  lose("w1");
  stopped(held_of_w0(), copies_of(step));
  expect_from_checkpoint();
}

TEST_F(CoreMirrorsTest, NorIsThatOfARankThatLeftNothing) {
  start();
  const int64_t step = mirror();
  train_to(60);
  h.kill_rank(job, 2);
  stopped({{Rank{0}, {59, 60}}}, copies_of(step));
  h.workers.at("w1").ranks.clear();
  h.say("w1",
        RanksStopped{job, Epoch{1}, {{Rank{2}, {59, 60}}, {Rank{3}, {59, 60}}}, copies_of(step)});
  expect_from_checkpoint();
}

TEST_F(CoreMirrorsTest, CopiesThatMayBeNeededAreHeldOnThoughNothingElseIs) {
  start();
  const int64_t step = mirror();
  train_to(60);
  h.kill_rank(job, 0);
  h.clear();
  for (int said = 0; said < 2; ++said) {
    stopped({}, copies_of(step));
    EXPECT_TRUE(h.sent<StopRanks>().empty()) << "w1 has not said what it holds";
  }
}

// Whatever made the fetch fail: how a rank ends says it (run_rank_process).
class FailedFetchTest : public CoreMirrorsTest, public ::testing::WithParamInterface<ExitCode> {};
INSTANTIATE_TEST_SUITE_P(, FailedFetchTest,
                         ::testing::Values(ExitCode::kFailure, ExitCode::kPeerLost,
                                           ExitCode::kNotFound, ExitCode::kPermission,
                                           ExitCode::kDataCorrupt),
                         [](const auto& code) {
                           return fmt::format("Code{}", static_cast<int>(code.param));
                         });

TEST_P(FailedFetchTest, AStartFromCopiesThatFailsIsFollowedByTheCheckpoint) {
  start_and_lose_w1();
  h.spawn_ranks(job);
  h.clear();
  h.exit_rank(job, 2, GetParam(),
              fmt::format("exited with code {}: fetch the state", static_cast<int>(GetParam())));
  const auto stops = h.sent<StopRanks>();
  ASSERT_EQ(stops.size(), 2u);
  for (const StopRanks& stop : stops) EXPECT_FALSE(stop.keep_state);
  h.confirm_stops(job);
  expect_from_checkpoint(/*read_everything=*/GetParam() == ExitCode::kDataCorrupt);
}

TEST_F(CoreMirrorsTest, WithoutRoomTheCopiesStayUntilTheDaemonIsBack) {
  const int64_t step = start_and_lose_w1_without_room();
  h.clear();
  stopped(held_of_w0(), copies_of(step));
  h.pass(seconds(2));
  ASSERT_EQ(h.finds.size(), 1u);
  h.answer_find();
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_TRUE(h.sent<StopRanks>().empty()) << "w0 lets go of nothing";
  h.workers.at("w1").alive = true;
  h.restart_worker("w1");
  ASSERT_EQ(h.state(job), JobState::kStarting);
  EXPECT_TRUE(h.record(job).restored_from_memory);
  EXPECT_EQ(h.record(job).restore_step, step);
  EXPECT_EQ(h.host_of(job, 2), "w1");
}

TEST_F(CoreMirrorsTest, ACoordinatorThatIsRestartedMeanwhileKnowsWhereTheCopiesAre) {
  const int64_t step = start_and_lose_w1();
  ASSERT_EQ(h.state(job), JobState::kStarting);
  h.restart_coordinator();
  h.clear();
  h.register_worker("w2");
  h.pass(seconds(3));
  EXPECT_TRUE(h.sent<StartRank>().empty()) << "w0 has not said where it can be reached";
  h.register_worker("w0");
  h.pass(seconds(3));
  ASSERT_GE(h.sent<StartRank>().size(), 4u);
  for (const StartRank& order : h.sent<StartRank>()) {
    EXPECT_EQ(order.state_from.address, "host-w0:77");
    EXPECT_EQ(order.restore_step, step);
  }
}

TEST_F(CoreMirrorsTest, AfterARecoveryCopiesAreMadeAnew) {
  const int64_t step = start_and_lose_w1();
  h.run(job);
  h.clear();
  h.train(job, step + 1, step + 1);
  ASSERT_EQ(h.sent<MirrorRanks>().size(), 2u);
  EXPECT_EQ(newest_order("w2").epoch, Epoch{2});
  EXPECT_EQ(newest_order("w2").kept_step, 0);
}

// A restarted coordinator knows neither what it named last nor what is kept.
TEST_F(CoreMirrorsTest, AfterARestartCopiesGoOnFromWhatTheWorkersKnow) {
  start();
  h.restart_coordinator();
  h.register_worker("w0");
  h.register_worker("w1");
  h.clear();
  train_to(32);
  ASSERT_LT(newest_order("w0").kept_step, first);
  h.clear();
  RanksMirrored outdated{job, Epoch{1}, spec.training.steps, {}, false, true, first};
  h.say("w0", outdated);
  EXPECT_TRUE(h.sent<MirrorRanks>().empty()) << "the last step is not copied";
  outdated.step = 500;
  h.say("w0", outdated);
  for (const char* worker : {"w0", "w1"}) {
    EXPECT_EQ(newest_order(worker).step, 500);
    EXPECT_EQ(newest_order(worker).kept_step, first);
  }
  h.clear();
  h.say("w1", outdated);
  EXPECT_TRUE(h.sent<MirrorRanks>().empty()) << "it is known by now";
  answer_all(500);
  EXPECT_EQ(h.job(job).mirror.kept_step, 500);
}

TEST_F(CoreMirrorsTest, AWidthThatIsAskedForWhileThereIsNoRoomIsTakenOver) {
  spec = flat_spec("flat", 4);
  spec.recovery.mirror_automatic = true;
  spec.training.steps = 1000;
  const int64_t step = start_and_lose_w1_without_room();
  stopped(held_of_w0(), copies_of(step));
  h.pass(seconds(2));
  ASSERT_EQ(h.state(job), JobState::kRecovering) << "there is no room";
  ASSERT_TRUE(h.scale(job, 2).status.ok());
  h.pass(seconds(2));
  ASSERT_EQ(h.finds.size(), 1u);
  h.answer_find();
  EXPECT_EQ(h.state(job), JobState::kStarting) << h.record(job).reason.message;
  EXPECT_EQ(h.job(job).spec.parallelism.data, 2);
  EXPECT_FALSE(h.record(job).restored_from_memory) << "the copies are of another layout";
}

TEST_F(CoreMirrorsTest, WhatIsKeptIsNotShownOnceTheAttemptIsOver) {
  start();
  EXPECT_EQ(h.job(job).mirror.kept_step, first);
  h.kill_rank(job, 0);
  h.confirm_stops(job);
  EXPECT_EQ(h.job(job).mirror.kept_step, 0);
}

}  // namespace
}  // namespace penstock
