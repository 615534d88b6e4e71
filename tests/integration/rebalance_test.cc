// Experts that move between real ranks while a job trains.
#include <gtest/gtest.h>
#include <signal.h>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

// Sums are taken in another order on other seats, and a near tie may be routed otherwise.
void expect_close(const std::map<int64_t, double>& losses,
                  const std::map<int64_t, double>& wanted) {
  ASSERT_EQ(losses.size(), wanted.size());
  for (const auto& [step, loss] : wanted) EXPECT_NEAR(losses.at(step), loss, 2e-2) << step;
}

TEST(RebalanceTest, ExpertsMoveByThemselvesAndTheRunEndsLikeAnUndisturbedOne) {
  const Cluster cluster(kTwoByTwo);
  TinyJob job{.name = "still", .steps = 60, .checkpoint_interval = 10};
  const std::string still = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  ASSERT_TRUE(cluster.wait_for_state(still, "SUCCEEDED")) << cluster.describe(still);
  job.name = "moving";
  std::string yaml = tiny_job_yaml(cluster.folder(), job);
  const std::string grid = "micro_batch_size: 1";
  yaml.replace(yaml.find(grid), grid.size(), grid + ", rebalance: {threshold: 1.0}");
  const std::string moving = cluster.submit(yaml);
  ASSERT_TRUE(cluster.wait_for_state(moving, "SUCCEEDED")) << cluster.describe(moving);
  EXPECT_TRUE(cluster.has_event(moving, "rebalancing")) << cluster.describe(moving);
  EXPECT_GT(cluster.job(moving).at("epoch"), 1);
  EXPECT_EQ(cluster.job(moving).at("restarts"), 0);
  EXPECT_TRUE(cluster.job(moving).at("last_failure").is_null());
  expect_close(cluster.losses(moving), cluster.losses(still));
  const std::string metrics = cluster.call("GET", "/metrics").body;
  const auto has = [&](const std::string& name) {
    return metrics.find("\n" + name + "{run=\"" + moving + "\"}") != std::string::npos;
  };
  EXPECT_TRUE(has("penstock_run_rebalances_total"));
  EXPECT_TRUE(has("penstock_run_expert_rank_load_max_ratio"));
}

TEST(RebalanceTest, TheCommandLineAsksForAMoveAndARankKilledAfterItComesBack) {
  const Cluster cluster(kTwoByTwo);
  const std::string id = cluster.submit(
      tiny_job_yaml(cluster.folder(), {.steps = 100'000, .checkpoint_interval = 10}));
  EXPECT_EQ(penstock(cluster, {"rebalance", "nobody"}).exit_code, 3);
  ASSERT_TRUE(wait_until(
      [&] { return cluster.call("GET", "/api/v1/jobs/" + id + "/rebalance").status == 200; },
      kPatience))
      << cluster.describe(id);
  const ProgramRun plan = penstock(cluster, {"rebalance", id, "--dry-run", "-o", "json"});
  ASSERT_EQ(plan.exit_code, 0) << plan.err;
  const Json document = Json::parse(plan.out, nullptr, false);
  ASSERT_TRUE(document.is_object()) << plan.out;
  EXPECT_EQ(document["kind"], "Rebalance");
  EXPECT_EQ(document["requested"], false);
  EXPECT_GT(document["moved"], 0);
  EXPECT_LT(document["imbalance_after"], document["imbalance_before"]);
  EXPECT_FALSE(cluster.has_event(id, "rebalance_requested"));

  const auto settled = [&] {
    return cluster.has_event(id, "rebalancing") || cluster.has_event(id, "rebalance_dropped");
  };
  const pid_t stopped = cluster.rank_pid(id, 0);
  ASSERT_NE(stopped, 0);
  ASSERT_EQ(kill(stopped, SIGSTOP), 0);  // no further checkpoint, but one under way may still come
  const ProgramRun asked = penstock(cluster, {"rebalance", id});
  const ProgramRun shown = penstock(cluster, {"describe", id});
  EXPECT_TRUE(settled() || shown.out.find("\nrebalance   requested") != std::string::npos)
      << shown.out;
  // Where that checkpoint came, the rank may have been replaced by now.
  EXPECT_TRUE(kill(stopped, SIGCONT) == 0 || settled());
  ASSERT_EQ(asked.exit_code, 0) << asked.err;
  EXPECT_EQ(asked.out.find("LAYER"), 0u) << asked.out;
  ASSERT_TRUE(wait_until(settled, kPatience)) << cluster.describe(id);
  ASSERT_TRUE(cluster.wait_for_state(id, "RUNNING")) << cluster.describe(id);
  ASSERT_TRUE(wait_until([&] { return cluster.rank_pid(id, 1) != 0; }, kPatience));
  ASSERT_EQ(kill(cluster.rank_pid(id, 1), SIGKILL), 0);
  ASSERT_TRUE(wait_until(
      [&] {
        const Json job = cluster.job(id);
        return job.at("restarts") == 1 && job.at("state") == "RUNNING";
      },
      kPatience))
      << cluster.describe(id);
  const int64_t step = cluster.job(id).at("step");
  EXPECT_TRUE(cluster.wait_for_step(id, step + 20)) << cluster.describe(id);
  EXPECT_EQ(cluster.call("POST", "/api/v1/jobs/" + id + "/cancel").status, 202);
  ASSERT_TRUE(cluster.wait_for_state(id, "CANCELLED")) << cluster.describe(id);
  const ProgramRun late = penstock(cluster, {"rebalance", id, "-o", "json"});
  EXPECT_EQ(late.exit_code, 6) << late.err;
  EXPECT_EQ(Json::parse(late.out, nullptr, false)["error"]["code"], "failed_precondition");
}

}  // namespace
}  // namespace penstock
