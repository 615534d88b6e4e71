// A disk under the checkpoints that is full, or turns read-only: the run goes on, the previous
// checkpoint stays good, the event says so.
#include <gtest/gtest.h>

#include "tests/support/cluster.h"
#include "tests/support/small_disk.h"

namespace penstock {
namespace {

// A run with a small disk of its own for its checkpoints, of which one is there.
class DiskFullTest : public ::testing::Test {
 protected:
  void SetUp() override {
    TinyJob job{.steps = 100'000, .checkpoint_interval = 20};
    job.checkpoint_dir = checkpoints_.string();
    id_ = cluster_.submit(tiny_job_yaml(cluster_.folder(), job));
    ASSERT_TRUE(
        wait_until([&] { return !cluster_.job(id_).at("checkpoint").is_null(); }, kPatience))
        << cluster_.describe(id_);
  }
  int64_t saved_step() const { return cluster_.job(id_).at("checkpoint").at("step"); }
  // Returns the step of the checkpoint that is kept.
  int64_t expect_to_go_on_without_saving() {
    EXPECT_TRUE(wait_until([&] { return cluster_.has_event(id_, "checkpoint_failed"); }, kPatience))
        << cluster_.describe(id_);
    const int64_t kept = saved_step();
    const int64_t step = cluster_.job(id_).at("step");
    EXPECT_TRUE(cluster_.wait_for_step(id_, step + 30)) << cluster_.describe(id_);
    EXPECT_EQ(cluster_.job(id_).at("restarts"), 0) << cluster_.describe(id_);
    EXPECT_EQ(saved_step(), kept);
    return kept;
  }
  void expect_to_save_again(int64_t kept) {
    EXPECT_TRUE(wait_until([&] { return saved_step() > kept; }, kPatience))
        << cluster_.describe(id_);
    EXPECT_EQ(cluster_.call("POST", "/api/v1/jobs/" + id_ + "/cancel").status, 202);
    EXPECT_TRUE(cluster_.wait_for_state(id_, "CANCELLED")) << cluster_.describe(id_);
  }

  const ScratchFolder scratch_;
  const Path mounted_ = scratch_.path() / "disk";
  const Path checkpoints_ = mounted_ / "checkpoints";
  const SmallDisk disk_{mounted_, 64 << 20};
  const Cluster cluster_;  // started inside the mount name space, so its ranks see the disk
  std::string id_;
};

TEST_F(DiskFullTest, TheRunGoesOnThePreviousCheckpointStaysAndTheEventSaysSo) {
  disk_.fill();
  const int64_t kept = expect_to_go_on_without_saving();
  disk_.free();
  expect_to_save_again(kept);
}

TEST_F(DiskFullTest, ARunOutlivesADiskThatTurnsReadOnlyForAWhile) {
  // Refused by the kernel while a file is being written, so between two saves.
  const auto remount = [&](unsigned long flags) {
    return mount(nullptr, mounted_.c_str(), nullptr, MS_REMOUNT | flags, nullptr) == 0;
  };
  ASSERT_TRUE(wait_until([&] { return remount(MS_RDONLY); }, kPatience));
  const int64_t kept = expect_to_go_on_without_saving();
  EXPECT_NE(cluster_.describe(id_).find("Read-only file system"), std::string::npos)
      << cluster_.describe(id_);
  const ProgramRun verified = penstock(cluster_, {"checkpoint", "verify", checkpoints_.string()});
  EXPECT_EQ(verified.exit_code, 0) << verified.out << verified.err;
  ASSERT_TRUE(remount(0));
  expect_to_save_again(kept);
}

}  // namespace
}  // namespace penstock
