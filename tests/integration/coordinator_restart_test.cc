// The coordinator is not on the path of a step: jobs outlive it, and it forgets nothing.
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

TEST(CoordinatorRestartTest, ARunningJobGoesOnAndItsRecordIsWhole) {
  Cluster cluster;
  const std::string id =
      cluster.submit(tiny_job_yaml(cluster.folder(), {.steps = 400, .checkpoint_interval = 50}));
  ASSERT_TRUE(cluster.wait_for_step(id, 30)) << cluster.describe(id);
  const auto ranks = cluster.rank_pids(id);
  cluster.kill_coordinator();
  for (const pid_t pid : ranks) EXPECT_EQ(kill(pid, 0), 0) << "a rank ended with the coordinator";
  cluster.start_coordinator();
  ASSERT_TRUE(cluster.wait_for_step(id, 100)) << cluster.describe(id);
  EXPECT_EQ(cluster.rank_pids(id), ranks) << "no rank was restarted";
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  EXPECT_EQ(cluster.job(id).at("restarts"), 0) << cluster.describe(id);
  const auto losses = cluster.losses(id);
  for (int64_t step = 1; step <= 400; ++step) {
    EXPECT_TRUE(losses.contains(step)) << "no record of step " << step;
  }
}

TEST(CoordinatorRestartTest, AnAcknowledgedSubmissionSurvivesAKillAtOnce) {
  Cluster cluster;
  for (int round = 0; round < 5; ++round) {
    const std::string name = "kept-" + std::to_string(round);
    const std::string id =
        cluster.submit(tiny_job_yaml(cluster.folder(), {.name = name, .steps = 3}));
    cluster.kill_coordinator();
    cluster.start_coordinator();
    EXPECT_EQ(cluster.job(id).at("name"), name);
  }
  for (int round = 0; round < 5; ++round) {
    EXPECT_TRUE(cluster.wait_for_state("kept-" + std::to_string(round), "SUCCEEDED"))
        << cluster.describe("kept-" + std::to_string(round));
  }
}

TEST(CoordinatorRestartTest, ARankKilledWhileTheCoordinatorIsAwayIsRecoveredAfterwards) {
  Cluster cluster;
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), {.steps = 400}));
  ASSERT_TRUE(cluster.wait_for_step(id, 30)) << cluster.describe(id);
  const pid_t victim = cluster.rank_pid(id, 1);
  cluster.kill_coordinator();
  ASSERT_EQ(kill(victim, SIGKILL), 0);
  cluster.start_coordinator();
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  EXPECT_EQ(cluster.job(id).at("restarts"), 1) << cluster.describe(id);
}

TEST(CoordinatorRestartTest, ASecondOneOnItsFolderIsRefusedAndTheRunGoesOn) {
  const Cluster cluster;
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), {.steps = 100'000}));
  const Path state = cluster.folder() / "coordinator";
  ASSERT_TRUE(wait_until([&] { return !cluster.job(id).at("checkpoint").is_null(); }, kPatience))
      << cluster.describe(id);
  const std::string endpoints = read_file(state / "endpoints.json", 4096).value();
  const std::string holder = fmt::format("in use by another coordinator, process {} on ",
                                         Json::parse(endpoints).at("pid").get<int64_t>());
  for (int round = 0; round < 3; ++round) {
    const ProgramRun second =
        run_program({binary("penstock-coordinator"), "--state-dir", state.string(), "--http-port",
                     "0", "--control-port", "0"});
    EXPECT_EQ(second.exit_code, 6) << second.err;  // docs/exit-codes.md: conflict
    EXPECT_EQ(second.out, "");
    EXPECT_EQ(std::count(second.err.begin(), second.err.end(), '\n'), 1) << second.err;
    EXPECT_NE(second.err.find(state.string()), std::string::npos) << second.err;
    EXPECT_NE(second.err.find(holder), std::string::npos) << second.err;
  }
  EXPECT_EQ(*read_file(state / "endpoints.json", 4096), endpoints);
  const int64_t saved = cluster.job(id).at("checkpoint").at("step");
  EXPECT_TRUE(wait_until([&] { return cluster.job(id).at("checkpoint").at("step") > saved + 20; },
                         kPatience))
      << cluster.describe(id);
  EXPECT_EQ(cluster.job(id).at("restarts"), 0) << cluster.describe(id);
  EXPECT_EQ(cluster.call("POST", "/api/v1/jobs/" + id + "/cancel").status, 202);
  EXPECT_TRUE(cluster.wait_for_state(id, "CANCELLED")) << cluster.describe(id);
}

TEST(CoordinatorRestartTest, AFinishedJobIsStillThereWithItsLogsAndSteps) {
  Cluster cluster;
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), {.steps = 5}));
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  const Json before = cluster.job(id);
  cluster.kill_coordinator(SIGTERM);
  cluster.start_coordinator();
  const Json after = cluster.job(id);
  for (const char* key : {"id", "name", "state", "step", "finished", "evaluations", "checkpoint"}) {
    EXPECT_EQ(before.at(key), after.at(key)) << key;
  }
  EXPECT_EQ(cluster.losses(id).size(), 5u);
  EXPECT_FALSE(cluster.get("/api/v1/jobs/" + id + "/logs?rank=0&offset=0")
                   .at("text")
                   .get<std::string>()
                   .empty());
}

}  // namespace
}  // namespace penstock
