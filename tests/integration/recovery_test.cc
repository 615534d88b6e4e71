// What happens to a running job when its processes are killed.
#include <gtest/gtest.h>
#include <signal.h>

#include <regex>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

TEST(RecoveryTest, AnUndisturbedJobSucceedsAndLearns) {
  const Cluster cluster;
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), {.steps = 60}));
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  const auto losses = cluster.losses(id);
  ASSERT_EQ(losses.size(), 60u);
  EXPECT_NEAR(losses.begin()->second, std::log(257.0), 0.3);
  EXPECT_LT(losses.rbegin()->second, losses.begin()->second - 1.0);
  const Json evaluations = cluster.job(id).at("evaluations");
  ASSERT_GE(evaluations.size(), 2u);
  EXPECT_LT(evaluations.back().at("loss"), evaluations.front().at("loss"));
}

// With the state that daemons hold, and from the checkpoint.
class KilledRankTest : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(, KilledRankTest, testing::Values(true, false), [](const auto& from) {
  return from.param ? "FromMemory" : "FromTheCheckpoint";
});

TEST_P(KilledRankTest, IsReplacedAndTheRunEndsBitIdentical) {
  const Cluster cluster;
  // From memory checkpoints are too far apart for anything to be gone on from by accident.
  const TinyJob job{
      .steps = 200, .checkpoint_interval = GetParam() ? 1000 : 5, .from_memory = GetParam()};
  const Outcome expected = undisturbed(cluster, job);
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  for (const int victim : {2, 0}) {
    const int64_t step =
        cluster.job(id).at("step").is_number() ? cluster.job(id).at("step").get<int64_t>() : 0;
    ASSERT_TRUE(cluster.wait_for_step(id, step + 30)) << cluster.describe(id);
    const pid_t pid = cluster.rank_pid(id, victim);
    ASSERT_NE(pid, 0);
    ASSERT_EQ(kill(pid, SIGKILL), 0);
    ASSERT_TRUE(wait_until([&] { return cluster.job(id).at("restarts") == (victim == 2 ? 1 : 2); },
                           kPatience))
        << cluster.describe(id);
  }
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  EXPECT_EQ(cluster.job(id).at("restarts"), 2) << cluster.describe(id);
  EXPECT_EQ(cluster.job(id).at("last_failure").at("rank"), 0) << "the killed rank is the cause";
  int64_t from_memory = 0;
  for (const std::string& message : cluster.event_messages(id, "starting")) {
    from_memory += message.find("memory") != std::string::npos;
  }
  EXPECT_EQ(from_memory, GetParam() ? 2 : 0) << cluster.describe(id);
  EXPECT_EQ(outcome(cluster, id), expected) << cluster.describe(id);
}

TEST(RecoveryTest, AKilledDaemonTakesItsRankAlongAndTheJobGoesOnWhenItIsBack) {
  Cluster cluster;
  const TinyJob job{.steps = 200};
  const Outcome expected = undisturbed(cluster, job);
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  ASSERT_TRUE(cluster.wait_for_step(id, 40)) << cluster.describe(id);
  const auto before = cluster.rank_pids(id);
  cluster.kill_worker("worker-1");
  // The other ranks lost a peer, its own rank died with its daemon: none of the old processes
  // stays.
  ASSERT_TRUE(wait_until(
      [&] {
        for (const pid_t pid : before) {
          if (pid != 0 && kill(pid, 0) == 0) return false;
        }
        return true;
      },
      kPatience));
  EXPECT_NE(cluster.job(id).at("state"), "SUCCEEDED");
  EXPECT_NE(cluster.job(id).at("state"), "FAILED") << cluster.describe(id);
  cluster.start_worker("worker-1");
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  EXPECT_EQ(outcome(cluster, id), expected) << cluster.describe(id);
}

TEST(RecoveryTest, ASpareWorkerTakesOverForALostOne) {
  Cluster cluster({.worker_count = 5});
  const TinyJob job{.steps = 200};
  const Outcome expected = undisturbed(cluster, job);
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  ASSERT_TRUE(cluster.wait_for_step(id, 40)) << cluster.describe(id);
  const std::string lost = cluster.job(id).at("ranks")[0].at("worker");
  cluster.kill_worker(lost);
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  const Json events = cluster.get("/api/v1/jobs/" + id + "/events?limit=1000");
  for (const Json& item : events.at("items")) {
    EXPECT_NE(item.at("state"), "FAILED");
  }
  EXPECT_EQ(outcome(cluster, id), expected) << cluster.describe(id);
}

