// A disk under the checkpoints that is full, or turns read-only: the run goes on, the previous
// checkpoint stays good, the event says so.
#include <gtest/gtest.h>

#include "tests/support/cluster.h"
#include "tests/support/small_disk.h"

namespace penstock {
namespace {

TEST(DiskFullTest, TheRunGoesOnThePreviousCheckpointStaysAndTheEventSaysSo) {
  const ScratchFolder scratch;
  const SmallDisk disk(scratch.path() / "disk", 64 << 20);
  const Cluster cluster;  // started inside the mount name space, so its ranks see the disk
  TinyJob job{.steps = 100'000, .checkpoint_interval = 20};
  job.checkpoint_dir = (scratch.path() / "disk" / "checkpoints").string();
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  ASSERT_TRUE(wait_until([&] { return !cluster.job(id).at("checkpoint").is_null(); }, kPatience))
      << cluster.describe(id);
  disk.fill();
  ASSERT_TRUE(wait_until([&] { return cluster.has_event(id, "checkpoint_failed"); }, kPatience))
      << cluster.describe(id);
  const int64_t kept = cluster.job(id).at("checkpoint").at("step");
  const int64_t step = cluster.job(id).at("step");
  EXPECT_TRUE(cluster.wait_for_step(id, step + 30)) << "the run goes on\n" << cluster.describe(id);
  EXPECT_EQ(cluster.job(id).at("restarts"), 0) << cluster.describe(id);
  EXPECT_EQ(cluster.job(id).at("checkpoint").at("step"), kept);

  disk.free();
  EXPECT_TRUE(
      wait_until([&] { return cluster.job(id).at("checkpoint").at("step") > kept; }, kPatience))
      << "saving works again once there is room\n"
      << cluster.describe(id);
  EXPECT_EQ(cluster.call("POST", "/api/v1/jobs/" + id + "/cancel").status, 202);
  EXPECT_TRUE(cluster.wait_for_state(id, "CANCELLED")) << cluster.describe(id);
}

TEST(DiskFullTest, ARunOutlivesADiskThatTurnsReadOnlyForAWhile) {
  const ScratchFolder scratch;
  const Path mounted = scratch.path() / "disk";
  const SmallDisk disk(mounted, 64 << 20);
  const Cluster cluster;
  TinyJob job{.steps = 100'000, .checkpoint_interval = 20};
  job.checkpoint_dir = (mounted / "checkpoints").string();
  const std::string id = cluster.submit(tiny_job_yaml(cluster.folder(), job));
  ASSERT_TRUE(wait_until([&] { return !cluster.job(id).at("checkpoint").is_null(); }, kPatience))
      << cluster.describe(id);
  // Refused by the kernel while a file is being written, so between two saves.
  const auto remount = [&](unsigned long flags) {
    return mount(nullptr, mounted.c_str(), nullptr, MS_REMOUNT | flags, nullptr) == 0;
  };
  ASSERT_TRUE(wait_until([&] { return remount(MS_RDONLY); }, kPatience));
  ASSERT_TRUE(wait_until([&] { return cluster.has_event(id, "checkpoint_failed"); }, kPatience))
      << cluster.describe(id);
  EXPECT_NE(cluster.describe(id).find("Read-only file system"), std::string::npos)
      << cluster.describe(id);
  const int64_t kept = cluster.job(id).at("checkpoint").at("step");
  const int64_t step = cluster.job(id).at("step");
  EXPECT_TRUE(cluster.wait_for_step(id, step + 30)) << "the run goes on\n" << cluster.describe(id);
  EXPECT_EQ(cluster.job(id).at("restarts"), 0) << cluster.describe(id);
  EXPECT_EQ(cluster.job(id).at("checkpoint").at("step"), kept);
  const ProgramRun verified =
      run_program({binary("penstock"), "checkpoint", "verify", job.checkpoint_dir});
  EXPECT_EQ(verified.exit_code, 0) << verified.out << verified.err;
  ASSERT_TRUE(remount(0));
  EXPECT_TRUE(
      wait_until([&] { return cluster.job(id).at("checkpoint").at("step") > kept; }, kPatience))
      << cluster.describe(id);
  EXPECT_EQ(cluster.call("POST", "/api/v1/jobs/" + id + "/cancel").status, 202);
  EXPECT_TRUE(cluster.wait_for_state(id, "CANCELLED")) << cluster.describe(id);
}

}  // namespace
}  // namespace penstock
