// A full disk under the checkpoints: the run goes on, the previous checkpoint stays good, the event
// says so.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <unistd.h>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

// A tmpfs of a given size, in a mount name space of this process, so that nothing outlives the
// test. Without root it is made in a user name space of its own.
class SmallDisk {
 public:
  SmallDisk(const Path& where, uint64_t bytes) : where_(where) {
    const uid_t user = geteuid();
    const gid_t group = getegid();
    const int flags = user == 0 ? CLONE_NEWNS : CLONE_NEWUSER | CLONE_NEWNS;
    PENSTOCK_CHECK(unshare(flags) == 0, errno);
    if (user != 0) {
      PENSTOCK_CHECK(write_and_sync("/proc/self/setgroups", as_bytes("deny")).ok());
      PENSTOCK_CHECK(
          write_and_sync("/proc/self/uid_map", as_bytes(fmt::format("0 {} 1", user))).ok());
      PENSTOCK_CHECK(
          write_and_sync("/proc/self/gid_map", as_bytes(fmt::format("0 {} 1", group))).ok());
    }
    PENSTOCK_CHECK(mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0, errno);
    std::filesystem::create_directories(where);
    const std::string options = fmt::format("size={}", bytes);
    PENSTOCK_CHECK(mount("tmpfs", where.c_str(), "tmpfs", 0, options.c_str()) == 0, errno);
  }
  ~SmallDisk() { umount2(where_.c_str(), MNT_DETACH); }

  // Takes all space that is left.
  void fill() const {
    const auto file = open_file(where_ / "filler", O_WRONLY | O_CREAT);
    PENSTOCK_CHECK(file.ok());
    const std::string block(4096, 'x');
    uint64_t offset = 0;
    while (write_at(file->get(), where_ / "filler", offset, as_bytes(block)).ok())
      offset += block.size();
  }
  void free() const { std::filesystem::remove(where_ / "filler"); }

 private:
  Path where_;
};

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

}  // namespace
}  // namespace penstock
