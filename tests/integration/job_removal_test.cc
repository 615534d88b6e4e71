// penstock rm, against a real cluster.
#include <gtest/gtest.h>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

bool has_series(const Cluster& cluster, const std::string& id) {
  return cluster.call("GET", "/metrics").body.find("run=\"" + id + "\"") != std::string::npos;
}

TEST(JobRemovalTest, ARemovedJobLeavesNoRecordNoLogNoSeriesAndNoCheckpoint) {
  Cluster cluster(kTwoByTwo);
  const std::string kept = cluster.submit(tiny_job_yaml(cluster.folder(), {.name = "kept"}));
  ASSERT_TRUE(cluster.wait_for_state(kept, "SUCCEEDED")) << cluster.describe(kept);
  const std::string gone =
      cluster.submit(tiny_job_yaml(cluster.folder(), {.name = "gone", .steps = 100'000}));
  ASSERT_TRUE(cluster.wait_for_step(gone, 12)) << cluster.describe(gone);
  EXPECT_EQ(penstock(cluster, {"rm", "gone"}).exit_code, 6) << "it is running";
  ASSERT_EQ(penstock(cluster, {"cancel", "gone"}).exit_code, 0);
  ASSERT_TRUE(cluster.wait_for_state(gone, "CANCELLED")) << cluster.describe(gone);
  const Path directory = cluster.job(gone).at("checkpoint_dir").get<std::string>();
  const Path logs = directory.parent_path().parent_path() / "logs" / gone;
  EXPECT_TRUE(std::filesystem::exists(directory / "STORE"));
  EXPECT_TRUE(std::filesystem::exists(logs));
  EXPECT_TRUE(has_series(cluster, gone));
  const ProgramRun removed = penstock(cluster, {"rm", "gone", "--checkpoints", "-o", "json"});
  ASSERT_EQ(removed.exit_code, 0) << removed.err;
  EXPECT_EQ(Json::parse(removed.out).at("checkpoints_removed"), true);
  EXPECT_FALSE(std::filesystem::exists(directory));
  EXPECT_FALSE(std::filesystem::exists(logs));
  EXPECT_FALSE(has_series(cluster, gone));
  EXPECT_EQ(penstock(cluster, {"describe", gone}).exit_code, 3);
  cluster.kill_coordinator();
  cluster.start_coordinator();
  EXPECT_EQ(cluster.get("/api/v1/jobs").at("items").size(), 1u);
  EXPECT_EQ(cluster.job(kept).at("state"), "SUCCEEDED");
  ASSERT_EQ(penstock(cluster, {"rm", "kept"}).exit_code, 0);
  EXPECT_TRUE(std::filesystem::exists(directory.parent_path() / kept / "STORE"))
      << "checkpoints stay unless they are asked for";
  EXPECT_TRUE(cluster.get("/api/v1/jobs").at("items").empty());
}

}  // namespace
}  // namespace penstock
