#include "ops/cli/local_process.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

LocalProcess start_sleeper(const ScratchFolder& folder) {
  const auto process = start_detached({"/bin/sleep", "600"}, folder.path() / "log");
  EXPECT_TRUE(process.ok()) << process.status().message();
  return *process;
}

TEST(LocalProcessTest, AStartedProcessIsAliveInASessionOfItsOwnUntilItIsKilled) {
  const ScratchFolder folder;
  const LocalProcess process = start_sleeper(folder);
  EXPECT_TRUE(is_alive(process));
  EXPECT_EQ(::getsid(process.pid), process.pid);
  // The kernel shows it a moment after the program has taken the process over.
  const std::vector<std::string> expected = {"/bin/sleep", "600"};
  EXPECT_TRUE(wait_until([&] { return command_line_of(process.pid) == expected; }, seconds(10)));
  EXPECT_EQ(parent_of(process.pid), ::getpid());
  ASSERT_TRUE(send_signal(process, SIGKILL).ok());
  EXPECT_TRUE(wait_for_end(process, seconds(10)));
  EXPECT_FALSE(is_alive(process));
  EXPECT_EQ(send_signal(process, SIGKILL).code(), Code::kNotFound);
}

TEST(LocalProcessTest, AStrangerWithTheSameNumberIsNeverSignalled) {
  const ScratchFolder folder;
  const LocalProcess process = start_sleeper(folder);
  LocalProcess earlier = process;  // what a state file of an earlier process with this number says
  earlier.start_ticks -= 1;
  EXPECT_FALSE(is_alive(earlier));
  EXPECT_EQ(send_signal(earlier, SIGKILL).code(), Code::kNotFound);
  LocalProcess other_boot = process;
  other_boot.boot_id = "before the reboot";
  EXPECT_EQ(send_signal(other_boot, SIGKILL).code(), Code::kNotFound);
  EXPECT_TRUE(is_alive(process));
  ASSERT_TRUE(send_signal(process, SIGKILL).ok());
  EXPECT_TRUE(wait_for_end(process, seconds(10)));
}

// As a killed process looks while the kernel holds one of its threads: its first thread has left.
TEST(LocalProcessTest, AProcessWhoseFirstThreadLeftIsNotAliveButEnding) {
  int go[2];
  ASSERT_EQ(::pipe(go), 0);
  const pid_t pid = ::fork();
  ASSERT_GE(pid, 0);
  if (pid == 0) {
    char byte;
    [[maybe_unused]] const ssize_t count = ::read(go[0], &byte, 1);
    std::thread([] { ::pause(); }).detach();
    ::syscall(SYS_exit, 0);  // of this thread alone
  }
  const auto started = find_process(pid);
  ASSERT_TRUE(started);
  EXPECT_FALSE(is_ending(*started));
  ASSERT_EQ(::write(go[1], "x", 1), 1);
  EXPECT_TRUE(wait_until([&] { return is_ending(*started); }, seconds(10)));
  EXPECT_FALSE(is_alive(*started));
  ASSERT_EQ(::kill(pid, SIGKILL), 0);
  EXPECT_TRUE(wait_until([&] { return !is_ending(*started); }, seconds(10)));
  ::waitpid(pid, nullptr, 0);
  EXPECT_FALSE(is_ending(*started));
}

TEST(LocalProcessTest, AProcessThatRunsOrWasNotReapedIsNotEnding) {
  const ScratchFolder folder;
  const LocalProcess process = start_sleeper(folder);
  EXPECT_FALSE(is_ending(process));
  ASSERT_EQ(::kill(process.pid, SIGKILL), 0);
  EXPECT_TRUE(wait_until([&] { return !find_process(process.pid); }, seconds(10)));
  EXPECT_TRUE(wait_until([&] { return !is_ending(process); }, seconds(10)));
  EXPECT_FALSE(is_alive(process)) << "which reaps it";
}

TEST(LocalProcessTest, WaitingEndsAtItsLimit) {
  const ScratchFolder folder;
  const LocalProcess process = start_sleeper(folder);
  EXPECT_FALSE(wait_for_end(process, std::chrono::milliseconds(20)));
  ASSERT_TRUE(send_signal(process, SIGKILL).ok());
  EXPECT_TRUE(wait_for_end(process, seconds(10)));
}

TEST(LocalProcessTest, OutputOfBothStreamsIsAppendedToTheLog) {
  const ScratchFolder folder;
  for (int i = 0; i < 2; ++i) {
    const auto process =
        start_detached({"/bin/sh", "-c", "read nothing; echo out; echo err >&2; exec sleep 600"},
                       folder.path() / "log");
    ASSERT_TRUE(process.ok()) << process.status().message();
    const auto lines = [&] {
      const auto text = read_file(folder.path() / "log", 4096);
      return text.ok() ? std::count(text->begin(), text->end(), '\n') : 0;
    };
    EXPECT_TRUE(wait_until([&] { return lines() == 2 * (i + 1); }, seconds(10)));
    ASSERT_TRUE(send_signal(*process, SIGKILL).ok());
    EXPECT_TRUE(wait_for_end(*process, seconds(10)));
  }
}

TEST(LocalProcessTest, AProgramThatDoesNotExistIsAnError) {
  const ScratchFolder folder;
  const auto process = start_detached({"/nonexistent/program"}, folder.path() / "log");
  EXPECT_EQ(process.status().code(), Code::kNotFound);
  EXPECT_NE(process.status().message().find("/nonexistent/program"), std::string::npos);
}

TEST(LocalProcessTest, ThisProcessIsFoundAmongAll) {
  const auto all = all_processes();
  EXPECT_NE(std::find(all.begin(), all.end(), ::getpid()), all.end());
  EXPECT_TRUE(find_process(::getpid()).has_value());
  EXPECT_FALSE(find_process(0).has_value());
}

}  // namespace
}  // namespace penstock
