// penstock chaos on a real dev cluster: every fault, what came of it, and where it is refused.
#include <gtest/gtest.h>
#include <signal.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "ops/cli/local_process.h"
#include "ops/cli/stop_cycle.h"
#include "tests/support/cluster.h"

namespace penstock {
namespace {

// One cluster of three workers of two devices for all tests: four ranks and a spare.
class ChaosTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = std::make_unique<ScratchFolder>();
    const ProgramRun up =
        penstock({"dev", "up", "--workers", "3", "--devices-per-worker", "2", "--port", "0"});
    ASSERT_EQ(up.exit_code, 0) << up.err;
  }
  static void TearDownTestSuite() {
    EXPECT_EQ(penstock({"dev", "down"}).exit_code, 0);
    folder_.reset();
  }

  static ProgramRun penstock(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), binary("penstock").string());
    return run_program(arguments,
                       {"PENSTOCK_DEV_STATE_DIR=" + path("dev"), "PENSTOCK_SERVER=", "NO_COLOR=1"});
  }
  static Json json_of(std::vector<std::string> arguments, int exit_code = 0) {
    arguments.insert(arguments.end(), {"-o", "json"});
    const ProgramRun run = penstock(arguments);
    EXPECT_EQ(run.exit_code, exit_code) << arguments[0] << ": " << run.err;
    Json json = Json::parse(run.out, nullptr, false);
    EXPECT_TRUE(json.is_object()) << run.out << run.err;
    return json;
  }
  static std::string path(const std::string& name) { return (folder_->path() / name).string(); }

  // A job that trains until it is cancelled.
  void start_job(const std::string& name, int checkpoint_interval = 20, int step = 60) {
    const TinyJob job{.name = name,
                      .steps = 1'000'000,
                      .checkpoint_interval = checkpoint_interval,
                      .max_restarts = 100,
                      .hang_timeout = 10};
    std::ofstream(path(name + ".yaml")) << tiny_job_yaml(folder_->path(), job);
    ASSERT_EQ(penstock({"submit", path(name + ".yaml")}).exit_code, 0);
    ASSERT_EQ(penstock({"wait", name, "--for", fmt::format("step={}", step)}).exit_code, 0);
    job_ = name;
  }
  void TearDown() override {
    if (job_.empty()) return;
    EXPECT_EQ(penstock({"cancel", job_, "--grace", "0s"}).exit_code, 0);
    EXPECT_EQ(penstock({"wait", job_}).exit_code, 11);
  }

  inline static std::unique_ptr<ScratchFolder> folder_;
  std::string job_;
};

TEST_F(ChaosTest, AKilledRankIsReportedWithItsVerdictTheSourceAndTheSteps) {
  start_job("killed");
  const Json report = json_of({"chaos", "kill", "killed", "--rank", "2"});
  EXPECT_EQ(report["kind"], "ChaosReport");
  EXPECT_EQ(report["outcome"], "recovered") << report.dump(1);
  EXPECT_EQ(report["detected"]["code"], "rank_killed");
  EXPECT_NE(report["detected"]["message"].get<std::string>().find("rank 2 on "), std::string::npos);
  EXPECT_EQ(report["resumed"]["epoch"], 2);
  EXPECT_GT(report["next_step"], report["step"]);
  EXPECT_GT(report["recovery_seconds"], 0.0);
  EXPECT_GE(report["recovery_seconds"], report["detected"]["seconds"]);
  const ProgramRun text = penstock({"chaos", "kill", "killed", "--rank", "0"});
  EXPECT_EQ(text.exit_code, 0) << text.err;
  for (const char* part : {"fault       kill after step ", "\ndetected    after ",
                           "\nresumed     attempt 3 from ", "\nrecovered   step "}) {
    EXPECT_NE(text.out.find(part), std::string::npos) << part << "\n" << text.out;
  }
}

TEST_F(ChaosTest, APausedAndASlowedRankGoOnAndNothingIsRestarted) {
  start_job("paused");
  const Json paused = json_of({"chaos", "pause", "paused", "--rank", "1", "--for", "1s"});
  EXPECT_EQ(paused["outcome"], "undisturbed") << paused.dump(1);
  EXPECT_GE(paused["slowest_step_seconds"], 0.9) << paused.dump(1);
  const Json slow =
      json_of({"chaos", "slow", "paused", "--rank", "1", "--factor", "10", "--for", "1s"});
  EXPECT_EQ(slow["outcome"], "undisturbed") << slow.dump(1);
  EXPECT_GE(slow["slowest_step_seconds"], 0.08) << "a step waits for the stopped rank";
  EXPECT_EQ(json_of({"describe", "paused"})["restarts"], 0);
}

TEST_F(ChaosTest, APauseLongerThanTheHangTimeoutIsFoundAndNamed) {
  start_job("hung");
  const Json report = json_of({"chaos", "pause", "hung", "--rank", "3", "--for", "1h"});
  EXPECT_EQ(report["outcome"], "recovered") << report.dump(1);
  EXPECT_EQ(report["detected"]["code"], "rank_hung");
  EXPECT_NE(report["detected"]["message"].get<std::string>().find("rank 3 on "), std::string::npos);
}

TEST_F(ChaosTest, AWorkerThatIsCutOffIsLostAndTheSpareTakesOver) {
  start_job("cut");
  const Json report = json_of({"chaos", "partition", "cut", "--rank", "0", "--for", "30s"});
  EXPECT_EQ(report["outcome"], "recovered") << report.dump(1);
  EXPECT_EQ(report["detected"]["code"], "worker_lost") << report.dump(1);
  const std::string lost = report["worker"];
  const auto is_back = [&] {
    const Json workers = json_of({"workers"});
    for (const Json& worker : workers["items"]) {
      if (worker["name"] == lost) return worker["state"] == "up";
    }
    return false;
  };
  EXPECT_TRUE(wait_until(is_back, kPatience)) << "it comes back by itself";
}

