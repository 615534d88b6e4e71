// A job gets more and fewer data-parallel replicas while it trains, and the same losses.
#include <gtest/gtest.h>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

class ScaleTest : public ::testing::Test {
 protected:
  static TinyJob job_of(int microbatches) {
    return {.expert = 1, .microbatches = microbatches, .steps = 300, .checkpoint_interval = 300};
  }
  std::string submit(const TinyJob& job) const {
    return cluster_.submit(tiny_job_yaml(cluster_.folder(), job));
  }
  bool trains_with(const std::string& id, int64_t data) const {
    return wait_until(
        [&] {
          const Json job = cluster_.job(id);
          return job.at("layout").at("data") == data && job.at("state") == "RUNNING" &&
                 job.at("step") >= job.at("first_step").get<int64_t>() + 10;
        },
        kPatience);
  }

  // Equal up to where the layout changed first, equal to rounding after it, and close for good:
  // what sums in another order change grows with every step.
  static void expect_same_curve(const std::map<int64_t, double>& losses,
                                const std::map<int64_t, double>& expected, int64_t first_change) {
    for (const auto& [step, loss] : losses) {
      const double tolerance = step <= first_change ? 0.0 : step <= first_change + 5 ? 1e-5 : 1e-2;
      EXPECT_NEAR(loss, expected.at(step), tolerance) << "step " << step;
    }
  }
  // The last step of the first epoch that is still the newest of its step.
  int64_t first_change(const std::string& id) const {
    int64_t change = 0;
    const Json steps = cluster_.get("/api/v1/jobs/" + id + "/steps?limit=10000");
    for (const Json& step : steps.at("items")) {
      if (step.at("epoch") == 2) return step.at("step").get<int64_t>() - 1;
      change = step.at("step");
    }
    return change;
  }

  Cluster cluster_{{.worker_count = 2, .devices_per_worker = 4}};
};

TEST_F(ScaleTest, AJobGrowsAndShrinksWithTheSameLosses) {
  const auto expected = undisturbed(cluster_, job_of(16)).losses;
  const std::string id = submit(job_of(16));
  ASSERT_TRUE(trains_with(id, 1)) << cluster_.describe(id);
  for (const int64_t data : {4, 2}) {
    const ProgramRun run = penstock(cluster_, {"scale", id, "--data", std::to_string(data)});
    ASSERT_EQ(run.exit_code, 0) << run.err;
    ASSERT_TRUE(trains_with(id, data)) << cluster_.describe(id);
    EXPECT_EQ(cluster_.job(id).at("ranks").size(), static_cast<size_t>(2 * data));
  }
  ASSERT_TRUE(cluster_.wait_for_state(id, "SUCCEEDED")) << cluster_.describe(id);
  const Json job = cluster_.job(id);
  EXPECT_EQ(job.at("restarts"), 0);
  EXPECT_EQ(job.at("failures"), 0);
  EXPECT_EQ(job.at("epoch"), 3);
  EXPECT_EQ(cluster_.trained_steps(id), 300u) << "none is trained twice";
  const auto losses = cluster_.losses(id);
  ASSERT_EQ(losses.size(), expected.size());
  expect_same_curve(losses, expected, first_change(id));
}

TEST_F(ScaleTest, AnElasticJobShrinksWhenAWorkerDiesAndGrowsWhenItIsBack) {
  const auto elastic = [&](const std::string& name) {
    std::string yaml = tiny_job_yaml(cluster_.folder(), {.name = name,
                                                         .pipeline = 2,
                                                         .expert = 1,
                                                         .data = 4,
                                                         .microbatches = 4,
                                                         .steps = 100'000,
                                                         .checkpoint_interval = 20});
    const std::string at = "parallelism: {";
    return cluster_.submit(yaml.replace(yaml.find(at), at.size(), at + "elastic: {min_data: 1}, "));
  };
  const std::string id = elastic("elastic");
  ASSERT_TRUE(trains_with(id, 4)) << cluster_.describe(id);
  cluster_.kill_worker("worker-1");
  ASSERT_TRUE(trains_with(id, 2)) << cluster_.describe(id);
  cluster_.start_worker("worker-1");
  ASSERT_TRUE(trains_with(id, 4)) << cluster_.describe(id);
  EXPECT_EQ(cluster_.job(id).at("failures"), 1);
  EXPECT_EQ(penstock(cluster_, {"cancel", id}).exit_code, 0);
  ASSERT_TRUE(cluster_.wait_for_state(id, "CANCELLED")) << cluster_.describe(id);
  const auto losses = cluster_.losses(id);
  const std::string undisturbed = elastic("undisturbed");
  ASSERT_TRUE(cluster_.wait_for_step(undisturbed, losses.rbegin()->first))
      << cluster_.describe(undisturbed);
  expect_same_curve(losses, cluster_.losses(undisturbed), first_change(id));
}

TEST_F(ScaleTest, WhatCannotBeIsRefusedWithWhatIsMissing) {
  const std::string id = submit(job_of(32));
  ASSERT_TRUE(cluster_.wait_for_step(id, 3)) << cluster_.describe(id);
  const ProgramRun devices = penstock(cluster_, {"scale", id, "--data", "8"});
  EXPECT_EQ(devices.exit_code, 6);
  EXPECT_NE(devices.err.find("8 are missing"), std::string::npos) << devices.err;
  const ProgramRun uneven = penstock(cluster_, {"scale", id, "--data", "3"});
  EXPECT_EQ(uneven.exit_code, 2);
  EXPECT_NE(uneven.err.find("32 sequences"), std::string::npos) << uneven.err;
}

}  // namespace
}  // namespace penstock
