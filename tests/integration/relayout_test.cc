// A run goes on in other layouts, from a checkpoint that another one saved.
#include <gtest/gtest.h>

#include <fstream>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

constexpr int kSteps = 1'000'000;

class RelayoutTest : public ::testing::Test {
 protected:
  // 16 sequences a step in every layout.
  std::string yaml(int pipeline, int expert, int data, const std::string& schedule) const {
    std::string text = tiny_job_yaml(cluster_.folder(), {.pipeline = pipeline,
                                                         .expert = expert,
                                                         .data = data,
                                                         .microbatches = 16 / (expert * data),
                                                         .steps = kSteps,
                                                         .checkpoint_interval = 20});
    const std::string at = "parallelism: {";
    return text.replace(text.find(at), at.size(), at + "schedule: " + schedule + ", ");
  }
  // Loss by step, of one epoch.
  std::map<int64_t, double> losses_of(const std::string& id, int64_t epoch) const {
    std::map<int64_t, double> losses;
    const Json steps = cluster_.get("/api/v1/jobs/" + id + "/steps?limit=10000");
    for (const Json& step : steps.at("items")) {
      if (step.at("epoch") == epoch) losses[step.at("step")] = step.at("loss");
    }
    return losses;
  }
  // Cancels the run when it has trained some steps after its newest checkpoint, whose step it
  // returns.
  int64_t stop_after_a_checkpoint(const std::string& id) const {
    for (;;) {
      EXPECT_TRUE(wait_until(
          [&] {
            const Json job = cluster_.job(id);
            return job.at("state") == "RUNNING" && job.at("checkpoint").is_object() &&
                   job.at("step") >= job.at("checkpoint").at("step").get<int64_t>() + 5;
          },
          kPatience))
          << cluster_.describe(id);
      EXPECT_EQ(penstock(cluster_, {"cancel", id}).exit_code, 0);
      EXPECT_TRUE(cluster_.wait_for_state(id, "CANCELLED")) << cluster_.describe(id);
      const Json job = cluster_.job(id);
      const int64_t saved = job.at("checkpoint").at("step");
      if (job.at("highest_step") >= saved + 3 || HasFailure()) return saved;
      EXPECT_EQ(penstock(cluster_, {"resume", id}).exit_code, 0);  // it was saved just then
    }
  }

  const Cluster cluster_{{.worker_count = 2, .devices_per_worker = 4}};
};

TEST_F(RelayoutTest, ARunOfEightRanksGoesOnInOtherLayoutsWithTheSameLosses) {
  const Path file = cluster_.folder() / "next.yaml";
  // Before anything runs: they write the data set, too.
  const std::string first = yaml(4, 2, 1, "dualpipe");
  const std::vector<std::string> others = {yaml(2, 4, 1, "1f1b"), yaml(1, 1, 1, "1f1b")};
  const std::string id = cluster_.submit(first);
  for (const std::string& next : others) {
    const int64_t saved = stop_after_a_checkpoint(id);
    const int64_t epoch = cluster_.job(id).at("epoch");
    std::ofstream(file) << next;
    const ProgramRun resumed = penstock(cluster_, {"resume", id, "--spec", file.string()});
    ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
    ASSERT_TRUE(wait_until(
        [&] {
          const Json job = cluster_.job(id);
          return job.at("epoch") > epoch && job.at("step") >= saved + 3;
        },
        kPatience))
        << cluster_.describe(id);
    EXPECT_EQ(cluster_.job(id).at("first_step"), saved + 1) << cluster_.describe(id);
    const std::map<int64_t, double> before = losses_of(id, epoch);
    const std::map<int64_t, double> after = losses_of(id, epoch + 1);
    for (int64_t step = saved + 1; step <= saved + 3; ++step) {
      EXPECT_NEAR(before.at(step), after.at(step), 1e-5) << "step " << step;
    }
  }
  EXPECT_EQ(cluster_.job(id).at("world_size"), 1);
}

TEST_F(RelayoutTest, ASpecThatTrainsSomethingElseIsRefusedWithItsPlace) {
  const std::string id = cluster_.submit(yaml(4, 2, 1, "dualpipe"));
  ASSERT_EQ(penstock(cluster_, {"cancel", id}).exit_code, 0);
  ASSERT_TRUE(cluster_.wait_for_state(id, "CANCELLED")) << cluster_.describe(id);
  std::string other = yaml(1, 1, 1, "1f1b");
  other.replace(other.find("lr: 3.0e-3"), 10, "lr: 1.0e-3");
  const Path file = cluster_.folder() / "next.yaml";
  std::ofstream(file) << other;
  const ProgramRun refused = penstock(cluster_, {"resume", id, "--spec", file.string()});
  EXPECT_EQ(refused.exit_code, 2);
  for (const char* part : {"next.yaml:", "optimizer is not the job's", "only parallelism"}) {
    EXPECT_NE(refused.err.find(part), std::string::npos) << part << " in " << refused.err;
  }
  EXPECT_EQ(cluster_.job(id).at("state"), "CANCELLED");
  EXPECT_EQ(penstock(cluster_, {"resume", id, "--spec", file.string(), "--prove", "1"}).exit_code,
            2);
}

}  // namespace
}  // namespace penstock
