#include "ops/cli/dev_cluster.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <fstream>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

TEST(DevClusterTest, TheStateFolderIsTheFlagThenTheVariablesThenHome) {
  ::setenv("PENSTOCK_DEV_STATE_DIR", "/a/../b", 1);
  EXPECT_EQ(dev_state_dir("/flag"), "/flag");
  EXPECT_EQ(dev_state_dir(""), "/b");
  ::unsetenv("PENSTOCK_DEV_STATE_DIR");
  ::setenv("XDG_STATE_HOME", "/x", 1);
  EXPECT_EQ(dev_state_dir(""), "/x/penstock/dev");
  ::unsetenv("XDG_STATE_HOME");
  ::setenv("HOME", "/h", 1);
  EXPECT_EQ(dev_state_dir(""), "/h/.local/state/penstock/dev");
  EXPECT_TRUE(dev_state_dir("relative").is_absolute());
}

TEST(DevClusterTest, AFolderWithoutAClusterHasNothingToStop) {
  const ScratchFolder folder;
  const auto state = load_dev_state(folder.path());
  ASSERT_TRUE(state.ok());
  EXPECT_FALSE(dev_coordinator_runs(*state));
  const auto stopped = dev_down(folder.path() / "never");
  ASSERT_TRUE(stopped.ok());
  EXPECT_TRUE(stopped->empty());
}

TEST(DevClusterTest, ADamagedStateFileIsNamed) {
  const ScratchFolder folder;
  std::ofstream(folder.path() / "dev.json") << "{\"processes\": 7}";
  const auto state = load_dev_state(folder.path());
  EXPECT_EQ(state.status().code(), Code::kDataLoss);
  EXPECT_NE(state.status().message().find("dev.json"), std::string::npos);
  EXPECT_EQ(dev_down(folder.path()).status().code(), Code::kDataLoss);
}

// A state file left over from before: its numbers belong to others now.
TEST(DevClusterTest, StoppingNeverTouchesAStrangerThatTookANumber) {
  const ScratchFolder folder;
  const auto stranger = start_detached({"/bin/sleep", "600"}, folder.path() / "log");
  ASSERT_TRUE(stranger.ok());
  std::ofstream(folder.path() / "dev.json") << fmt::format(
      "{{\"http_port\": 1, \"control_port\": 2, \"processes\": [{{\"name\": \"coordinator\", "
      "\"pid\": {}, "
      "\"start_ticks\": {}, \"boot_id\": \"{}\", \"log\": \"x\"}}]}}",
      stranger->pid, stranger->start_ticks - 1, stranger->boot_id);
  const auto stopped = dev_down(folder.path());
  ASSERT_TRUE(stopped.ok()) << stopped.status().message();
  EXPECT_TRUE(stopped->empty());
  EXPECT_TRUE(is_alive(*stranger));
  ASSERT_TRUE(send_signal(*stranger, SIGKILL).ok());
  EXPECT_TRUE(wait_for_end(*stranger, seconds(10)));
}

TEST(DevClusterTest, APortInUseIsAConflictAndStartsNothing) {
  const ScratchFolder folder;
  const FileDescriptor socket(::socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  auto* any = reinterpret_cast<sockaddr*>(&address);
  ASSERT_EQ(::bind(socket.get(), any, size), 0);
  ASSERT_EQ(::listen(socket.get(), 1), 0);
  ASSERT_EQ(::getsockname(socket.get(), any, &size), 0);
  const int port = ntohs(address.sin_port);
  const auto state = dev_up({.state_dir = folder.path(), .port = port}, [](const std::string&) {});
  EXPECT_EQ(state.status().code(), Code::kAlreadyExists);
  EXPECT_NE(state.status().message().find(fmt::format("port {} is in use", port)),
            std::string::npos);
  EXPECT_TRUE(load_dev_state(folder.path())->processes.empty());
}

TEST(DevClusterTest, WhatAClusterHadIsKeptWhileItIsDown) {
  const ScratchFolder folder;
  std::ofstream(folder.path() / "dev.json")
      << R"({"http_port": 1, "control_port": 2, "worker_count": 3, "devices_per_worker": 2,
            "processes": []})";
  ASSERT_TRUE(dev_down(folder.path()).ok());
  const auto state = load_dev_state(folder.path());
  ASSERT_TRUE(state.ok());
  EXPECT_EQ(state->http_port, 1);
  EXPECT_EQ(state->worker_count_wanted, 3);
  EXPECT_EQ(state->devices_per_worker, 2);
}

TEST(DevClusterTest, ARankThatRunsNowhereIsNotFound) {
  EXPECT_EQ(find_dev_rank({}, "7", 0).status().code(), Code::kNotFound);
}

}  // namespace
}  // namespace penstock
