// A rank that hangs is found, named and replaced; a coordinator that hangs kills nothing.
#include <gtest/gtest.h>
#include <signal.h>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

TEST(HangTest, AStoppedRankIsNamedWithThoseThatWaitForItAndTheRunEndsBitIdentical) {
  const Cluster cluster;
  const TinyJob job{.steps = 200, .hang_timeout = 10};
  const Outcome expected = undisturbed(cluster, job);
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  ASSERT_TRUE(cluster.wait_for_step(id, 40)) << cluster.describe(id);
  const pid_t victim = cluster.rank_pid(id, 2);
  ASSERT_NE(victim, 0);
  ASSERT_EQ(kill(victim, SIGSTOP), 0);
  ASSERT_TRUE(wait_until([&] { return cluster.job(id).at("restarts") == 1; }, kPatience))
      << cluster.describe(id);
  const Json failure = cluster.job(id).at("last_failure");
  EXPECT_EQ(failure.at("code"), "rank_hung") << cluster.describe(id);
  EXPECT_EQ(failure.at("rank"), 2) << cluster.describe(id);
  const std::string message = failure.at("message");
  for (const char* part : {"rank 2 on worker-", "has not moved for", "step ",
                           "its process is stopped", "waits for it"}) {
    EXPECT_NE(message.find(part), std::string::npos) << part << ": " << message;
  }
  EXPECT_NE(failure.at("log_tail").get<std::string>(), "") << "its last lines";
  EXPECT_NE(penstock(cluster, {"describe", id}).out.find(message), std::string::npos);
  EXPECT_TRUE(wait_until([&] { return kill(victim, 0) != 0; }, kPatience)) << "SIGKILL takes it";
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  EXPECT_TRUE(cluster.has_event(id, "rank_hung"));
  EXPECT_EQ(outcome(cluster, id), expected);
  const std::string metrics = cluster.call("GET", "/metrics").body;
  EXPECT_NE(metrics.find(fmt::format("penstock_run_hangs_total{{run=\"{}\"}} 1", id)),
            std::string::npos);
}

TEST(HangTest, ACoordinatorThatIsStoppedForLongerThanTheTimeoutKillsNothing) {
  Cluster cluster;
  const int hang_timeout = 10;
  const TinyJob job{.steps = 1'000'000, .checkpoint_interval = 0, .hang_timeout = hang_timeout};
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  ASSERT_TRUE(cluster.wait_for_step(id, 30)) << cluster.describe(id);
  const auto ranks = cluster.rank_pids(id);
  cluster.signal_coordinator(SIGSTOP);
  const auto replaced = [&] { return cluster.rank_pids(id) != ranks; };
  EXPECT_FALSE(wait_until(replaced, 2 * seconds(hang_timeout)));
  cluster.signal_coordinator(SIGCONT);
  const int64_t step = cluster.job(id).at("step");
  ASSERT_TRUE(cluster.wait_for_step(id, step + 30)) << cluster.describe(id);
  EXPECT_EQ(cluster.job(id).at("restarts"), 0) << cluster.describe(id);
  EXPECT_EQ(cluster.rank_pids(id), ranks);
  EXPECT_EQ(cluster.call("POST", "/api/v1/jobs/" + id + "/cancel").status, 202);
}

}  // namespace
}  // namespace penstock
