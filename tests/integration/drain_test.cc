// A worker is cleared for maintenance while its job goes on elsewhere.
#include <gtest/gtest.h>
#include <signal.h>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

class DrainTest : public ::testing::Test {
 protected:
  std::string submit(const std::string& name) const {
    return cluster_.submit(tiny_job_yaml(
        cluster_.folder(), {.name = name, .steps = kSteps, .checkpoint_interval = kSteps}));
  }
  std::string host_of_rank_0(const std::string& id) const {
    return cluster_.job(id).at("ranks").at(0).at("worker");
  }
  std::string state_of(const std::string& name) const {
    const Json workers = cluster_.get("/api/v1/workers");
    for (const Json& worker : workers.at("items")) {
      if (worker.at("name") == name) return worker.at("state");
    }
    return "";
  }

  static constexpr int kSteps = 300;
  Cluster cluster_{{.worker_count = 3, .devices_per_worker = 2}};
};

TEST_F(DrainTest, AJobMovesOffADrainedWorkerWithoutLosingAStepOrABit) {
  const std::string id = submit("moved");
  for (const int64_t step : {5, 100}) {
    ASSERT_TRUE(cluster_.wait_for_step(id, step)) << cluster_.describe(id);
    const std::string worker = host_of_rank_0(id);
    const ProgramRun drained =
        penstock(cluster_, {"drain", worker, "--reason", "new fan", "--wait"});
    ASSERT_EQ(drained.exit_code, 0) << drained.err << cluster_.describe(id);
    EXPECT_EQ(state_of(worker), "drained");
    ASSERT_TRUE(cluster_.wait_for_state(id, "RUNNING")) << cluster_.describe(id);
    for (const Json& rank : cluster_.job(id).at("ranks")) EXPECT_NE(rank.at("worker"), worker);
    const ProgramRun table = penstock(cluster_, {"workers"});
    EXPECT_NE(table.out.find("new fan"), std::string::npos) << table.out;
    EXPECT_EQ(penstock(cluster_, {"undrain", worker}).exit_code, 0);
    EXPECT_EQ(state_of(worker), "up");
  }
  const std::string weights = cluster_.final_weights(id);
  const Json job = cluster_.job(id);
  EXPECT_EQ(job.at("restarts"), 0);
  EXPECT_EQ(job.at("failures"), 0);
  EXPECT_EQ(cluster_.trained_steps(id), size_t{kSteps}) << "none is trained twice";
  EXPECT_EQ(weights, cluster_.final_weights(submit("undisturbed")));
}

TEST_F(DrainTest, ACoordinatorThatDiesOnTheWayGoesOnDraining) {
  const std::string id = submit("moved");
  ASSERT_TRUE(cluster_.wait_for_step(id, 5)) << cluster_.describe(id);
  const std::string worker = host_of_rank_0(id);
  ASSERT_EQ(penstock(cluster_, {"drain", worker}).exit_code, 0);
  cluster_.kill_coordinator();
  cluster_.start_coordinator();
  ASSERT_TRUE(wait_until([&] { return state_of(worker) == "drained"; }, kPatience))
      << cluster_.describe(id);
  const std::string weights = cluster_.final_weights(id);
  EXPECT_EQ(cluster_.job(id).at("restarts"), 0);
  ASSERT_EQ(penstock(cluster_, {"undrain", worker}).exit_code, 0);
  EXPECT_EQ(weights, cluster_.final_weights(submit("undisturbed")));
}

TEST_F(DrainTest, ADaemonThatIsToldToEndLetsItsJobSaveAndMove) {
  const std::string id = submit("moved");
  ASSERT_TRUE(cluster_.wait_for_step(id, 5)) << cluster_.describe(id);
  const std::string worker = host_of_rank_0(id);
  cluster_.kill_worker(worker, SIGTERM);
  EXPECT_EQ(state_of(worker), "left");
  const std::string weights = cluster_.final_weights(id);
  const Json job = cluster_.job(id);
  EXPECT_EQ(job.at("restarts"), 0) << cluster_.describe(id);
  EXPECT_EQ(job.at("failures"), 0);
  EXPECT_EQ(cluster_.trained_steps(id), size_t{kSteps}) << "none is trained twice";
  cluster_.start_worker(worker);
  EXPECT_TRUE(wait_until([&] { return state_of(worker) == "up"; }, kPatience));
  EXPECT_EQ(weights, cluster_.final_weights(submit("undisturbed")));
}

TEST_F(DrainTest, AWorkerThatIsNotThereIsNamedWithTheNearestThatIs) {
  const ProgramRun run = penstock(cluster_, {"drain", "worker-7"});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_NE(run.err.find("worker-"), std::string::npos) << run.err;
}

}  // namespace
}  // namespace penstock
