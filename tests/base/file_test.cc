#include "comm/base/file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

namespace penstock {
namespace {

// What this process has synced, in order.
std::vector<Path>& synced() {
  static std::vector<Path> paths;
  return paths;
}

}  // namespace
}  // namespace penstock

// In the place of the C library's: notes what is synced.
extern "C" int fsync(int fd) {
  using namespace penstock;
  synced().push_back(std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(fd)));
  return static_cast<int>(::syscall(SYS_fsync, fd));
}

namespace penstock {
namespace {

class FileTest : public ::testing::Test {
 protected:
  FileTest() {
    char pattern[] = "/tmp/penstock-file-test-XXXXXX";
    directory_ = mkdtemp(pattern);
  }
  ~FileTest() override { std::filesystem::remove_all(directory_); }
  Path directory_;
};

TEST_F(FileTest, WhatWasWrittenIsReadBack) {
  ASSERT_TRUE(write_and_sync(directory_ / "a", as_bytes("content")).ok());
  EXPECT_EQ(*read_file(directory_ / "a", 100), "content");
}

TEST_F(FileTest, AFileLargerThanTheBoundIsRefused) {
  ASSERT_TRUE(write_and_sync(directory_ / "a", as_bytes("content")).ok());
  EXPECT_EQ(read_file(directory_ / "a", 6).status().code(), Code::kResourceExhausted);
}

TEST_F(FileTest, AMissingFileIsNotFoundAndNamed) {
  const Status status = read_file(directory_ / "absent", 10).status();
  EXPECT_EQ(status.code(), Code::kNotFound);
  EXPECT_NE(status.message().find("absent"), std::string::npos);
}

TEST_F(FileTest, OnlyPlainFilesAreReadPlainly) {
  ASSERT_TRUE(write_and_sync(directory_ / "a", as_bytes("content")).ok());
  EXPECT_EQ(*read_plain_file(directory_ / "a", 100), "content");
  EXPECT_EQ(read_plain_file(directory_ / "a", 6).status().code(), Code::kResourceExhausted);
  EXPECT_EQ(read_plain_file(directory_ / "absent", 6).status().code(), Code::kNotFound);
  std::filesystem::create_symlink(directory_ / "a", directory_ / "link");
  std::filesystem::create_symlink(directory_ / "absent", directory_ / "dangling");
  ASSERT_EQ(::mkfifo((directory_ / "pipe").c_str(), 0600), 0);
  for (const char* name : {"link", "dangling", "pipe", "."}) {
    const Status status = read_plain_file(directory_ / name, 100).status();
    EXPECT_EQ(status.code(), Code::kDataLoss) << name << ": " << status.to_string();
  }
}

TEST_F(FileTest, NamesAreListedInOrderAndOnlyAMissingDirectoryIsEmpty) {
  EXPECT_TRUE(file_names(directory_ / "absent")->empty());
  ASSERT_TRUE(write_and_sync(directory_ / "b", {}).ok());
  ASSERT_TRUE(write_and_sync(directory_ / "a", {}).ok());
  EXPECT_EQ(*file_names(directory_), (std::vector<std::string>{"a", "b"}));
  EXPECT_FALSE(file_names(directory_ / "a").ok());
}

TEST_F(FileTest, ReplacingLeavesNoTemporaryFile) {
  ASSERT_TRUE(replace_file_durably(directory_ / "a", as_bytes("old")).ok());
  ASSERT_TRUE(replace_file_durably(directory_ / "a", as_bytes("new")).ok());
  EXPECT_EQ(*read_file(directory_ / "a", 10), "new");
  EXPECT_FALSE(std::filesystem::exists(directory_ / "a.tmp"));
}

TEST_F(FileTest, RenameNeverReplaces) {
  ASSERT_TRUE(write_and_sync(directory_ / "a", as_bytes("a")).ok());
  ASSERT_TRUE(write_and_sync(directory_ / "b", as_bytes("b")).ok());
  EXPECT_EQ(rename_no_replace(directory_ / "a", directory_ / "b").code(), Code::kAlreadyExists);
  EXPECT_EQ(*read_file(directory_ / "b", 10), "b");
  EXPECT_TRUE(rename_no_replace(directory_ / "a", directory_ / "c").ok());
}

TEST_F(FileTest, ReadingPastTheEndIsDataLossNotAShortRead) {
  ASSERT_TRUE(write_and_sync(directory_ / "a", as_bytes("1234")).ok());
  const auto file = open_file(directory_ / "a", O_RDONLY);
  std::byte buffer[8];
  EXPECT_TRUE(read_at(file->get(), "a", 0, MutableBytes(buffer).first(4)).ok());
  EXPECT_EQ(read_at(file->get(), "a", 0, buffer).code(), Code::kDataLoss);
}

TEST_F(FileTest, MakesEveryMissingDirectory) {
  ASSERT_TRUE(create_directories_durably(directory_ / "x/y/z").ok());
  ASSERT_TRUE(create_directories_durably(directory_ / "x/y/z").ok());
  EXPECT_TRUE(std::filesystem::is_directory(directory_ / "x/y/z"));
}

TEST_F(FileTest, TheNameOfADirectoryThatIsThereIsMadeDurableToo) {
  std::filesystem::create_directories(directory_ / "x/y");  // by one that was killed
  for (const char* given : {"x/y", "x/y/"}) {
    synced().clear();
    ASSERT_TRUE(create_directories_durably(directory_ / given).ok());
    EXPECT_EQ(synced(), std::vector<Path>{directory_ / "x"}) << given;
  }
  synced().clear();
  ASSERT_TRUE(create_directories_durably(directory_ / "x/z/w").ok());
  EXPECT_EQ(synced(), (std::vector<Path>{directory_, directory_ / "x", directory_ / "x/z"}));
}

TEST_F(FileTest, AFullDeviceIsResourceExhausted) {
  const auto file = open_file("/dev/full", O_WRONLY);
  ASSERT_TRUE(file.ok());
  EXPECT_EQ(write_at(file->get(), "/dev/full", 0, as_bytes("x")).code(), Code::kResourceExhausted);
}

}  // namespace
}  // namespace penstock
