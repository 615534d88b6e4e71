#include "tests/support/shaped_network.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "comm/data/ucx_transport.h"
#include "tests/support/private_mounts.h"

namespace penstock {
namespace {

// One member: sends `bytes` to the other and gets as many back, over UCX on the link alone. The
// addresses travel through `ends`, pipes between the two.
Status exchange(const ShapedNetwork& network, Rank self, int address_out, int address_in,
                size_t bytes) {
  PENSTOCK_TRY(network.enter(self.value));
  PENSTOCK_TRY_ASSIGN(const std::unique_ptr<UcxTransport> transport,
                      UcxTransport::create({.rank = self,
                                            .world_size = 2,
                                            .epoch = Epoch{1},
                                            .tls = "tcp",
                                            .net_devices = ShapedNetwork::kDevice}));
  const std::string& own = transport->address();
  std::string other(own.size(), '\0');  // two addresses of one machine are equally long
  if (::write(address_out, own.data(), own.size()) != std::ssize(own) ||
      ::read(address_in, other.data(), other.size()) != std::ssize(other)) {
    return internal_error("pipe");
  }
  const Rank peer{1 - self.value};
  PENSTOCK_TRY(transport->connect(self.value == 0 ? std::vector<std::string>{own, other}
                                                  : std::vector<std::string>{other, own}));
  const std::vector<std::byte> sent(bytes, std::byte(self.value + 1));
  std::vector<std::byte> got(bytes);
  const TransferHandle receive = transport->receive(peer, Tag{1}, got);
  const TransferHandle send = transport->send(peer, Tag{1}, sent);
  PENSTOCK_TRY(transport->wait(receive).status());
  PENSTOCK_TRY(transport->wait(send).status());
  if (got != std::vector<std::byte>(bytes, std::byte(peer.value + 1))) return data_loss("bytes");
  return transport->close();
}

// Where namespaces may not be made, the error is all there is to see.
TEST(ShapedNetworkTest, MembersReachEachOtherAndNothingElseOrTheErrorSaysWhatIsMissing) {
  const Result<std::unique_ptr<ShapedNetwork>> network =
      ShapedNetwork::create({.member_count = 2, .bytes_per_second = 1e9, .delay = Duration(1000)});
  if (!network.ok()) {
    EXPECT_EQ(network.status().code(), Code::kFailedPrecondition);
    EXPECT_NE(network.status().message().find("needs root"), std::string::npos);
    return;
  }
  int to_first[2], to_second[2];
  ASSERT_EQ(::pipe(to_first), 0);
  ASSERT_EQ(::pipe(to_second), 0);
  constexpr size_t kBytes = 3'000'001;
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const Status status = exchange(**network, Rank{1}, to_first[1], to_second[0], kBytes);
    if (!status.ok()) std::fprintf(stderr, "%s\n", status.to_string().c_str());
    ::_exit(status.ok() ? 0 : 1);
  }
  const Status status = exchange(**network, Rank{0}, to_second[1], to_first[0], kBytes);
  EXPECT_TRUE(status.ok()) << status.to_string();
  int exit_status = -1;
  ASSERT_EQ(::waitpid(child, &exit_status, 0), child);
  EXPECT_EQ(exit_status, 0);
}

constexpr int kBursts = 20, kBurst = 20;
constexpr uint16_t kUdpPort = 4000;

// Member 1: sends bursts of datagrams to member 0, the next when that is done with the one before.
void send_bursts(const ShapedNetwork& network, int go) {
  PENSTOCK_CHECK(network.enter(1).ok());
  const FileDescriptor socket(::socket(AF_INET, SOCK_DGRAM, 0));
  sockaddr_in to = {};
  to.sin_family = AF_INET;
  to.sin_port = htons(kUdpPort);
  to.sin_addr.s_addr = htonl(10U << 24 | 73U << 16 | 1);
  char byte = 0;
  while (::read(go, &byte, 1) == 1) {
    for (int i = 0; i < kBurst; ++i) {
      PENSTOCK_CHECK(::sendto(socket.get(), "x", 1, 0, reinterpret_cast<const sockaddr*>(&to),
                              sizeof(to)) == 1,
                     errno);
    }
  }
}

// How many of the datagrams arrive at member 0. Called in a process that is not needed afterwards.
// `quiet_ms`: nothing more is expected of a burst when nothing came for so long.
int count_arrivals(const ShapedNetwork& network, int quiet_ms) {
  int go[2];
  PENSTOCK_CHECK(::pipe(go) == 0, errno);
  const pid_t sender = ::fork();
  if (sender == 0) {
    ::close(go[1]);
    send_bursts(network, go[0]);
    ::_exit(0);
  }
  PENSTOCK_CHECK(network.enter(0).ok());
  const FileDescriptor socket(::socket(AF_INET, SOCK_DGRAM, 0));
  sockaddr_in own = {};
  own.sin_family = AF_INET;
  own.sin_port = htons(kUdpPort);
  PENSTOCK_CHECK(::bind(socket.get(), reinterpret_cast<const sockaddr*>(&own), sizeof(own)) == 0);
  int arrived = 0;
  for (int burst = 0; burst < kBursts; ++burst) {
    PENSTOCK_CHECK(::write(go[1], "x", 1) == 1, errno);
    pollfd readable = {socket.get(), POLLIN, 0};
    while (arrived < (burst + 1) * kBurst && ::poll(&readable, 1, quiet_ms) == 1) {
      char byte = 0;
      arrived += ::recv(socket.get(), &byte, 1, 0) == 1;
    }
  }
  ::close(go[1]);
  ::waitpid(sender, nullptr, 0);
  return arrived;
}

TEST(ShapedNetworkTest, TheShareOfPacketsThatIsAskedForIsLost) {
  for (const double loss : {0.0, 0.2}) {
    const pid_t child = ::fork();  // which enters a namespace
    if (child == 0) {
      const auto network =
          ShapedNetwork::create({.member_count = 2, .bytes_per_second = 1e9, .loss = loss});
      if (!network.ok()) ::_exit(0);  // namespaces may not be made here
      const int lost = kBursts * kBurst - count_arrivals(**network, loss == 0 ? 30'000 : 100);
      // Of 400 packets five standard deviations, 40, to either side.
      const bool as_asked = loss == 0 ? lost == 0 : lost > 40 && lost < 120;
      if (!as_asked) std::fprintf(stderr, "%d lost\n", lost);
      ::_exit(as_asked ? 0 : 1);
    }
    int exit_status = -1;
    ASSERT_EQ(::waitpid(child, &exit_status, 0), child);
    EXPECT_EQ(exit_status, 0) << loss;
  }
}

TEST(ShapedNetworkTest, AMemberThatIsCutOffIsNotHeardUntilThatEnds) {
  const pid_t child = ::fork();  // which enters a namespace
  if (child == 0) {
    const auto network = ShapedNetwork::create({.member_count = 2, .bytes_per_second = 1e9});
    if (!network.ok()) ::_exit(0);          // namespaces may not be made here
    for (int turn = 0; turn < 3; ++turn) {  // the one that hears, the one that speaks, neither
      (*network)->set_cut_off(0, turn == 0);
      (*network)->set_cut_off(1, turn == 1);
      const pid_t looker = ::fork();
      if (looker == 0) {
        const int arrived = count_arrivals(**network, turn < 2 ? 50 : 30'000);
        ::_exit(arrived == (turn < 2 ? 0 : kBursts * kBurst) ? 0 : 1);
      }
      int status = -1;
      if (::waitpid(looker, &status, 0) != looker || status != 0) ::_exit(1 + turn);
    }
    ::_exit(0);
  }
  int exit_status = -1;
  ASSERT_EQ(::waitpid(child, &exit_status, 0), child);
  EXPECT_EQ(exit_status, 0);
}

TEST(PrivateMountsTest, InAChrootThatIsNoMountPointTheErrorSaysHowToMendIt) {
  char folder[] = "/tmp/penstock-root-XXXXXX";
  ASSERT_NE(::mkdtemp(folder), nullptr);
  const auto enter_twice = [&] {
    enter_private_mounts();
    PENSTOCK_CHECK(::chroot(folder) == 0 && ::chdir("/") == 0, errno);
    enter_private_mounts();
  };
  EXPECT_DEATH(enter_twice(), "no mount point.*mount --bind DIR DIR; chroot DIR");
  EXPECT_EQ(::rmdir(folder), 0);
}

TEST(ShapedNetworkTest, ANetworkWithoutMembersOrRateIsRefused) {
  EXPECT_EQ(ShapedNetwork::create({.member_count = 0, .bytes_per_second = 1e6}).status().code(),
            Code::kInvalidArgument);
  EXPECT_EQ(ShapedNetwork::create({.member_count = 2, .bytes_per_second = 0}).status().code(),
            Code::kInvalidArgument);
  EXPECT_EQ(ShapedNetwork::create({.member_count = 2, .bytes_per_second = 1e6, .loss = 1.0})
                .status()
                .code(),
            Code::kInvalidArgument);
}

}  // namespace
}  // namespace penstock
