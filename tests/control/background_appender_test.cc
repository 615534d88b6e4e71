#include "comm/control/background_appender.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <fstream>
#include <thread>

namespace penstock {
namespace {

class BackgroundAppenderTest : public ::testing::Test {
 protected:
  BackgroundAppenderTest() {
    std::string pattern = ::testing::TempDir() + "/penstock_appender.XXXXXX";
    PENSTOCK_CHECK(mkdtemp(pattern.data()) != nullptr, pattern);
    folder_ = pattern;
  }
  ~BackgroundAppenderTest() override { std::filesystem::remove_all(folder_); }

  static std::string text_of(const Path& file) {
    Result<std::string> text = read_file(file, 64 << 20);
    return text.ok() ? *text : text.status().to_string();
  }

  Path folder_;
};

TEST_F(BackgroundAppenderTest, TextArrivesInOrderInANewFolder) {
  const Path file = folder_ / "job-1" / "rank-0.log";
  {
    BackgroundAppender appender(1 << 20);
    for (int i = 0; i < 100; ++i) EXPECT_TRUE(appender.append(file, fmt::format("line {}\n", i)));
  }
  std::string expected;
  for (int i = 0; i < 100; ++i) expected += fmt::format("line {}\n", i);
  EXPECT_EQ(text_of(file), expected);
}

TEST_F(BackgroundAppenderTest, WhatIsThereAlreadyStays) {
  const Path file = folder_ / "log";
  std::ofstream(file) << "before\n";
  BackgroundAppender(1 << 20).append(file, "after\n");
  EXPECT_EQ(text_of(file), "before\nafter\n");
}

TEST_F(BackgroundAppenderTest, TidyingUpRunsFirstAndThenAgainAfterSoMuchText) {
  std::atomic<int> runs{0};
  {
    BackgroundAppender appender(64 << 20, [&] { ++runs; });
    appender.append(folder_ / "log", "one\n");
    for (int i = 0; i < 17; ++i) appender.append(folder_ / "log", std::string(1 << 20, 'x'));
  }
  EXPECT_EQ(runs, 2);
}

TEST_F(BackgroundAppenderTest, AFileThatWasRemovedIsMadeAnew) {
  const Path file = folder_ / "job-1" / "log";
  std::atomic<bool> removed{false};
  {
    BackgroundAppender appender(64 << 20, [&] {
      std::filesystem::remove_all(folder_ / "job-1");
      removed = true;
    });
    appender.append(file, std::string(16 << 20, 'x'));  // then it is tidied up again
    appender.append(file, "after\n");
  }
  EXPECT_TRUE(removed);
  EXPECT_EQ(text_of(file), "after\n");
}

TEST_F(BackgroundAppenderTest, AClosedFileIsOpenedAgain) {
  const Path file = folder_ / "log";
  {
    BackgroundAppender appender(1 << 20);
    appender.append(file, "one\n");
    appender.close(file);
    appender.append(file, "two\n");
  }
  EXPECT_EQ(text_of(file), "one\ntwo\n");
}

TEST_F(BackgroundAppenderTest, SeveralThreadsLoseNothing) {
  const Path file = folder_ / "log";
  {
    BackgroundAppender appender(1 << 20);
    std::array<std::thread, 4> threads;
    for (std::thread& thread : threads) {
      thread = std::thread([&] {
        for (int i = 0; i < 250; ++i) appender.append(file, "0123456789\n");
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(appender.lines_lost(), 0U);
  }
  EXPECT_EQ(text_of(file).size(), 4U * 250 * 11);
}

// A pipe that nobody reads stands for a disk that hangs: the caller is not held up, and what is
// dropped is counted.
TEST_F(BackgroundAppenderTest, AStuckDiskHoldsUpNobody) {
  const Path stuck = folder_ / "stuck";
  ASSERT_EQ(mkfifo(stuck.c_str(), 0600), 0);
  FileDescriptor reader(open(stuck.c_str(), O_RDONLY | O_NONBLOCK));
  ASSERT_TRUE(reader.valid());
  constexpr size_t kQueuedBytesMax = 300'000;
  const std::string block = std::string(99'999, 'x') + "\n";
  uint64_t refused = 0;
  {
    BackgroundAppender appender(kQueuedBytesMax);
    for (int i = 0; i < 10; ++i) refused += appender.append(stuck, block) ? 0 : 1;
    // One block may be with the writer, three fit the queue.
    EXPECT_GE(refused, 6U);
    EXPECT_EQ(appender.lines_lost(), refused);
    // The writer holds the pipe open once its first bytes are there. Closing the only reader then
    // fails its write; before, the open itself would wait for a reader for ever.
    pollfd arrived{.fd = reader.get(), .events = POLLIN, .revents = 0};
    ASSERT_EQ(poll(&arrived, 1, -1), 1);
    ASSERT_EQ(signal(SIGPIPE, SIG_IGN), SIG_DFL);
    reader = FileDescriptor();
  }
  signal(SIGPIPE, SIG_DFL);
}

TEST_F(BackgroundAppenderTest, AFileThatCannotBeOpenedCostsItsLines) {
  std::ofstream(folder_ / "taken") << "a file";
  const Path good = folder_ / "good.log";
  uint64_t lost = 0;
  {
    BackgroundAppender appender(1 << 20);
    appender.append(folder_ / "taken" / "rank.log", "one\ntwo\n");
    appender.append(good, "three\n");
    // The queue is in order: once this is written, the lines before are lost.
    while (text_of(good) != "three\n") std::this_thread::yield();
    lost = appender.lines_lost();
  }
  EXPECT_EQ(lost, 2U);
}

}  // namespace
}  // namespace penstock
