// A job gives its devices up and goes on later, whatever happens meanwhile, without losing a step.
#include <gtest/gtest.h>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

class SuspendTest : public ::testing::Test {
 protected:
  std::string submit(const std::string& name) const {
    return cluster_.submit(tiny_job_yaml(
        cluster_.folder(), {.name = name, .steps = kSteps, .checkpoint_interval = kSteps}));
  }
  void suspend(const std::string& id) const {
    const ProgramRun run = penstock(cluster_, {"suspend", id});
    ASSERT_EQ(run.exit_code, 0) << run.err;
  }
  void resume(const std::string& id) const {
    ASSERT_EQ(penstock(cluster_, {"resume", id}).exit_code, 0) << cluster_.describe(id);
  }

  static constexpr int kSteps = 300;
  Cluster cluster_{kTwoByTwo};
};

TEST_F(SuspendTest, SuspendedAndResumedJobsEndWithTheBitsOfAnUndisturbedRun) {
  const std::string id = submit("suspended");
  for (const int64_t step : {3, 60, 120}) {
    ASSERT_TRUE(cluster_.wait_for_step(id, step)) << cluster_.describe(id);
    suspend(id);
    ASSERT_TRUE(cluster_.wait_for_state(id, "SUSPENDED")) << cluster_.describe(id);
    for (const pid_t pid : cluster_.rank_pids(id)) EXPECT_EQ(pid, 0) << "its ranks have ended";
    const Json job = cluster_.job(id);
    EXPECT_EQ(job.at("checkpoint").at("step"), job.at("highest_step")) << "no step is lost";
    if (step == 60) cluster_.final_weights(submit("other"));  // the devices are free
    resume(id);
  }
  const std::string weights = cluster_.final_weights(id);
  const Json job = cluster_.job(id);
  EXPECT_EQ(job.at("restarts"), 0);
  EXPECT_EQ(job.at("failures"), 0);
  EXPECT_EQ(cluster_.trained_steps(id), size_t{kSteps}) << "none is trained twice";
  EXPECT_EQ(weights, cluster_.final_weights(submit("undisturbed")));
}

TEST_F(SuspendTest, ACoordinatorThatDiesOnTheWayGoesOnWithIt) {
  const std::string id = submit("suspended");
  ASSERT_TRUE(cluster_.wait_for_step(id, 5)) << cluster_.describe(id);
  suspend(id);
  cluster_.kill_coordinator();
  cluster_.start_coordinator();
  ASSERT_TRUE(cluster_.wait_for_state(id, "SUSPENDED")) << cluster_.describe(id);
  cluster_.kill_coordinator();
  cluster_.start_coordinator();
  EXPECT_EQ(cluster_.job(id).at("state"), "SUSPENDED");
  EXPECT_NE(penstock(cluster_, {"ps"}).out.find("SUSPENDED"), std::string::npos);
  EXPECT_EQ(penstock(cluster_, {"rm", id}).exit_code, 6);
  resume(id);
  const std::string weights = cluster_.final_weights(id);
  EXPECT_EQ(cluster_.job(id).at("restarts"), 0);
  EXPECT_EQ(weights, cluster_.final_weights(submit("undisturbed")));
}

}  // namespace
}  // namespace penstock