// Three heartbeats would be three minutes, and longer than the test waits.
TEST(RecoveryTest, AKilledDaemonIsLostByProofAndNotBySilence) {
  Cluster cluster({.worker_count = 5, .heartbeat_interval_ms = 60'000});
  const TinyJob job{.steps = 200};
  const Outcome expected = undisturbed(cluster, job);
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  ASSERT_TRUE(cluster.wait_for_step(id, 40)) << cluster.describe(id);
  const std::string killed = cluster.job(id).at("ranks")[1].at("worker");
  cluster.kill_worker(killed);
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  EXPECT_EQ(cluster.job(id).at("restarts"), 1) << cluster.describe(id);
  EXPECT_NE(cluster.job(id)
                .at("last_failure")
                .at("message")
                .get<std::string>()
                .find("the daemon of worker " + killed + " has ended"),
            std::string::npos)
      << cluster.describe(id);
  EXPECT_EQ(outcome(cluster, id), expected) << cluster.describe(id);
}

TEST(RecoveryTest, EightRanksRecoverBitIdenticalOnTheWayUpABatchSizeRamp) {
  const Cluster cluster({.worker_count = 4, .devices_per_worker = 2});
  const TinyJob job{.pipeline = 4,
                    .expert = 2,
                    .microbatches = 8,
                    .steps = 60,
                    .microbatch_ramp = "[{from_step: 12, value: 10}, {from_step: 35, value: 12}]"};
  const Outcome expected = undisturbed(cluster, job);
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  ASSERT_TRUE(cluster.wait_for_step(id, 20)) << cluster.describe(id);
  ASSERT_EQ(kill(cluster.rank_pid(id, 5), SIGKILL), 0);
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  EXPECT_EQ(cluster.job(id).at("restarts"), 1) << cluster.describe(id);
  EXPECT_EQ(outcome(cluster, id), expected) << cluster.describe(id);
}

TEST(RecoveryTest, ACorpusReplacedDuringARunEndsItUntilTheOldOneIsBack) {
  const Cluster cluster;
  const TinyJob job{.steps = 200};
  const Outcome expected = undisturbed(cluster, job);
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  ASSERT_TRUE(cluster.wait_for_step(id, 40)) << cluster.describe(id);
  make_dataset(cluster.folder(), "tiny-train", 99, 50'000);  // as large, of other text
  ASSERT_EQ(kill(cluster.rank_pid(id, 1), SIGKILL), 0);
  ASSERT_TRUE(cluster.wait_for_state(id, "FAILED")) << cluster.describe(id);
  EXPECT_EQ(cluster.job(id).at("restarts"), 1) << "the start that found it is the last";
  const Json failure = cluster.job(id).at("last_failure");
  EXPECT_EQ(failure.at("code"), "data_changed");
  const std::string message = failure.at("message");
  EXPECT_NE(message.find((cluster.folder() / "tiny-train.bin").string()), std::string::npos)
      << message;
  make_dataset(cluster.folder(), "tiny-train", 1, 50'000);
  EXPECT_EQ(cluster.call("POST", "/api/v1/jobs/" + id + "/resume").status, 202);
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  EXPECT_EQ(outcome(cluster, id), expected) << cluster.describe(id);
}

TEST(RecoveryTest, ATrainingThatDivergesFailsAtOnceAndKeepsItsLastGoodCheckpoint) {
  const Cluster cluster;
  std::string yaml = tiny_job_yaml(cluster.folder(), {.steps = 5000, .checkpoint_interval = 1});
  const std::string modest = "{lr: 3.0e-3}";
  ASSERT_NE(yaml.find(modest), std::string::npos);
  // Every step doubles the weights: long enough for a first checkpoint to be committed.
  yaml.replace(yaml.find(modest), modest.size(), "{lr: 1, weight_decay: 3}");
  const std::string id = cluster.submit(yaml);
  ASSERT_TRUE(cluster.wait_for_state(id, "FAILED")) << cluster.describe(id);
  const Json job = cluster.job(id);
  EXPECT_EQ(job.at("last_failure").at("code"), "diverged") << cluster.describe(id);
  EXPECT_EQ(job.at("failures"), 1) << "not retried";
  const std::string message = job.at("last_failure").at("message");
  std::smatch found;
  ASSERT_TRUE(std::regex_search(message, found,
                                std::regex("step ([0-9]+): loss .*, gradient norm .*; the last "
                                           "good checkpoint is of step ([0-9]+)$")))
      << message;
  EXPECT_GT(std::stoll(found[1]), job.at("checkpoint").at("step").get<int64_t>());
  const std::string log_tail = job.at("last_failure").at("log_tail");
  EXPECT_NE(log_tail.find("penstock-rank: "), std::string::npos) << log_tail;
  const ProgramRun shown = penstock(cluster, {"describe", id});
  EXPECT_NE(shown.out.find("\nlast output "), std::string::npos) << shown.out;
  EXPECT_EQ(shown.out.find("penstock resume"), std::string::npos) << "a replay ends the same way";
  const std::string metrics = cluster.call("GET", "/metrics").body;
  EXPECT_NE(metrics.find(fmt::format("penstock_run_nonfinite_steps_total{{run=\"{}\"}} 1", id)),
            std::string::npos);
}

TEST(RecoveryTest, TheRestartBudgetIsKept) {
  const Cluster cluster;
  const TinyJob job{.steps = 5000, .max_restarts = 1};
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  for (int restarts = 0; restarts < 2; ++restarts) {
    ASSERT_TRUE(wait_until(
        [&] {
          return cluster.job(id).at("state") == "RUNNING" &&
                 cluster.job(id).at("restarts") == restarts && cluster.rank_pid(id, 3) != 0;
        },
        kPatience))
        << cluster.describe(id);
    ASSERT_EQ(kill(cluster.rank_pid(id, 3), SIGKILL), 0);
  }
  EXPECT_TRUE(cluster.wait_for_state(id, "FAILED")) << cluster.describe(id);
  for (const pid_t pid : cluster.rank_pids(id)) EXPECT_EQ(pid, 0);
}

TEST(RecoveryTest, ACancelledJobStopsItsRanksAndResumesBitIdentical) {
  const Cluster cluster;
  const TinyJob job{.steps = 200};
  const Outcome expected = undisturbed(cluster, job);
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  ASSERT_TRUE(cluster.wait_for_step(id, 40)) << cluster.describe(id);
  EXPECT_EQ(cluster.call("POST", "/api/v1/jobs/" + id + "/cancel").status, 202);
  ASSERT_TRUE(cluster.wait_for_state(id, "CANCELLED")) << cluster.describe(id);
  for (const pid_t pid : cluster.rank_pids(id)) EXPECT_EQ(pid, 0);
  EXPECT_EQ(cluster.call("POST", "/api/v1/jobs/" + id + "/resume").status, 202);
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  EXPECT_EQ(outcome(cluster, id), expected) << cluster.describe(id);
}

}  // namespace
}  // namespace penstock
