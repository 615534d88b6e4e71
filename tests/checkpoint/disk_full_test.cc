// A full disk while saving: said as such, nothing left behind, the previous checkpoint stays good.
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>

#include "checkpoint/removal.h"
#include "checkpoint/store.h"
#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

// A file system of one mebibyte where this process may mount one; elsewhere a limit of as much per
// file, which the kernel enforces at the same calls.
class SmallDisk {
 public:
  SmallDisk() {
    mounted_ = ::mount("tmpfs", path().c_str(), "tmpfs", 0, "size=1m") == 0;
    if (mounted_) return;
    ::signal(SIGXFSZ, SIG_IGN);
    PENSTOCK_CHECK(::getrlimit(RLIMIT_FSIZE, &limit_) == 0);
    struct rlimit small = limit_;
    small.rlim_cur = 1 << 20;
    PENSTOCK_CHECK(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  }
  ~SmallDisk() {
    if (mounted_) {
      ::umount2(path().c_str(), MNT_DETACH);
    } else {
      ::setrlimit(RLIMIT_FSIZE, &limit_);
    }
  }
  const Path& path() const { return directory_.path(); }

 private:
  TempDirectory directory_;
  bool mounted_ = false;
  struct rlimit limit_ = {};
};

TEST(DiskFullTest, ASaveThatDoesNotFitIsRefusedAndThePreviousCheckpointStaysGood) {
  SmallDisk disk;
  auto store = CheckpointStore::open(disk.path(), kJob, nullptr);
  ASSERT_TRUE(store.ok()) << store.status().to_string();
  const CheckpointInfo first = commit_model(*store, kJob, Epoch{1}, 10, 1);
  const std::vector<std::string> before = *file_names(disk.path());

  const std::vector<OwnedSlice> large = {
      known_slice("large", DType::kU8, {2 << 20}, {{0}, {2 << 20}})};
  const auto summary = write_segment(disk.path(), {kJob, Epoch{1}, Rank{0}, 20}, sources_of(large));
  EXPECT_EQ(summary.status().code(), Code::kResourceExhausted) << summary.status().to_string();
  EXPECT_NE(summary.status().message().find("reserve"), std::string::npos)
      << "found before the first byte is written: " << summary.status().message();
  EXPECT_EQ(*file_names(disk.path()), before);
  EXPECT_EQ(newest_whole(disk.path(), kJob).checkpoint, first);
  EXPECT_TRUE(load_model(disk.path(), first.manifest_file, 1).ok());
  // What fits is saved as ever.
  EXPECT_EQ(commit_model(*store, kJob, Epoch{1}, 20, 2).commit_seq, 2u);
}

}  // namespace
}  // namespace penstock
