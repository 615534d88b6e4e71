// Silent jobs: when their hosts are asked, and what follows from the answers.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

using std::chrono::milliseconds;
using std::chrono::minutes;
using std::chrono::seconds;

class CoreHangsTest : public ::testing::Test {
 protected:
  explicit CoreHangsTest(const CoreConfig& config = CoreHarness::test_config()) : h(config) {
    h.add_worker("w0", 2);
    h.add_worker("w1", 2);
    job = h.submit_ok(four_rank_spec());
    h.run(job);
    h.pass(milliseconds(500));  // every daemon has said what state its ranks are in
    h.clear();
  }
  void pass_until_asked() {
    h.clear();
    for (int i = 0; i < 200 && asked() == 0; ++i) h.pass(milliseconds(500));
  }
  // Rank 0 waits for 3, the others for 0; all for `quiet`.
  std::vector<RankActivity> ring(Duration quiet) const {
    std::vector<RankActivity> ranks(4);
    for (int32_t rank = 0; rank < 4; ++rank) {
      ranks[rank].rank = Rank{rank};
      ranks[rank].process = ProcessState::kSleeping;
      ranks[rank].recorded = true;
      ranks[rank].state = {.phase = FlightPhase::kTraining, .step = 31, .peer = rank == 0 ? 3 : 0};
      ranks[rank].quiet_ms = quiet / milliseconds(1);
    }
    ranks[3].state.peer = -1;
    ranks[3].process = ProcessState::kStopped;
    ranks[3].log_tail = "step 30\n";
    return ranks;
  }
  void answer(const std::string& worker, uint64_t request, const std::vector<RankActivity>& all) {
    RanksInspected answer{job, h.record(job).epoch, request, {}};
    for (const RankActivity& activity : all) {
      if (h.host_of(job, activity.rank.value) == worker) answer.ranks.push_back(activity);
    }
    h.say(worker, answer);
  }
  void answer_all(const std::vector<RankActivity>& all) {
    const auto asked = h.sent<InspectRanks>();
    ASSERT_FALSE(asked.empty());
    for (const char* worker : {"w0", "w1"}) {
      if (h.state(job) == JobState::kRunning) answer(worker, asked.back().request, all);
    }
  }
  size_t asked() const { return h.sent<InspectRanks>().size(); }

  CoreHarness h;
  JobId job;
};

