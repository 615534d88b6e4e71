// Bytes that no friend would send, at every port of a running cluster: refused, counted, and
// nothing is lost.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>
#include <zmq.h>

#include <set>
#include <sstream>

#include "comm/base/random.h"
#include "tests/support/cluster.h"

namespace penstock {
namespace {

int connect_to(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  PENSTOCK_CHECK(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0, errno);
  const timeval limit{.tv_sec = 5, .tv_usec = 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
  return fd;
}

int http_port(const Cluster& cluster) {
  const std::string server = cluster.server();
  return std::stoi(server.substr(server.rfind(':') + 1));
}

// Sends raw bytes, half-closes, and returns what comes back.
std::string raw_exchange(int port, const std::string& bytes) {
  const int fd = connect_to(port);
  // The other side may close at once: a failed send is part of the experiment.
  (void)!::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
  shutdown(fd, SHUT_WR);
  std::string answer;
  char buffer[4096];
  ssize_t count = 0;
  while ((count = ::recv(fd, buffer, sizeof(buffer), 0)) > 0) answer.append(buffer, count);
  ::close(fd);
  return answer;
}

std::string random_bytes(Random& random, size_t size) {
  std::string bytes(size, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random.next());
  return bytes;
}

class HostileInputTest : public ::testing::Test {
 protected:
  HostileInputTest() {
    id_ = cluster_.submit(
        tiny_job_yaml(cluster_.folder(), {.steps = 100'000, .checkpoint_interval = 0}));
    PENSTOCK_CHECK(cluster_.wait_for_step(id_, 3), cluster_.describe(id_));
  }
  void expect_unharmed() {
    const int64_t step = cluster_.job(id_).at("step");
    EXPECT_TRUE(cluster_.wait_for_step(id_, step + 20)) << cluster_.describe(id_);
    EXPECT_EQ(cluster_.job(id_).at("restarts"), 0);
  }
  Cluster cluster_;
  std::string id_;
};

TEST_F(HostileInputTest, RawGarbageOnTheControlPortDoesNotDisturbARun) {
  Random random(11, 0);
  for (int i = 0; i < 50; ++i)
    raw_exchange(cluster_.control_port(), random_bytes(random, 1 + random.below(5000)));
  expect_unharmed();
}

TEST_F(HostileInputTest, WellFramedGarbageIsRefusedAndCounted) {
  void* context = zmq_ctx_new();
  void* dealer = zmq_socket(context, ZMQ_DEALER);
  const std::string endpoint = "tcp://127.0.0.1:" + std::to_string(cluster_.control_port());
  ASSERT_EQ(zmq_connect(dealer, endpoint.c_str()), 0);
  Random random(12, 0);
  for (int i = 0; i < 200; ++i) {
    const std::string frame = random_bytes(random, random.below(2000));
    ASSERT_GE(zmq_send(dealer, frame.data(), frame.size(), 0), 0);
  }
  const auto refused = [&] {
    const std::string metrics = cluster_.call("GET", "/metrics").body;
    const size_t at = metrics.find("penstock_coordinator_frames_rejected_total{");
    if (at == std::string::npos) return false;
    double sum = 0.0;
    for (size_t line = at; line != std::string::npos;
         line = metrics.find("\npenstock_coordinator_frames_rejected_total{", line + 1)) {
      sum += std::stod(metrics.substr(metrics.find("} ", line) + 2));
    }
    return sum >= 200.0;
  };
  EXPECT_TRUE(wait_until(refused, kPatience)) << cluster_.call("GET", "/metrics").body;
  const int no_linger = 0;
  zmq_setsockopt(dealer, ZMQ_LINGER, &no_linger, sizeof(no_linger));
  zmq_close(dealer);
  zmq_ctx_destroy(context);
  expect_unharmed();
}

TEST_F(HostileInputTest, AnOversizedFrameClosesItsConnectionOnly) {
  void* context = zmq_ctx_new();
  void* dealer = zmq_socket(context, ZMQ_DEALER);
  const std::string endpoint = "tcp://127.0.0.1:" + std::to_string(cluster_.control_port());
  ASSERT_EQ(zmq_connect(dealer, endpoint.c_str()), 0);
  const std::string frame(17 << 20, 'x');
  ASSERT_GE(zmq_send(dealer, frame.data(), frame.size(), 0), 0);
  expect_unharmed();
  const int no_linger = 0;
  zmq_setsockopt(dealer, ZMQ_LINGER, &no_linger, sizeof(no_linger));
  zmq_close(dealer);
  zmq_ctx_destroy(context);
}

TEST_F(HostileInputTest, MalformedHttpGetsAnAnswerOrACloseAndTheServerStays) {
  const int port = http_port(cluster_);
  const std::string bad_line = raw_exchange(port, "NONSENSE\r\n\r\n");
  EXPECT_TRUE(bad_line.find("400") != std::string::npos) << bad_line;
  raw_exchange(port, "GET / HTTP/9.9\r\n\r\n");
  raw_exchange(port, "POST /api/v1/jobs HTTP/1.1\r\nContent-Length: -5\r\n\r\n");
  raw_exchange(port, "GET /" + std::string(1 << 20, 'a') + " HTTP/1.1\r\n\r\n");
  raw_exchange(port, "GET / HTTP/1.1\r\n" + std::string(1 << 20, 'h') + ": x\r\n\r\n");
  raw_exchange(port, std::string("GET /\0 HTTP/1.1\r\n\r\n", 19));
  Random random(13, 0);
  for (int i = 0; i < 50; ++i) raw_exchange(port, random_bytes(random, 1 + random.below(3000)));
  EXPECT_EQ(cluster_.call("GET", "/livez").status, 200);
  expect_unharmed();
}

TEST_F(HostileInputTest, AnOversizedBodyIsRefusedWithItsOwnStatus) {
  EXPECT_EQ(cluster_.call("POST", "/api/v1/jobs", std::string(2 << 20, 'x')).status, 413);
  expect_unharmed();
}

TEST_F(HostileInputTest, ASpecThatIsNotASpecNamesLineAndColumnAndStartsNothing) {
  const HttpReply reply =
      cluster_.call("POST", "/api/v1/jobs", "apiVersion: penstock/v1\nkind: Nonsense\n");
  EXPECT_EQ(reply.status, 400);
  EXPECT_NE(reply.body.find(":2:"), std::string::npos) << reply.body;
  EXPECT_EQ(cluster_.get("/api/v1/jobs").at("items").size(), 1u);
}

// Local addresses (hexadecimal, as the kernel prints them) on which a process listens for TCP
// connections.
std::vector<std::string> listening_addresses(pid_t pid) {
  std::set<std::string> sockets;
  for (const auto& entry : std::filesystem::directory_iterator(fmt::format("/proc/{}/fd", pid))) {
    std::error_code gone;
    const std::string target = std::filesystem::read_symlink(entry.path(), gone).string();
    if (target.rfind("socket:[", 0) == 0) sockets.insert(target.substr(8, target.size() - 9));
  }
  std::vector<std::string> addresses;
  for (const char* table : {"tcp", "tcp6"}) {
    std::istringstream lines(*read_file(fmt::format("/proc/{}/net/{}", pid, table), 16 << 20));
    std::string line;
    while (std::getline(lines, line)) {
      std::istringstream words(line);
      std::string slot, local, remote, state, queues, timer, retransmits, uid, timeout, inode;
      words >> slot >> local >> remote >> state >> queues >> timer >> retransmits >> uid >>
          timeout >> inode;
      if (state == "0A" && sockets.contains(inode))
        addresses.push_back(local.substr(0, local.find(':')));
    }
  }
  return addresses;
}

TEST_F(HostileInputTest, TheDataPlaneOfALocalClusterIsClosedToOtherHosts) {
  for (int rank = 0; rank < 4; ++rank) {
    const auto addresses = listening_addresses(cluster_.rank_pid(id_, rank));
    EXPECT_FALSE(addresses.empty()) << "a rank listens for its peers";
    for (const std::string& address : addresses) EXPECT_EQ(address, "0100007F") << "rank " << rank;
  }
}

TEST(PortInUseTest, ASecondCoordinatorOnTheSamePortSaysSoAndExitsWithTheConflictCode) {
  const Cluster cluster({.worker_count = 0});
  const ScratchFolder scratch;
  const ProgramRun run =
      run_program({binary("penstock-coordinator"), "--state-dir", scratch.path().string(),
                   "--http-port", std::to_string(http_port(cluster)), "--control-port", "0"});
  EXPECT_EQ(run.exit_code, 6) << run.err;
  EXPECT_NE(run.err.find(std::to_string(http_port(cluster))), std::string::npos) << run.err;
  const ProgramRun control =
      run_program({binary("penstock-coordinator"), "--state-dir", scratch.path().string(),
                   "--http-port", "0", "--control-port", std::to_string(cluster.control_port())});
  EXPECT_EQ(control.exit_code, 6) << control.err;
  EXPECT_NE(control.err.find(std::to_string(cluster.control_port())), std::string::npos)
      << control.err;
}

}  // namespace
}  // namespace penstock
