#include "comm/control/process.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>

namespace penstock {
namespace {

SpawnOptions shell(const std::string& script) {
  SpawnOptions options;
  options.argv = {"/bin/sh", "-c", script};
  return options;
}

// Everything until end of file.
std::string read_all(FileDescriptor fd) {
  std::string text;
  std::array<char, 4096> buffer{};
  while (true) {
    pollfd poll_fd = {fd.get(), POLLIN, 0};
    EXPECT_EQ(poll(&poll_fd, 1, 20000), 1) << "no output within 20 s";
    const ssize_t count = read(fd.get(), buffer.data(), buffer.size());
    if (count <= 0) return text;
    text.append(buffer.data(), static_cast<size_t>(count));
  }
}

bool readable_within(int fd, int milliseconds) {
  pollfd poll_fd = {fd, POLLIN, 0};
  return poll(&poll_fd, 1, milliseconds) == 1;
}

TEST(ProcessTest, AnExitCodeIsDecoded) {
  Result<ChildProcess> child = ChildProcess::spawn(shell("exit 14"));
  ASSERT_TRUE(child.ok()) << child.status().to_string();
  const ExitStatus status = child->wait();
  EXPECT_EQ(status, (ExitStatus{14, 0}));
  EXPECT_EQ(to_string(status), "exited with code 14");
}

TEST(ProcessTest, ASignalIsDecoded) {
  Result<ChildProcess> child = ChildProcess::spawn(shell("kill -9 $$"));
  ASSERT_TRUE(child.ok()) << child.status().to_string();
  const ExitStatus status = child->wait();
  EXPECT_EQ(status, (ExitStatus{-1, SIGKILL}));
  EXPECT_EQ(to_string(status), "killed by signal 9 (SIGKILL)");
}

TEST(ProcessTest, OutputIsCapturedApart) {
  Result<ChildProcess> child = ChildProcess::spawn(shell("echo to stdout; echo to stderr >&2"));
  ASSERT_TRUE(child.ok()) << child.status().to_string();
  EXPECT_EQ(read_all(child->take_stdout()), "to stdout\n");
  EXPECT_EQ(read_all(child->take_stderr()), "to stderr\n");
  EXPECT_EQ(child->wait().exit_code, 0);
}

TEST(ProcessTest, AMissingProgramIsNamed) {
  SpawnOptions options;
  options.argv = {"/nowhere/penstock-rank"};
  const Result<ChildProcess> child = ChildProcess::spawn(options);
  ASSERT_FALSE(child.ok());
  EXPECT_EQ(child.status().code(), Code::kNotFound);
  EXPECT_NE(child.status().message().find("/nowhere/penstock-rank"), std::string::npos);
}

TEST(ProcessTest, AFileThatIsNoProgramIsAnError) {
  SpawnOptions options;
  options.argv = {"/etc/passwd"};
  EXPECT_FALSE(ChildProcess::spawn(options).ok());
}

TEST(ProcessTest, AMissingWorkingDirectoryIsAnError) {
  SpawnOptions options = shell("true");
  options.working_directory = "/nowhere/at/all";
  EXPECT_FALSE(ChildProcess::spawn(options).ok());
}

TEST(ProcessTest, EnvironmentIsAddedAndReplaced) {
  ASSERT_EQ(setenv("PENSTOCK_TEST_KEPT", "kept", 1), 0);
  ASSERT_EQ(setenv("PENSTOCK_TEST_REPLACED", "old", 1), 0);
  SpawnOptions options =
      shell("echo $PENSTOCK_TEST_KEPT $PENSTOCK_TEST_REPLACED $PENSTOCK_TEST_ADDED");
  options.environment = {"PENSTOCK_TEST_REPLACED=new", "PENSTOCK_TEST_ADDED=added"};
  Result<ChildProcess> child = ChildProcess::spawn(options);
  ASSERT_TRUE(child.ok()) << child.status().to_string();
  EXPECT_EQ(read_all(child->take_stdout()), "kept new added\n");
}

TEST(ProcessTest, TheWorkingDirectoryIsSet) {
  SpawnOptions options = shell("pwd");
  options.working_directory = "/usr";
  Result<ChildProcess> child = ChildProcess::spawn(options);
  ASSERT_TRUE(child.ok()) << child.status().to_string();
  EXPECT_EQ(read_all(child->take_stdout()), "/usr\n");
}

TEST(ProcessTest, NoOtherDescriptorIsInherited) {
  FileDescriptor leaky(open("/dev/null", O_RDONLY));  // no O_CLOEXEC
  ASSERT_TRUE(leaky.valid());
  // ls itself opens the directory it lists.
  Result<ChildProcess> child = ChildProcess::spawn(shell("ls /proc/self/fd"));
  ASSERT_TRUE(child.ok()) << child.status().to_string();
  EXPECT_EQ(read_all(child->take_stdout()), "0\n1\n2\n3\n");
}

TEST(ProcessTest, BlockedAndIgnoredSignalsAreResetInTheChild) {
  sigset_t blocked;
  sigset_t before;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGTERM);
  ASSERT_EQ(sigprocmask(SIG_BLOCK, &blocked, &before), 0);
  const auto old_handler = ::signal(SIGTERM, SIG_IGN);
  Result<ChildProcess> child = ChildProcess::spawn(shell("kill -TERM $$; exit 0"));
  ::signal(SIGTERM, old_handler);
  ASSERT_EQ(sigprocmask(SIG_SETMASK, &before, nullptr), 0);
  ASSERT_TRUE(child.ok()) << child.status().to_string();
  EXPECT_EQ(child->wait().signal, SIGTERM);
}

TEST(ProcessTest, TheProcessDescriptorTellsTheEnd) {
  Result<ChildProcess> child = ChildProcess::spawn(shell("read line"));
  ASSERT_TRUE(child.ok()) << child.status().to_string();
  child->wait();
  EXPECT_TRUE(readable_within(child->pidfd(), 0));
}

TEST(ProcessTest, TryWaitSaysNothingWhileItRuns) {
  Result<ChildProcess> child = ChildProcess::spawn(shell("exec sleep 600"));
  ASSERT_TRUE(child.ok()) << child.status().to_string();
  EXPECT_FALSE(readable_within(child->pidfd(), 0));
  EXPECT_FALSE(child->try_wait().has_value());
  ASSERT_TRUE(child->send_signal(SIGTERM).ok());
  ASSERT_TRUE(readable_within(child->pidfd(), 20000));
  EXPECT_EQ(child->try_wait(), (ExitStatus{-1, SIGTERM}));
  EXPECT_EQ(child->try_wait(), (ExitStatus{-1, SIGTERM})) << "the end is remembered";
}

TEST(ProcessTest, SignalsToAnEndedProcessAreNotFound) {
  Result<ChildProcess> child = ChildProcess::spawn(shell("exit 0"));
  ASSERT_TRUE(child.ok()) << child.status().to_string();
  child->wait();
  EXPECT_EQ(child->send_signal(SIGTERM).code(), Code::kNotFound);
}

TEST(ProcessTest, DestroyingARunningChildKillsIt) {
  pid_t pid = 0;
  {
    Result<ChildProcess> child = ChildProcess::spawn(shell("exec sleep 600"));
    ASSERT_TRUE(child.ok()) << child.status().to_string();
    pid = child->pid();
    EXPECT_EQ(kill(pid, 0), 0);
  }
  EXPECT_EQ(kill(pid, 0), -1);
  EXPECT_EQ(errno, ESRCH);
}

TEST(ProcessTest, AChildHasItsOwnProcessGroupUnlessAskedNotTo) {
  Result<ChildProcess> apart = ChildProcess::spawn(shell("read line; exec sleep 600"));
  SpawnOptions options = shell("exec sleep 600");
  options.new_process_group = false;
  Result<ChildProcess> together = ChildProcess::spawn(options);
  ASSERT_TRUE(apart.ok() && together.ok());
  EXPECT_EQ(getpgid(together->pid()), getpgrp());
}

// A forked parent spawns a sleeping child and is killed: the child must not survive. Both hold the
// write end of a pipe, whose end of file tells that the last of them is gone.
TEST(ProcessTest, AChildDiesWithItsParent) {
  std::array<int, 2> fds{};
  ASSERT_EQ(pipe(fds.data()), 0);
  FileDescriptor out(fds[0]);
  FileDescriptor in(fds[1]);
  const pid_t parent = fork();
  ASSERT_GE(parent, 0);
  if (parent == 0) {
    dup2(in.get(), STDOUT_FILENO);
    SpawnOptions options = shell("echo child sleeps; exec sleep 600");
    options.capture_output = false;
    Result<ChildProcess> child = ChildProcess::spawn(options);
    if (child.ok()) child->wait();
    _exit(1);
  }
  in = FileDescriptor();
  std::array<char, 64> buffer{};
  ASSERT_TRUE(readable_within(out.get(), 20000));
  const ssize_t count = read(out.get(), buffer.data(), buffer.size());
  EXPECT_EQ(std::string(buffer.data(), static_cast<size_t>(std::max<ssize_t>(count, 0))),
            "child sleeps\n");
  ASSERT_EQ(kill(parent, SIGKILL), 0);
  ASSERT_EQ(waitpid(parent, nullptr, 0), parent);
  EXPECT_EQ(read_all(std::move(out)), "");
}

TEST(ProcessTest, SiblingsAreFoundBesideThisProgram) {
  const Result<Path> self = sibling_binary("control_process_test");
  ASSERT_TRUE(self.ok()) << self.status().to_string();
  EXPECT_TRUE(self->is_absolute());
  const Result<Path> missing = sibling_binary("penstock-nothing");
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.status().code(), Code::kNotFound);
  EXPECT_NE(missing.status().message().find("penstock-nothing"), std::string::npos);
}

TEST(ProcessTest, OneThatIsGivenUpIsKilledAndReaped) {
  Result<ChildProcess> child = ChildProcess::spawn(shell("exec tail -f /dev/null"));
  ASSERT_TRUE(child.ok()) << child.status().to_string();
  const pid_t pid = child->pid();
  child->give_up(std::chrono::seconds(20));
  EXPECT_EQ(kill(pid, 0), -1);
  EXPECT_EQ(errno, ESRCH);
}

}  // namespace
}  // namespace penstock