TEST_F(CoreHangsTest, ASilentJobIsAskedAboutAndAStoppedRankFailsTheAttempt) {
  h.train(job, 1, 30);
  h.pass(milliseconds(59'500));
  EXPECT_EQ(asked(), 0U);
  h.pass(milliseconds(500));
  ASSERT_EQ(asked(), 2U) << "each host once";
  answer_all(ring(seconds(60)));
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  const Failure& failure = *h.record(job).last_failure;
  EXPECT_EQ(failure.reason.code, "rank_hung");
  EXPECT_EQ(failure.rank, Rank{3});
  EXPECT_EQ(failure.worker, h.host_of(job, 3));
  EXPECT_EQ(failure.step, 30);
  EXPECT_EQ(failure.reason.log_tail, "step 30\n");
  EXPECT_NE(failure.reason.message.find("is stopped"), std::string::npos);
  EXPECT_FALSE(failure.fatal);
  const auto stops = h.sent<StopRanks>();
  ASSERT_EQ(stops.size(), 2U);
  EXPECT_EQ(stops[0].grace_ms, 0) << "a stopped process does not take a SIGTERM";
  h.confirm_stops(job);
  h.pass(seconds(2));
  if (!h.finds.empty()) h.answer_find();
  EXPECT_EQ(h.record(job).epoch, Epoch{2}) << "it goes on like after any lost rank";
}

TEST_F(CoreHangsTest, ReportsAndProgressOfAnyRankPutTheQuestionOff) {
  h.train(job, 1, 30);
  h.pass(seconds(50));
  h.train(job, 31, 31);
  h.pass(seconds(50));
  auto& ranks = h.workers.at("w1").ranks;
  ranks.begin()->second.step = 32;  // of one rank, in a heartbeat
  h.pass(seconds(50));
  h.save_segment(job, 1, 20);
  h.pass(seconds(50));
  EXPECT_EQ(asked(), 0U);
}

TEST_F(CoreHangsTest, AJobThatIsOnlySlowGoesOnAndIsAskedAboutAgainLater) {
  h.train(job, 1, 30);
  h.pass(seconds(60));
  std::vector<RankActivity> all = ring(seconds(60));
  all[3].process = ProcessState::kRunning;
  all[3].quiet_ms = 5000;
  answer_all(all);
  EXPECT_EQ(h.state(job), JobState::kRunning);
  h.clear();
  h.pass(milliseconds(14'500));
  EXPECT_EQ(asked(), 0U);
  h.pass(seconds(1));
  EXPECT_EQ(asked(), 2U) << "after a quarter of the time";
  all[3].quiet_ms = 61'000;
  answer_all(all);
  EXPECT_EQ(h.state(job), JobState::kRecovering);
}

TEST_F(CoreHangsTest, LongStepsHaveLongerToFinish) {
  h.train(job, 1, 3, [](StepReport& report) { report.step_seconds = 40.0; });
  h.pass(seconds(199));
  EXPECT_EQ(asked(), 0U);
  h.pass(seconds(1));
  EXPECT_EQ(asked(), 2U) << "five of the slowest";
  answer_all(ring(seconds(199)));
  EXPECT_EQ(h.state(job), JobState::kRunning);
}

TEST_F(CoreHangsTest, BeforeTheFirstStepOnlyAStoppedProcessIsNamedSoon) {
  h.pass(seconds(60));
  ASSERT_EQ(asked(), 2U);
  std::vector<RankActivity> all = ring(seconds(599));
  all[3].process = ProcessState::kRunning;
  answer_all(all);
  EXPECT_EQ(h.state(job), JobState::kRunning) << "first steps touch memory";
  pass_until_asked();
  ASSERT_EQ(asked(), 2U);
  answer_all(ring(seconds(80)));
  EXPECT_EQ(h.record(job).last_failure->reason.code, "rank_hung");
}

TEST_F(CoreHangsTest, ARankThatHangsWhileItLoadsIsNamed) {
  const JobId cancelled = job;
  h.cancel(cancelled);
  h.confirm_stops(cancelled);
  job = h.submit_ok(four_rank_spec("next"));
  h.spawn_ranks(job);
  ASSERT_EQ(h.state(job), JobState::kLoading);
  for (const int32_t rank : {0, 1, 2}) h.ready(job, rank);
  h.clear();
  h.pass(seconds(600));
  ASSERT_GE(asked(), 2U);
  std::vector<RankActivity> all = ring(seconds(600));
  for (RankActivity& activity : all) activity.state = {.phase = FlightPhase::kReady};
  all[3].state.phase = FlightPhase::kLoading;
  all[3].process = ProcessState::kDiskSleep;
  pass_until_asked();
  const uint64_t request = h.sent<InspectRanks>().back().request;
  answer("w0", request, all);
  answer("w1", request, all);
  EXPECT_EQ(h.record(job).last_failure->rank, Rank{3});
  EXPECT_NE(h.record(job).last_failure->reason.message.find("loading"), std::string::npos);
}

TEST_F(CoreHangsTest, AnUnansweredQuestionIsAskedAnewAndKillsNothing) {
  h.train(job, 1, 30);
  h.pass(seconds(60));
  const uint64_t first = h.sent<InspectRanks>().back().request;
  std::vector<RankActivity> all = ring(seconds(60));
  all[3].process = ProcessState::kSleeping;
  answer(h.host_of(job, 0), first, all);
  h.clear();
  h.pass(minutes(2));
  EXPECT_EQ(h.state(job), JobState::kRunning) << "the edges lead to a host that says nothing";
  ASSERT_GE(asked(), 2U);
  EXPECT_NE(h.sent<InspectRanks>().back().request, first);
  answer("w0", first, all);
  answer("w1", first, all);
  EXPECT_EQ(h.state(job), JobState::kRunning) << "answers to an old question";
}

TEST_F(CoreHangsTest, AStoppedRankIsNamedByTheAnswersThatCame) {
  h.train(job, 1, 30);
  h.pass(seconds(60));
  answer(h.host_of(job, 3), h.sent<InspectRanks>().back().request, ring(seconds(60)));
  EXPECT_EQ(h.state(job), JobState::kRunning) << "the other host has two heartbeats";
  h.pass(seconds(2));
  EXPECT_EQ(h.record(job).last_failure->rank, Rank{3});
}

TEST_F(CoreHangsTest, AnAnswerOfRanksThatAreElsewhereIsNotBelieved) {
  h.train(job, 1, 30);
  h.pass(seconds(60));
  const uint64_t request = h.sent<InspectRanks>().back().request;
  const std::string other = h.host_of(job, 3) == "w0" ? "w1" : "w0";
  h.say(other, RanksInspected{job, Epoch{1}, request, ring(seconds(60))});
  h.pass(seconds(2));
  EXPECT_EQ(h.state(job), JobState::kRunning);
}

TEST_F(CoreHangsTest, ACoordinatorThatWasStoppedCountsNoSilence) {
  h.train(job, 1, 30);
  h.pass(seconds(50));
  h.jump(minutes(30));
  h.feed(Tick{});
  EXPECT_EQ(asked(), 0U);
  h.pass(seconds(9));
  EXPECT_EQ(asked(), 0U) << "it had heard fifty seconds of silence";
  h.pass(seconds(2));
  EXPECT_EQ(asked(), 2U);
}

TEST_F(CoreHangsTest, AnswersThatAStoppedCoordinatorReadsLateCountForNothing) {
  h.train(job, 1, 30);
  h.pass(seconds(60));
  ASSERT_EQ(asked(), 2U);
  h.jump(minutes(5));
  answer_all(ring(seconds(60)));
  EXPECT_EQ(h.state(job), JobState::kRunning);
  h.feed(Tick{});
  EXPECT_EQ(h.state(job), JobState::kRunning);
}

TEST_F(CoreHangsTest, ARestartedCoordinatorBeginsToCountAnew) {
  h.train(job, 1, 30);
  h.pass(seconds(50));
  h.restart_coordinator();
  for (const char* worker : {"w0", "w1"}) h.register_worker(worker);
  ASSERT_EQ(h.state(job), JobState::kRunning);
  h.clear();
  h.pass(seconds(59));
  EXPECT_EQ(asked(), 0U);
  h.pass(seconds(2));
  EXPECT_EQ(asked(), 2U);
}

TEST_F(CoreHangsTest, AWorkerThatRegistersAnewMayHaveMoreToSay) {
  h.train(job, 1, 30);
  h.pass(seconds(50));
  h.register_worker("w1");
  h.pass(seconds(59));
  EXPECT_EQ(asked(), 0U);
}

TEST_F(CoreHangsTest, AHangTimeoutOfZeroAsksNothing) {
  h.cancel(job);
  h.confirm_stops(job);
  JobSpec spec = four_rank_spec("patient");
  spec.recovery.hang_timeout = 0;
  job = h.submit_ok(spec);
  h.run(job);
  h.train(job, 1, 3);
  h.clear();
  h.pass(minutes(60));
  EXPECT_EQ(asked(), 0U);
}

// w1, with rank 3 and another, cannot be heard.
class UnreachableHostTest : public CoreHangsTest {
 protected:
  UnreachableHostTest() : CoreHangsTest(with_lease()) {
    h.train(job, 1, 30);  // of half a second
    h.workers.at("w1").alive = false;
  }
  static CoreConfig with_lease() {
    CoreConfig config = CoreHarness::test_config();
    config.lease = seconds(15);
    return config;
  }
};

TEST_F(UnreachableHostTest, TheOthersAreAskedEarlyAndWhoTheyAllWaitForIsGivenUp) {
  h.pass(milliseconds(3000));
  EXPECT_EQ(asked(), 0u) << "three beats are no silence yet";
  h.pass(milliseconds(1500));
  ASSERT_GT(asked(), 0u);
  answer("w0", h.sent<InspectRanks>().back().request, ring(milliseconds(4500)));
  ASSERT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_EQ(h.record(job).last_failure->worker, "w1");
  EXPECT_EQ(h.record(job).last_failure->reason.code, "worker_lost");
  EXPECT_NE(h.record(job).last_failure->reason.message.find("cannot be heard"), std::string::npos);
}

TEST_F(UnreachableHostTest, WhileTheOthersMoveNothingIsDone) {
  for (int i = 0; i < 3; ++i) {
    h.pass(milliseconds(1500));
    if (asked() > 0) answer("w0", h.sent<InspectRanks>().back().request, ring(milliseconds(100)));
  }
  EXPECT_EQ(h.state(job), JobState::kRunning);
}

TEST_F(UnreachableHostTest, WhileStepsComeNobodyIsAsked) {
  for (int64_t step = 31; step < 34; ++step) {
    h.pass(milliseconds(1500));
    h.train(job, step, step);
  }
  EXPECT_EQ(asked(), 0u);
}

TEST_F(UnreachableHostTest, BeforeTheFirstStepTheUsualTimeIsWaited) {
  CoreHarness fresh(with_lease());
  fresh.add_worker("w0", 2);
  fresh.add_worker("w1", 2);
  fresh.run(fresh.submit_ok(four_rank_spec()));
  fresh.workers.at("w1").alive = false;
  fresh.clear();
  fresh.pass(seconds(10));
  EXPECT_TRUE(fresh.sent<InspectRanks>().empty());
}

}  // namespace
}  // namespace penstock
