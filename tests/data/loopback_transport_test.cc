#include "comm/data/loopback_transport.h"

#include "tests/data/transport_conformance.h"

namespace penstock {
namespace {

INSTANTIATE_TEST_SUITE_P(Loopback, TransportConformance, testing::Values(TransportKind::kLoopback));

// The loopback is the strictest transport: a program that leans on a network's buffering stops
// here.
TEST(LoopbackTransportTest, SendCompletesOnlyWhenItsReceiverHasTheBytes) {
  auto ends = make_loopback(2);
  uint64_t sent = 5, got = 0;
  const TransferHandle send = ends[0]->send(Rank{1}, {1}, std::as_bytes(std::span(&sent, 1)));
  EXPECT_FALSE(ends[0]->done(send));
  const TransferHandle receive =
      ends[1]->receive(Rank{0}, {1}, std::as_writable_bytes(std::span(&got, 1)));
  EXPECT_TRUE(ends[0]->done(send));
  EXPECT_TRUE(ends[0]->wait(send).ok());
  EXPECT_TRUE(ends[1]->wait(receive).ok());
  EXPECT_EQ(got, 5u);
}

TEST(LoopbackTransportTest, DestroyedEndIsDeadToItsPeers) {
  auto ends = make_loopback(2);
  uint64_t got = 0;
  const TransferHandle receive =
      ends[1]->receive(Rank{0}, {1}, std::as_writable_bytes(std::span(&got, 1)));
  ends[0].reset();
  EXPECT_EQ(ends[1]->wait(receive).status().code(), Code::kUnavailable);
}

TEST(LoopbackTransportDeathTest, MoreOperationsThanPromisedIsAFailedCheck) {
  auto ends = make_loopback(2, {.operations_max = 2});
  const auto receive = [&] { return ends[0]->receive(Rank{1}, {1}, {}); };
  receive();
  receive();
  EXPECT_DEATH(receive(), "free.empty");
}

}  // namespace
}  // namespace penstock
