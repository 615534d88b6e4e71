// Lifelines to real processes: this one forks children that listen, are stopped and are killed.
#include "comm/control/lifelines.h"

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <vector>

#include "tests/control/loop_support.h"

namespace penstock {
namespace {

using std::chrono::milliseconds;

constexpr WorkerId kWorker{4};
constexpr uint64_t kIncarnation = 9;

struct LifePort {
  FileDescriptor socket;
  SocketAddress address;
};

LifePort listen_on_loopback() {
  LifePort port;
  port.address = resolve_endpoint("tcp://127.0.0.1:0").value();
  port.socket = FileDescriptor(::socket(AF_INET, SOCK_STREAM, 0));
  EXPECT_EQ(::bind(port.socket.get(), port.address.get(), port.address.size), 0);
  EXPECT_EQ(::listen(port.socket.get(), 8), 0);
  EXPECT_EQ(::getsockname(port.socket.get(), reinterpret_cast<sockaddr*>(&port.address.storage),
                          &port.address.size),
            0);
  return port;
}

class LifelinesTest : public ::testing::Test {
 protected:
  ~LifelinesTest() override {
    for (const pid_t pid : children_) end(pid);
  }
  // Holds every descriptor of this process, and does nothing.
  pid_t fork_child() {
    const pid_t pid = ::fork();
    if (pid == 0) {
      while (true) ::pause();
    }
    children_.push_back(pid);
    return pid;
  }
  static void end(pid_t pid) {
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
  }
  FileDescriptor accept_next(const LifePort& port) {
    EXPECT_TRUE(run_until(loop_, [&] {
      pollfd waiting = {port.socket.get(), POLLIN, 0};
      return ::poll(&waiting, 1, 0) == 1;
    }));
    return FileDescriptor(::accept(port.socket.get(), nullptr, nullptr));
  }
  bool told() {
    return run_until(loop_, [this] { return !gone_.empty(); });
  }

  EventLoop loop_;
  std::vector<std::pair<WorkerId, uint64_t>> gone_;
  std::optional<Lifelines> lines_{
      std::in_place, loop_,
      [this](WorkerId worker, uint64_t incarnation) { gone_.emplace_back(worker, incarnation); }};
  std::vector<pid_t> children_;
};

TEST_F(LifelinesTest, GoneIsWhatHasEndedWithAllThatHeldItsPort) {
  LifePort port = listen_on_loopback();
  const pid_t daemon = fork_child();
  const pid_t rank = fork_child();
  port.socket = FileDescriptor();  // theirs alone now
  lines_->hold(kWorker, kIncarnation, port.address);
  run_for(loop_, milliseconds(50));
  EXPECT_TRUE(gone_.empty());
  end(daemon);
  run_for(loop_, milliseconds(50));
  EXPECT_TRUE(gone_.empty()) << "a rank of it still runs";
  end(rank);
  ASSERT_TRUE(told());
  EXPECT_EQ(gone_[0], std::pair(kWorker, kIncarnation));
  run_for(loop_, milliseconds(50));
  EXPECT_EQ(gone_.size(), 1U) << "told once";
}

TEST_F(LifelinesTest, AProcessThatIsStoppedIsNotGone) {
  LifePort port = listen_on_loopback();
  const pid_t daemon = fork_child();
  port.socket = FileDescriptor();
  lines_->hold(kWorker, kIncarnation, port.address);
  run_for(loop_, milliseconds(20));
  ASSERT_EQ(::kill(daemon, SIGSTOP), 0);
  run_for(loop_, milliseconds(200));
  EXPECT_TRUE(gone_.empty());
  end(daemon);
  EXPECT_TRUE(told());
}

TEST_F(LifelinesTest, ARefusalProvesNothingWhereNoConnectionEverStood) {
  LifePort port = listen_on_loopback();
  port.socket = FileDescriptor();
  for (int i = 0; i < 20; ++i) {
    lines_->hold(kWorker, kIncarnation, port.address);
    run_for(loop_, milliseconds(5));
  }
  EXPECT_TRUE(gone_.empty()) << "a firewall, or the address of another host";
}

TEST_F(LifelinesTest, AConnectionThatIsClosedWhileThePortStandsIsMadeAnew) {
  LifePort port = listen_on_loopback();
  lines_->hold(kWorker, kIncarnation, port.address);
  for (int i = 0; i < 5; ++i) {
    const FileDescriptor accepted = accept_next(port);
    ASSERT_TRUE(accepted.valid());
  }
  run_for(loop_, milliseconds(50));
  EXPECT_TRUE(gone_.empty());
  port.socket = FileDescriptor();
  EXPECT_TRUE(told());
}

TEST_F(LifelinesTest, TheProcessBeforeIsLetGoOf) {
  LifePort before = listen_on_loopback();
  lines_->hold(kWorker, kIncarnation, before.address);
  run_for(loop_, milliseconds(20));
  LifePort now = listen_on_loopback();
  lines_->hold(kWorker, kIncarnation + 1, now.address);
  before.socket = FileDescriptor();
  run_for(loop_, milliseconds(100));
  EXPECT_TRUE(gone_.empty());
  now.socket = FileDescriptor();
  ASSERT_TRUE(told());
  EXPECT_EQ(gone_[0], std::pair(kWorker, kIncarnation + 1));
}

TEST_F(LifelinesTest, WhatSaysSomethingIsNoLifePort) {
  LifePort port = listen_on_loopback();
  lines_->hold(kWorker, kIncarnation, port.address);
  {
    const FileDescriptor accepted = accept_next(port);
    ASSERT_EQ(::send(accepted.get(), "hello", 5, 0), 5);
    run_for(loop_, milliseconds(20));
  }
  port.socket = FileDescriptor();
  lines_->hold(kWorker, kIncarnation, port.address);
  run_for(loop_, milliseconds(100));
  EXPECT_TRUE(gone_.empty());
}

}  // namespace
}  // namespace penstock
