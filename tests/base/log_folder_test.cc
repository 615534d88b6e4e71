#include "comm/base/log_folder.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

namespace penstock {
namespace {

constexpr uint64_t kKiB = 1024;

class LogFolderTest : public ::testing::Test {
 protected:
  LogFolderTest() {
    std::string pattern = ::testing::TempDir() + "/penstock_logs.XXXXXX";
    PENSTOCK_CHECK(mkdtemp(pattern.data()) != nullptr, pattern);
    root_ = pattern;
  }
  ~LogFolderTest() override { std::filesystem::remove_all(root_); }

  // A log of that many lines of 64 bytes, each with its number.
  Path write(const std::string& job, const std::string& name, int lines) {
    std::filesystem::create_directories(root_ / job);
    std::string text;
    for (int i = 0; i < lines; ++i) text += fmt::format("{:<63}\n", i);
    EXPECT_TRUE(write_and_sync(root_ / job / name, as_bytes(text)).ok());
    return root_ / job / name;
  }
  static uint64_t on_disk(const Path& path) {
    struct stat info = {};
    return ::stat(path.c_str(), &info) == 0 ? static_cast<uint64_t>(info.st_blocks) * 512 : 0;
  }

  Path root_;
};

TEST_F(LogFolderTest, WithinItsBoundsNothingChanges) {
  const Path log = write("1", "rank-0.log", 1000);
  const std::string before = *read_file(log, 1 << 20);
  ASSERT_TRUE(bound_logs(root_).ok());
  EXPECT_EQ(*read_file(log, 1 << 20), before);
  EXPECT_TRUE(bound_logs(root_ / "absent").ok());
}

TEST_F(LogFolderTest, ALogOverItsBoundLosesItsOlderHalfAndKeepsItsPositions) {
  const Path log = write("1", "rank-0.log", 4096);  // 256 KiB
  const Path other = write("1", "rank-1.log", 512);
  const std::string before = *read_file(log, 1 << 20);
  const uint64_t other_bytes = on_disk(other);
  ASSERT_TRUE(bound_logs(root_, {.file_bytes_max = 200 * kKiB}).ok());
  const std::string after = *read_file(log, 1 << 20);
  ASSERT_EQ(after.size(), before.size());
  EXPECT_EQ(after.substr(128 * kKiB), before.substr(128 * kKiB));
  EXPECT_EQ(after.find_first_not_of('\0'), 128 * kKiB);
  EXPECT_LE(on_disk(log), 132 * kKiB);
  EXPECT_EQ(on_disk(other), other_bytes);
}

TEST_F(LogFolderTest, AJobOverItsBoundLosesTextOfItsLongestLogs) {
  const Path longest = write("1", "rank-0.log", 8192);  // 512 KiB
  const Path shorter = write("1", "rank-1.log", 1024);  // 64 KiB
  ASSERT_TRUE(bound_logs(root_, {.job_bytes_max = 256 * kKiB}).ok());
  EXPECT_LE(on_disk(longest) + on_disk(shorter), 256 * kKiB);
  EXPECT_EQ(on_disk(shorter), 64 * kKiB);
  EXPECT_GT(on_disk(longest), 0u);
}

TEST_F(LogFolderTest, OverTheWholeBoundTheJobSilentLongestGoes) {
  const Path oldest = write("7", "rank-0.log", 4096);
  const Path middle = write("8", "rank-0.log", 4096);
  const Path newest = write("3", "rank-0.log", 4096);
  const auto now = std::filesystem::last_write_time(newest);
  std::filesystem::last_write_time(oldest, now - std::chrono::hours(2));
  std::filesystem::last_write_time(middle, now - std::chrono::hours(1));
  ASSERT_TRUE(bound_logs(root_, {.total_bytes_max = 600 * kKiB}).ok());
  EXPECT_FALSE(std::filesystem::exists(root_ / "7"));
  EXPECT_TRUE(std::filesystem::exists(middle));
  ASSERT_TRUE(bound_logs(root_, {.total_bytes_max = 1}).ok());
  EXPECT_FALSE(std::filesystem::exists(root_ / "8"));
  EXPECT_TRUE(std::filesystem::exists(newest));
}

TEST_F(LogFolderTest, BoundsThatCannotBeMetEnd) {
  write("1", "rank-0.log", 4096);
  EXPECT_TRUE(
      bound_logs(root_, {.file_bytes_max = 0, .job_bytes_max = 0, .total_bytes_max = 0}).ok());
}

TEST_F(LogFolderTest, LinksAreNotFollowed) {
  const Path outside = write("outside", "file", 4096);
  std::filesystem::create_directories(root_ / "1");
  std::filesystem::create_symlink(outside, root_ / "1" / "rank-0.log");
  const uint64_t before = on_disk(outside);
  ASSERT_TRUE(bound_logs(root_ / "1", {.file_bytes_max = 1}).ok());
  ASSERT_TRUE(bound_logs(root_, {.job_bytes_max = 300 * kKiB}).ok());
  EXPECT_EQ(on_disk(outside), before);
}

}  // namespace
}  // namespace penstock
