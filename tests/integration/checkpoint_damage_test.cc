// Damaged checkpoints are refused, named, and the older one is used; a lost index is made anew.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

// Every regular file under `folder`, largest last: segments are larger than manifests.
std::vector<Path> files_by_size(const Path& folder) {
  std::vector<Path> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file()) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end(), [](const Path& a, const Path& b) {
    return std::filesystem::file_size(a) < std::filesystem::file_size(b);
  });
  return files;
}

class CheckpointDamageTest : public ::testing::Test {
 protected:
  Json checkpoints_of(const std::string& id) const {
    return cluster_.get("/api/v1/jobs/" + id + "/checkpoints").at("items");
  }
  // Trains until three checkpoints exist, and cancels. Returns the job's id.
  std::string train_and_cancel() {
    const TinyJob job{.steps = 3000, .checkpoint_interval = 20};
    const std::string id = cluster_.submit(tiny_job_yaml(cluster_.folder(), job));
    EXPECT_TRUE(wait_until([&] { return checkpoints_of(id).size() >= 3; }, kPatience))
        << cluster_.describe(id);
    EXPECT_EQ(cluster_.call("POST", "/api/v1/jobs/" + id + "/cancel").status, 202);
    EXPECT_TRUE(cluster_.wait_for_state(id, "CANCELLED")) << cluster_.describe(id);
    return id;
  }
  // Resumes and expects the run to go on behind the checkpoint of `step`.
  void resume_after(const std::string& id, int64_t step) {
    ASSERT_EQ(cluster_.call("POST", "/api/v1/jobs/" + id + "/resume").status, 202);
    ASSERT_TRUE(wait_until(
        [&] {
          const Json now = cluster_.job(id);
          return now.at("state") == "RUNNING" && now.at("epoch") >= 2;
        },
        kPatience))
        << cluster_.describe(id);
    EXPECT_EQ(cluster_.job(id).at("first_step"), step + 1) << cluster_.describe(id);
  }

  // Damages the newest checkpoint's segments and expects the run to go on from the one before.
  void damage_and_resume(const std::function<void(const Path& segment)>& damage) {
    const std::string id = train_and_cancel();
    const Json checkpoints = checkpoints_of(id);
    const Json newest = checkpoints.back();
    const Json older = checkpoints[checkpoints.size() - 2];
    const std::string manifest = *read_file(newest.at("manifest").get<std::string>(), 64 << 20);
    int damaged = 0;
    const Path folder = cluster_.job(id).at("checkpoint_dir").get<std::string>();
    for (const Path& file : files_by_size(folder)) {
      if (manifest.find(file.filename().string()) != std::string::npos && damaged == 0) {
        damage(file);
        ++damaged;
      }
    }
    ASSERT_EQ(damaged, 1) << "the manifest names its segments";
    resume_after(id, older.at("step").get<int64_t>());
    EXPECT_TRUE(cluster_.has_event(id, "checkpoint_refused")) << cluster_.describe(id);
  }

  Cluster cluster_;
};

TEST_F(CheckpointDamageTest, AFlippedBitInASegmentIsNoticedAndTheOlderCheckpointUsed) {
  damage_and_resume([](const Path& segment) {
    const auto file = open_file(segment, O_RDWR);
    ASSERT_TRUE(file.ok());
    std::byte value{};
    const uint64_t middle = std::filesystem::file_size(segment) / 3;
    ASSERT_TRUE(read_at(file->get(), segment, middle, {&value, 1}).ok());
    value ^= std::byte{0x10};
    ASSERT_TRUE(write_at(file->get(), segment, middle, {&value, 1}).ok());
  });
}

TEST_F(CheckpointDamageTest, ATruncatedSegmentIsNoticedAndTheOlderCheckpointUsed) {
  damage_and_resume([](const Path& segment) {
    ASSERT_EQ(truncate(segment.c_str(), std::filesystem::file_size(segment) / 2), 0);
  });
}

TEST_F(CheckpointDamageTest, AMissingSegmentIsNoticedAndTheOlderCheckpointUsed) {
  damage_and_resume([](const Path& segment) { ASSERT_TRUE(std::filesystem::remove(segment)); });
}

TEST_F(CheckpointDamageTest, ALostIndexIsMadeAnewFromTheFilesAndNothingIsLost) {
  const std::string id = train_and_cancel();
  const Json before = checkpoints_of(id);
  cluster_.kill_coordinator();
  const Path state = cluster_.folder() / "coordinator";
  ASSERT_GT(std::filesystem::remove_all(state / "checkpoint-index"), 1u);
  const ProgramRun run = run_program(
      {binary("penstock").string(), "checkpoint", "reindex", state.string(), "-o", "json"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const Json indexed = Json::parse(run.out).at("items");
  ASSERT_EQ(indexed.size(), 1u) << run.out;
  EXPECT_EQ(indexed[0].at("checkpoints"), before.size());
  cluster_.start_coordinator();
  EXPECT_EQ(checkpoints_of(id).size(), before.size());
  resume_after(id, before.back().at("step").get<int64_t>());
  EXPECT_EQ(cluster_.log("coordinator").find("made anew from the manifests"), std::string::npos)
      << "reindex left the coordinator nothing to do";
}

}  // namespace
}  // namespace penstock
