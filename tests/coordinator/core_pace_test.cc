// Slow ranks: found by what heartbeats say, told once, and replaced where the job asks for it.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

class CorePaceTest : public ::testing::Test {
 protected:
  CorePaceTest() {
    for (const char* name : {"w0", "w1", "w2"}) h.add_worker(name, 1);
  }
  void start(bool replace_slow, int64_t max_restarts = 5) {
    JobSpec spec = flat_spec("tiny", 2);
    spec.training.steps = 100'000;
    spec.recovery.replace_slow = replace_slow;
    spec.recovery.max_restarts = max_restarts;
    job = h.submit_ok(spec);
    h.run(job);
  }
  // Five steps a second; `slow` computes four times as long as the others, who wait for it.
  void train(seconds span, int32_t slow = -1) {
    for (auto left = 2 * span.count(); left > 0 && h.state(job) == JobState::kRunning; --left) {
      for (auto& [name, worker] : h.workers) {
        for (auto& [key, status] : worker.ranks) {
          const bool is_slow = std::get<2>(key).value == slow;
          for (int i = 0; i < 5; ++i) {
            ++status.step;
            ++status.pace.steps;
            status.pace.busy_seconds += is_slow ? 0.08 : 0.02;
            status.pace.wait_seconds += is_slow ? 0.001 : slow >= 0 ? 0.061 : 0.001;
          }
        }
      }
      h.pass(milliseconds(500));
    }
  }
  std::vector<std::string> messages_of(const std::string& code) {
    std::vector<std::string> found;
    for (const JobEvent& event : h.events) {
      if (event.reason.code == code) found.push_back(event.reason.message);
    }
    return found;
  }
  bool quarantined(const std::string& name) {
    return h.core().find_worker(name)->record.quarantine.has_value();
  }
  int64_t step() { return h.workers.at(h.host_of(job, 0)).ranks.begin()->second.step; }
  void move() {
    h.pause(job, step());
    h.confirm_stops(job);
    h.answer_find();
    ASSERT_EQ(h.state(job), JobState::kStarting) << h.record(job).reason.message;
    h.run(job);
  }

  CoreHarness h;
  JobId job;
};

TEST_F(CorePaceTest, ASlowRankIsNamedOnceAndAgainWhenItIsOver) {
  start(false);
  train(seconds(20));
  EXPECT_TRUE(messages_of(kSlowRank).empty());
  train(seconds(20), 1);
  const auto told = messages_of(kSlowRank);
  ASSERT_EQ(told.size(), 1u);
  const std::string host = h.host_of(job, 1);
  for (const std::string& part :
       {"rank 1 on " + host, std::string("since step "), std::string("4.0 times as long"),
        std::string("80.0 ms"), std::string("20.0")}) {
    EXPECT_NE(told[0].find(part), std::string::npos) << part << ": " << told[0];
  }
  ASSERT_EQ(h.job(job).slow.size(), 1u);
  EXPECT_NEAR(h.job(job).slow.at(Rank{1}).ratio, 4.0, 0.1);
  EXPECT_GT(h.job(job).slow.at(Rank{1}).since_step, 90);
  EXPECT_EQ(h.state(job), JobState::kRunning);
  EXPECT_FALSE(quarantined(host)) << "nobody asked for that";
  train(seconds(20));
  EXPECT_EQ(messages_of(kSlowRankOver).size(), 1u);
  EXPECT_TRUE(h.job(job).slow.empty());
}

TEST_F(CorePaceTest, WhoWasSlowIsForgottenWithTheAttempt) {
  start(false);
  train(seconds(20));
  train(seconds(20), 1);
  ASSERT_EQ(h.job(job).slow.size(), 1u);
  h.kill_rank(job, 0);
  h.confirm_stops(job);
  EXPECT_TRUE(h.job(job).slow.empty());
}

