#include "tests/data/rank_harness.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <thread>

#include "comm/base/file.h"
#include "comm/data/loopback_transport.h"
#include "comm/data/ucx_transport.h"

namespace penstock {
namespace {

constexpr unsigned kWatchdogSeconds = 100;
constexpr size_t kAddressCharactersMax = 64 << 10;

void run_threads(const HarnessOptions& options,
                 const std::function<void(RankContext&)>& rank_main) {
  auto ends = make_loopback(options.world_size, {.timeout = options.timeout});
  std::vector<std::thread> threads;
  for (auto& end : ends) {
    threads.emplace_back([&rank_main, end = std::move(end)] {
      RankContext context{*end, [&] { end->kill(); }};
      rank_main(context);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void send_line(int fd, const std::string& line) {
  const std::string text = line + "\n";
  ASSERT_EQ(::write(fd, text.data(), text.size()), std::ssize(text));
}

// One character at a time: slow, and never takes what belongs to the next line.
std::string receive_line(int fd) {
  std::string line;
  char character = 0;
  while (line.size() < kAddressCharactersMax && ::read(fd, &character, 1) == 1) {
    if (character == '\n') return line;
    line += character;
  }
  return {};
}

// Tells the parent this rank's address and connects to all it gets back.
Status meet(UcxTransport& transport, int fd) {
  send_line(fd, transport.address());
  std::vector<std::string> addresses;
  for (int32_t i = 0; i < transport.world_size(); ++i) addresses.push_back(receive_line(fd));
  return transport.connect(addresses);
}

[[noreturn]] void run_child(int32_t rank, const HarnessOptions& options, int fd,
                            const std::function<void(RankContext&)>& rank_main) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  alarm(kWatchdogSeconds);
  {
    auto transport = UcxTransport::create({.rank = {rank},
                                           .world_size = options.world_size,
                                           .epoch = {7},
                                           .timeout = options.timeout,
                                           .spin = options.spin});
    EXPECT_TRUE(transport.ok()) << transport.status().to_string();
    if (transport.ok()) {
      const Status connected = meet(**transport, fd);
      EXPECT_TRUE(connected.ok()) << connected.to_string();
      RankContext context{**transport, [] { raise(SIGKILL); }};
      if (connected.ok()) rank_main(context);
      const Status closed = (*transport)->close();
      EXPECT_TRUE(closed.ok()) << closed.to_string();
    }
  }
  fflush(nullptr);
  _exit(testing::Test::HasFailure() ? 1 : 0);
}

void run_processes(const HarnessOptions& options,
                   const std::function<void(RankContext&)>& rank_main) {
  fflush(nullptr);
  std::vector<FileDescriptor> sockets;
  std::vector<pid_t> children;
  for (int32_t rank = 0; rank < options.world_size; ++rank) {
    int pair[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    const pid_t pid = fork();
    ASSERT_GE(pid, 0);
    if (pid == 0) run_child(rank, options, pair[1], rank_main);
    children.push_back(pid);
    sockets.emplace_back(pair[0]);
    ::close(pair[1]);
  }
  std::vector<std::string> addresses;
  for (const FileDescriptor& socket : sockets) addresses.push_back(receive_line(socket.get()));
  for (const FileDescriptor& socket : sockets) {
    for (const std::string& address : addresses) send_line(socket.get(), address);
  }
  for (int32_t rank = 0; rank < options.world_size; ++rank) {
    int status = 0;
    ASSERT_EQ(waitpid(children[static_cast<size_t>(rank)], &status, 0),
              children[static_cast<size_t>(rank)]);
    const bool to_be_killed = std::count(options.killed.begin(), options.killed.end(), rank) > 0;
    if (to_be_killed) {
      EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << "rank " << rank;
    } else {
      EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0)
          << "rank " << rank << " ended with wait status " << status;
    }
  }
}

}  // namespace

std::string to_string(TransportKind kind) {
  return kind == TransportKind::kLoopback ? "Loopback" : "Ucx";
}

void run_ranks(TransportKind kind, const HarnessOptions& options,
               const std::function<void(RankContext&)>& rank_main) {
  if (kind == TransportKind::kLoopback) {
    run_threads(options, rank_main);
  } else {
    run_processes(options, rank_main);
  }
}

}  // namespace penstock
