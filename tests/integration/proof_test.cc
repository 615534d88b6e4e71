// Checkpoints whose interval the coordinator chooses, and resumes that compare what they replay.
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

TEST(ProofTest, ACancelledRunIsProvedReproducibleAndGoesOn) {
  const Cluster cluster(kTwoByTwo);
  const std::string id = cluster.submit(
      tiny_job_yaml(cluster.folder(), {.steps = 100'000, .checkpoint_interval = 10}));
  ASSERT_TRUE(cluster.wait_for_step(id, 25)) << cluster.describe(id);
  ASSERT_EQ(penstock(cluster, {"cancel", id}).exit_code, 0);
  ASSERT_TRUE(cluster.wait_for_state(id, "CANCELLED")) << cluster.describe(id);
  // From before the newest checkpoint, so that there is one to compare.
  const Json cancelled = cluster.job(id);
  const int64_t newest = cancelled.at("checkpoint").at("step");
  const int64_t steps = cancelled.at("highest_step").get<int64_t>() - newest + 2;
  const ProgramRun proof =
      penstock(cluster, {"resume", id, "--prove", std::to_string(steps), "-o", "json"});
  ASSERT_EQ(proof.exit_code, 0) << proof.err << cluster.describe(id);
  const Json document = Json::parse(proof.out);
  EXPECT_EQ(document.at("kind"), "Proof");
  EXPECT_EQ(document.at("proved"), true);
  const std::string message = document.at("message");
  EXPECT_NE(message.find("every loss and gradient norm is equal"), std::string::npos) << message;
  EXPECT_NE(message.find("so are the digests of"), std::string::npos) << message;
  const int64_t highest = cluster.job(id).at("highest_step");
  EXPECT_TRUE(cluster.wait_for_step(id, highest + 10)) << cluster.describe(id);
  ASSERT_EQ(penstock(cluster, {"cancel", id}).exit_code, 0);
  ASSERT_TRUE(cluster.wait_for_state(id, "CANCELLED"));
  EXPECT_EQ(penstock(cluster, {"resume", id, "--prove", "99999"}).exit_code, 6);
}

TEST(ProofTest, TheCoordinatorChoosesAnIntervalAndTheRunEndsAsWithAnyOther) {
  const Cluster cluster(kTwoByTwo);
  TinyJob job{.name = "fixed", .steps = 60, .checkpoint_interval = 7};
  const std::string fixed = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  ASSERT_TRUE(cluster.wait_for_state(fixed, "SUCCEEDED")) << cluster.describe(fixed);
  job.name = "automatic";
  std::string yaml = tiny_job_yaml(cluster.folder(), job);
  const std::string interval = "interval: 7";
  ASSERT_NE(yaml.find(interval), std::string::npos);
  // Failures so often that only the limit on the overhead counts.
  yaml.replace(yaml.find(interval), interval.size(),
               "interval: auto, device_mtbf_hours: 1e-9, max_overhead: 1");
  const std::string automatic = cluster.submit(yaml);
  ASSERT_TRUE(cluster.wait_for_state(automatic, "SUCCEEDED")) << cluster.describe(automatic);
  EXPECT_EQ(cluster.losses(automatic), cluster.losses(fixed));
  EXPECT_EQ(cluster.job(automatic).at("checkpoint").at("weights_digest"),
            cluster.job(fixed).at("checkpoint").at("weights_digest"));
  const std::vector<std::string> chosen = cluster.event_messages(automatic, "checkpoint_interval");
  ASSERT_FALSE(chosen.empty()) << cluster.describe(automatic);
  EXPECT_NE(chosen.back().find("a checkpoint every"), std::string::npos) << chosen.back();
  const Json steps = cluster.get("/api/v1/jobs/" + automatic + "/steps");
  EXPECT_GT(steps.at("items").at(9).at("checkpoint_seconds"), 0.0) << "saved after step 10";
  EXPECT_EQ(steps.at("items").at(8).at("checkpoint_seconds"), 0.0);
  EXPECT_NE(penstock(cluster, {"describe", automatic}).out.find("a checkpoint every"),
            std::string::npos);
}

TEST(ProofTest, WithAChosenIntervalTheNewestRecordedCheckpointIsComparedToo) {
  const Cluster cluster(kTwoByTwo);
  std::string yaml = tiny_job_yaml(cluster.folder(), {.steps = 100'000, .checkpoint_interval = 7});
  const std::string interval = "interval: 7";
  yaml.replace(yaml.find(interval), interval.size(),
               "interval: auto, device_mtbf_hours: 1e-9, max_overhead: 1, keep_last: 1000");
  const std::string id = cluster.submit(yaml);
  const auto saved_steps = [&] {
    std::vector<int64_t> steps;
    const Json checkpoints = cluster.get("/api/v1/jobs/" + id + "/checkpoints");
    for (const Json& item : checkpoints.at("items")) steps.push_back(item.at("step"));
    std::sort(steps.begin(), steps.end());
    return steps;
  };
  ASSERT_TRUE(wait_until([&] { return saved_steps().size() >= 3; }, kPatience))
      << cluster.describe(id);
  ASSERT_EQ(penstock(cluster, {"cancel", id}).exit_code, 0);
  ASSERT_TRUE(cluster.wait_for_state(id, "CANCELLED")) << cluster.describe(id);
  const std::vector<int64_t> steps = saved_steps();
  const int64_t highest = cluster.job(id).at("highest_step");
  // From the last checkpoint but one, so that the last one lies on the way.
  const int64_t wanted = highest - steps.at(steps.size() - 2);
  const ProgramRun proof =
      penstock(cluster, {"resume", id, "--prove", std::to_string(wanted), "-o", "json"});
  ASSERT_EQ(proof.exit_code, 0) << proof.err << cluster.describe(id);
  const std::string message = Json::parse(proof.out).at("message");
  EXPECT_NE(message.find("so are the digests of"), std::string::npos) << message;
  EXPECT_TRUE(cluster.wait_for_step(id, highest + 5)) << cluster.describe(id);
}

}  // namespace
}  // namespace penstock