TEST_F(CorePaceTest, TheJobMovesOffTheHostOfASlowRankWhenItsSpecSaysSo) {
  start(true);
  train(seconds(10));
  const std::string host = h.host_of(job, 1);
  h.clear();
  train(seconds(20), 1);
  ASSERT_TRUE(quarantined(host));
  const Quarantine quarantine = *h.core().find_worker(host)->record.quarantine;
  EXPECT_EQ(quarantine.reason.code, kQuarantineSlow);
  EXPECT_NE(quarantine.reason.message.find("rank 1 on " + host), std::string::npos);
  EXPECT_TRUE(quarantine.until.has_value());
  EXPECT_FALSE(h.sent<PauseRanks>().empty());
  move();
  for (int32_t rank = 0; rank < 2; ++rank) EXPECT_NE(h.host_of(job, rank), host);
  EXPECT_EQ(h.record(job).failures, 0);
  EXPECT_EQ(h.record(job).restarts, 0);
  EXPECT_EQ(h.record(job).replacements, 1);
  EXPECT_TRUE(h.job(job).slow.empty()) << "that was another attempt";
}

TEST_F(CorePaceTest, WithoutASpareTheJobStaysAndSaysSoOnce) {
  start(true);
  for (const auto& [name, worker] : h.workers) {
    if (worker.ranks.empty()) {
      ASSERT_TRUE(h.drain(name, "").status.ok());
    }
  }
  train(seconds(40), 1);
  const auto kept = messages_of("slow_rank_kept");
  ASSERT_EQ(kept.size(), 1u);
  EXPECT_NE(kept[0].find("no other worker has room"), std::string::npos) << kept[0];
  EXPECT_EQ(h.state(job), JobState::kRunning);
  EXPECT_TRUE(h.sent<PauseRanks>().empty());
  EXPECT_FALSE(quarantined(h.host_of(job, 1)));
  for (const auto& [name, worker] : h.workers) {
    if (worker.ranks.empty()) {
      ASSERT_TRUE(h.undrain(name).status.ok());
    }
  }
  train(seconds(10), 1);
  EXPECT_FALSE(h.sent<PauseRanks>().empty()) << "now there is room";
}

TEST_F(CorePaceTest, RanksAreReplacedNoMoreOftenThanTheJobMayFail) {
  h.add_worker("w3", 1);
  start(true, 1);
  train(seconds(20), 1);
  ASSERT_EQ(h.record(job).replacements, 1);
  move();
  for (const auto& [name, worker] : h.workers) {
    if (quarantined(name)) {
      ASSERT_TRUE(h.release(name).status.ok());
    }
  }
  h.pass(seconds(1));
  train(seconds(30), 0);
  EXPECT_EQ(h.record(job).replacements, 1);
  const auto kept = messages_of("slow_rank_kept");
  ASSERT_EQ(kept.size(), 1u);
  EXPECT_NE(kept[0].find("1 time already"), std::string::npos) << kept[0];
}

TEST_F(CorePaceTest, ACoordinatorThatStartsLearnsAnewWhoIsSlow) {
  start(false);
  train(seconds(20), 1);
  ASSERT_EQ(messages_of(kSlowRank).size(), 1u);
  h.restart_coordinator();
  for (const auto& [name, known] : h.workers) h.register_worker(name);
  EXPECT_TRUE(h.job(job).slow.empty());
  train(seconds(20), 1);
  EXPECT_EQ(h.job(job).slow.size(), 1u);
}

TEST_F(CorePaceTest, ARatioOfNoneFindsNone) {
  CoreConfig config = CoreHarness::test_config();
  config.slow_ratio = 0.0;
  CoreHarness off(config);
  off.add_worker("w0", 2);
  const JobId id = off.submit_ok(flat_spec("tiny", 2));
  off.run(id);
  for (int i = 0; i < 60; ++i) {
    for (auto& [key, status] : off.workers.at("w0").ranks) {
      status.pace.steps += 5;
      status.pace.busy_seconds += std::get<2>(key).value == 1 ? 0.4 : 0.1;
    }
    off.pass(milliseconds(500));
  }
  EXPECT_FALSE(off.has_event(kSlowRank));
}

}  // namespace
}  // namespace penstock
