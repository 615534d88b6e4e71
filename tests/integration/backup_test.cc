// Backups taken from running coordinators, and clusters that go on with one.
#include <gtest/gtest.h>
#include <signal.h>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

TEST(BackupTest, ARunGoesOnBitForBitWithRecordsOfYesterday) {
  Cluster cluster;
  const auto job = [&](const std::string& name) {
    return tiny_job_yaml(cluster.folder(), {.name = name, .steps = 600, .checkpoint_interval = 10});
  };
  const std::string calm = cluster.submit(job("calm"));
  ASSERT_TRUE(cluster.wait_for_state(calm, "SUCCEEDED")) << cluster.describe(calm);
  const std::string id = cluster.submit(job("restored"));
  ASSERT_TRUE(cluster.wait_for_step(id, 30)) << cluster.describe(id);

  const std::string file = (cluster.folder() / "a.backup").string();
  const ProgramRun taken = penstock(cluster, {"admin", "backup", file, "-o", "json"});
  ASSERT_EQ(taken.exit_code, 0) << taken.err;
  EXPECT_GT(Json::parse(taken.out).at("records"), 600);
  const ProgramRun again = penstock(cluster, {"admin", "backup", file});
  EXPECT_EQ(again.exit_code, 6) << again.err;  // docs/exit-codes.md: conflict

  // More happens than the backup knows: another attempt, another job.
  ASSERT_EQ(kill(cluster.rank_pid(id, 2), SIGKILL), 0);
  ASSERT_TRUE(wait_until([&] { return cluster.job(id).at("restarts") == 1; }, kPatience));
  ASSERT_TRUE(cluster.wait_for_step(id, 60)) << cluster.describe(id);
  const std::string later = cluster.submit(job("later"));
  ASSERT_FALSE(cluster.rank_pids(id).empty()) << "the backup is to differ from what runs";
  cluster.kill_coordinator();

  // Its disk is lost, but for the checkpoints.
  const Path state = cluster.folder() / "coordinator";
  for (const char* lost : {"state", "checkpoint-index", "logs"}) {
    std::filesystem::remove_all(state / lost);
  }
  const ProgramRun restored =
      run_program({binary("penstock"), "admin", "restore", file, "--state", state.string()});
  ASSERT_EQ(restored.exit_code, 0) << restored.err;
  EXPECT_NE(restored.err.find("2 jobs, of which 1 goes on from its newest checkpoint once"),
            std::string::npos)
      << restored.err;
  cluster.start_coordinator();
  EXPECT_TRUE(cluster.has_event(id, "restored")) << cluster.describe(id);
  EXPECT_EQ(cluster.final_weights(id), cluster.final_weights(calm));
  EXPECT_EQ(cluster.call("GET", "/api/v1/jobs/" + later).status, 404);
  const std::string next = cluster.submit(job("next"));
  EXPECT_GT(std::stoll(next), std::stoll(later)) << "no id is given twice";
}

TEST(BackupTest, ItIsTakenFromWhatACoordinatorLeftBehind) {
  Cluster cluster;
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), {.steps = 5}));
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  cluster.kill_coordinator();
  const std::string state = (cluster.folder() / "coordinator").string();
  const std::string file = (cluster.folder() / "a.backup").string();
  ASSERT_EQ(penstock(cluster, {"admin", "backup", file}).exit_code, 5) << "nobody to ask";
  EXPECT_FALSE(std::filesystem::exists(file + ".partial"));
  const ProgramRun taken = penstock(cluster, {"admin", "backup", file, "--state", state});
  ASSERT_EQ(taken.exit_code, 0) << taken.err;
  const ProgramRun over =
      run_program({binary("penstock"), "admin", "restore", file, "--state", state});
  EXPECT_EQ(over.exit_code, 6) << over.err;  // docs/exit-codes.md: conflict
  cluster.start_coordinator();
  EXPECT_EQ(cluster.job(id).at("state"), "SUCCEEDED") << "what is there is left alone";
}

}  // namespace
}  // namespace penstock