TEST_F(ChaosTest, ADamagedCheckpointIsNoticedAndPassedOver) {
  start_job("damaged", /*checkpoint_interval=*/100, /*step=*/250);
  const Json report = json_of({"chaos", "corrupt", "damaged", "--rank", "1"});
  EXPECT_EQ(report["outcome"], "recovered") << report.dump(1);
  EXPECT_FALSE(report["tensor"].get<std::string>().empty());
  const int64_t damaged = report["checkpoint_step"];
  const std::string source = report["resumed"]["source"];
  EXPECT_EQ(source.find("the checkpoint of step "), 0u) << source << " shows no damage";
  const auto from_checkpoint_of = [&](int64_t step) {
    return source == fmt::format("the checkpoint of step {}", step);
  };
  EXPECT_FALSE(from_checkpoint_of(damaged)) << report.dump(1);
  if (from_checkpoint_of(damaged - 100)) {  // unless a newer one was committed in between
    EXPECT_FALSE(report["refused"].empty()) << report.dump(1);
    EXPECT_EQ(report["attempts"], 2) << "one that found the damage, one that passed it over";
  }
  const Json only = json_of({"chaos", "corrupt", "damaged", "--rank", "0", "--no-kill"});
  EXPECT_EQ(only["outcome"], "pending") << only.dump(1);
}

TEST_F(ChaosTest, WhatCannotBeDisturbedIsRefused) {
  EXPECT_EQ(penstock({"chaos", "kill", "nobody", "--rank", "0"}).exit_code, 3);
  std::ofstream(path("over.yaml")) << tiny_job_yaml(folder_->path(), {.name = "over", .steps = 2});
  ASSERT_EQ(penstock({"submit", path("over.yaml"), "--follow"}).exit_code, 0);
  const ProgramRun over = penstock({"chaos", "kill", "over", "--rank", "0"});
  EXPECT_EQ(over.exit_code, 6);
  EXPECT_NE(over.err.find("job over is SUCCEEDED: nothing of it runs any more; submit it again"),
            std::string::npos)
      << over.err;
  start_job("refusing");
  EXPECT_EQ(penstock({"chaos", "kill", "refusing", "--rank", "9"}).exit_code, 3);
  EXPECT_EQ(penstock({"chaos", "pause", "refusing", "--rank", "0", "--for", "-1s"}).exit_code, 2);
  EXPECT_EQ(penstock({"chaos", "slow", "refusing", "--rank", "0", "--factor", "1"}).exit_code, 2);
  EXPECT_EQ(penstock({"chaos", "kill", "refusing"}).exit_code, 2);
  const std::string server = json_of({"dev", "status"})["server"];
  const Json error = json_of({"chaos", "kill", "refusing", "--rank", "0", "--state-dir",
                              path("other"), "--server", server},
                             4);
  EXPECT_EQ(error["kind"], "Error");
}

TEST_F(ChaosTest, AClusterThatDevUpDidNotStartIsLeftAlone) {
  const Cluster cluster({.worker_count = 1});
  const std::string id = cluster.submit(
      tiny_job_yaml(cluster.folder(), {.pipeline = 1, .expert = 1, .steps = 1'000'000}));
  ASSERT_TRUE(cluster.wait_for_step(id, 5)) << cluster.describe(id);
  const auto ranks = cluster.rank_pids(id);
  for (const char* fault : {"kill", "pause", "slow", "partition", "corrupt"}) {
    const ProgramRun run =
        penstock({"chaos", fault, id, "--rank", "0", "--server", cluster.server()});
    EXPECT_EQ(run.exit_code, 4) << fault << run.err;
    EXPECT_NE(run.err.find("penstock dev up"), std::string::npos) << run.err;
  }
  EXPECT_EQ(cluster.rank_pids(id), ranks);
}

TEST_F(ChaosTest, APauseThatIsInterruptedLeavesTheRankRunning) {
  start_job("interrupted");
  SpawnOptions options;
  options.argv = {
      binary("penstock").string(), "chaos", "pause", "interrupted", "--rank", "0", "--for", "1h"};
  options.environment = {"PENSTOCK_DEV_STATE_DIR=" + path("dev"), "PENSTOCK_SERVER="};
  options.capture_output = false;
  auto pausing = ChildProcess::spawn(options);
  ASSERT_TRUE(pausing.ok());
  const std::string id = std::to_string(json_of({"describe", "interrupted"})["id"].get<int>());
  const auto is_stopped = [&] {
    for (const pid_t pid : all_processes()) {
      const auto words = command_line_of(pid);
      const auto has = [&](const std::string& flag, const std::string& value) {
        const auto at = std::find(words.begin(), words.end(), flag);
        return at != words.end() && at + 1 != words.end() && *(at + 1) == value;
      };
      const bool is_ours = std::any_of(words.begin(), words.end(), [&](const std::string& word) {
        return word.find(path("dev")) != std::string::npos;  // other tests have a job 1, too
      });
      if (is_ours && has("--job", id) && has("--rank", "0")) {
        return process_state(pid) == ProcessState::kStopped;
      }
    }
    return false;
  };
  ASSERT_TRUE(wait_until(is_stopped, kPatience));
  ASSERT_TRUE(pausing->send_signal(SIGINT).ok());
  EXPECT_EQ(pausing->wait().exit_code, 130);
  EXPECT_FALSE(is_stopped());
  EXPECT_EQ(json_of({"describe", "interrupted"})["restarts"], 0);
}

}  // namespace
}  // namespace penstock
