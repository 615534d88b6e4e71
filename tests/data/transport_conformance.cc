#include "tests/data/transport_conformance.h"

#include <numeric>
#include <thread>

#include "comm/base/random.h"

namespace penstock {
namespace {

std::vector<std::byte> pattern(size_t size, uint64_t seed) {
  std::vector<std::byte> bytes(size);
  Random random(seed, size);
  uint64_t word = 0;
  for (size_t i = 0; i < size; ++i) {
    if (i % 8 == 0) word = random.next();
    bytes[i] = static_cast<std::byte>(word >> 8 * (i % 8));
  }
  return bytes;
}

template <typename T>
Bytes bytes_of(const T& value) {
  return std::as_bytes(std::span(&value, 1));
}
template <typename T>
MutableBytes mutable_bytes_of(T& value) {
  return std::as_writable_bytes(std::span(&value, 1));
}

void expect_moved(Transport& transport, TransferHandle handle, uint64_t bytes) {
  const Result<uint64_t> moved = transport.wait(handle);
  ASSERT_TRUE(moved.ok()) << moved.status().to_string();
  EXPECT_EQ(*moved, bytes);
}

void expect_code(Transport& transport, TransferHandle handle, Code code) {
  const Result<uint64_t> moved = transport.wait(handle);
  ASSERT_FALSE(moved.ok());
  EXPECT_EQ(moved.status().code(), code) << moved.status().to_string();
}

Rank other(const Transport& transport) {
  return {1 - transport.rank().value};
}

TEST_P(TransportConformance, MessagesOfEverySizeArriveWhole) {
  const std::vector<size_t> sizes = {0, 1, 99, 100, 101, 8191, 8256, 65536, 1000003, 9 << 20};
  run({.world_size = 2}, [&](RankContext& rank) {
    Transport& transport = rank.transport;
    for (const size_t size : sizes) {
      const std::vector<std::byte> sent = pattern(size, 1);
      if (transport.rank() == Rank{0}) {
        expect_moved(transport, transport.send(Rank{1}, {size}, sent), size);
      } else {
        std::vector<std::byte> got(size + 16);
        expect_moved(transport, transport.receive(Rank{0}, {size}, got), size);
        got.resize(size);
        EXPECT_TRUE(got == sent) << size;
      }
    }
  });
}

TEST_P(TransportConformance, MessagesWithOneTagArriveInOrderWhateverTheirSizes) {
  constexpr size_t kCount = 200;
  const auto size_of = [](size_t i) { return i % 7 == 0 ? size_t{200'000} : 8 + i; };
  run({.world_size = 2}, [&](RankContext& rank) {
    Transport& transport = rank.transport;
    std::vector<std::vector<std::byte>> buffers;
    std::vector<TransferHandle> handles;
    const bool sends = transport.rank() == Rank{0};
    for (size_t i = 0; i < kCount; ++i) {
      buffers.push_back(sends ? pattern(size_of(i), i) : std::vector<std::byte>(size_of(i)));
    }
    for (std::vector<std::byte>& buffer : buffers) {
      handles.push_back(sends ? transport.send(Rank{1}, {5}, buffer)
                              : transport.receive(Rank{0}, {5}, buffer));
    }
    for (size_t i = 0; i < kCount; ++i) {
      expect_moved(transport, handles[i], size_of(i));
      EXPECT_EQ(buffers[i], pattern(size_of(i), i)) << i;
    }
  });
}

TEST_P(TransportConformance, TagsAreIndependentOfEachOther) {
  constexpr uint64_t kHighestTag = (uint64_t{1} << kTagBits) - 1;
  run({.world_size = 2}, [&](RankContext& rank) {
    Transport& transport = rank.transport;
    uint64_t first = 11, second = 22, third = 33;
    if (transport.rank() == Rank{0}) {
      const TransferHandle a = transport.send(Rank{1}, {0}, bytes_of(first));
      const TransferHandle b = transport.send(Rank{1}, {kHighestTag}, bytes_of(second));
      const TransferHandle c = transport.send(Rank{1}, {1}, bytes_of(third));
      for (const TransferHandle handle : {a, b, c}) expect_moved(transport, handle, 8);
    } else {
      first = second = third = 0;
      expect_moved(transport, transport.receive(Rank{0}, {1}, mutable_bytes_of(third)), 8);
      expect_moved(transport, transport.receive(Rank{0}, {kHighestTag}, mutable_bytes_of(second)),
                   8);
      expect_moved(transport, transport.receive(Rank{0}, {0}, mutable_bytes_of(first)), 8);
      EXPECT_EQ(first, 11u);
      EXPECT_EQ(second, 22u);
      EXPECT_EQ(third, 33u);
    }
  });
}

TEST_P(TransportConformance, SourcesAreToldApartByRankNotByOrderOfArrival) {
  run({.world_size = 4}, [](RankContext& rank) {
    Transport& transport = rank.transport;
    if (transport.rank() != Rank{0}) {
      const int32_t value = transport.rank().value;
      expect_moved(transport, transport.send(Rank{0}, {9}, bytes_of(value)), sizeof(value));
      return;
    }
    for (const int32_t source : {2, 3, 1}) {
      int32_t value = 0;
      expect_moved(transport, transport.receive({source}, {9}, mutable_bytes_of(value)), 4);
      EXPECT_EQ(value, source);
    }
  });
}

TEST_P(TransportConformance, LargeMessagesPassInBothDirectionsAtOnce) {
  constexpr size_t kSize = 4 << 20;
  run({.world_size = 2}, [](RankContext& rank) {
    Transport& transport = rank.transport;
    const std::vector<std::byte> mine = pattern(kSize, transport.rank().value);
    const std::vector<std::byte> expected = pattern(kSize, other(transport).value);
    std::vector<std::byte> theirs(kSize);
    for (int round = 0; round < 4; ++round) {
      std::fill(theirs.begin(), theirs.end(), std::byte{0});
      const TransferHandle sent = transport.send(other(transport), {3}, mine);
      const TransferHandle got = transport.receive(other(transport), {3}, theirs);
      expect_moved(transport, sent, kSize);
      expect_moved(transport, got, kSize);
      EXPECT_TRUE(theirs == expected);
    }
  });
}

TEST_P(TransportConformance, EveryRankExchangesWithEveryOtherWithManyOperationsInFlight) {
  constexpr size_t kMessages = 50;
  constexpr size_t kWords = 3000;
  run({.world_size = 4}, [](RankContext& rank) {
    Transport& transport = rank.transport;
    const auto world = static_cast<size_t>(transport.world_size());
    std::vector<uint64_t> outgoing(kWords, static_cast<uint64_t>(transport.rank().value));
    std::vector<std::vector<uint64_t>> incoming(world * kMessages, std::vector<uint64_t>(kWords));
    std::vector<TransferHandle> handles;
    for (size_t i = 0; i < world * kMessages; ++i) {
      const Rank peer{static_cast<int32_t>(i % world)};
      if (peer == transport.rank()) continue;
      handles.push_back(
          transport.receive(peer, {i / world}, std::as_writable_bytes(std::span(incoming[i]))));
      handles.push_back(transport.send(peer, {i / world}, std::as_bytes(std::span(outgoing))));
    }
    for (size_t i = handles.size(); i > 0; --i) {
      expect_moved(transport, handles[i - 1], kWords * sizeof(uint64_t));
    }
    for (size_t i = 0; i < incoming.size(); ++i) {
      if (i % world == static_cast<size_t>(transport.rank().value)) continue;
      EXPECT_EQ(incoming[i], std::vector<uint64_t>(kWords, i % world));
    }
  });
}

TEST_P(TransportConformance, MessageLongerThanTheBufferIsDataLossAndLeavesTheTagUsable) {
  for (const size_t size : {size_t{64}, size_t{4} << 20}) {
    run({.world_size = 2}, [size](RankContext& rank) {
      Transport& transport = rank.transport;
      std::vector<std::byte> buffer(size);
      if (transport.rank() == Rank{0}) {
        // Whether the sender learns of it is the transport's business; that it is told something is
        // not.
        (void)transport.wait(transport.send(Rank{1}, {1}, buffer));
        expect_moved(transport, transport.send(Rank{1}, {1}, Bytes(buffer).first(7)), 7);
      } else {
        const MutableBytes half = MutableBytes(buffer).first(size / 2);
        expect_code(transport, transport.receive(Rank{0}, {1}, half), Code::kDataLoss);
        expect_moved(transport, transport.receive(Rank{0}, {1}, half), 7);
      }
    });
  }
}

TEST_P(TransportConformance, ReceiveThatNobodyAnswersEndsAtTheTimeout) {
  run({.world_size = 2, .timeout = std::chrono::milliseconds(300)}, [](RankContext& rank) {
    Transport& transport = rank.transport;
    uint64_t value = 0;
    if (transport.rank() == Rank{1}) {
      const int64_t start_ns = monotonic_ns();
      expect_code(transport, transport.receive(Rank{0}, {1}, mutable_bytes_of(value)),
                  Code::kDeadlineExceeded);
      EXPECT_GE(monotonic_ns() - start_ns, 290'000'000);
      (void)transport.wait(transport.send(Rank{0}, {2}, bytes_of(value)));
    } else {
      // Stays alive, in as many timeouts as it takes, until the other has seen its own.
      while (transport.wait(transport.receive(Rank{1}, {2}, mutable_bytes_of(value)))
                 .status()
                 .code() == Code::kDeadlineExceeded) {
      }
    }
  });
}

TEST_P(TransportConformance, WaitingForAPeerThatDiesFailsSoon) {
  run({.world_size = 3, .killed = {2}}, [](RankContext& rank) {
    Transport& transport = rank.transport;
    int64_t died_ns = 0;
    if (transport.rank() == Rank{2}) {
      for (const int32_t peer : {0, 1}) {
        const int64_t now_ns = monotonic_ns();
        expect_moved(transport, transport.send({peer}, {1}, bytes_of(now_ns)), 8);
      }
      rank.die();
      return;
    }
    std::vector<std::byte> large(4 << 20);
    const TransferHandle pending_receive = transport.receive(Rank{2}, {2}, large);
    const TransferHandle pending_send = transport.send(Rank{2}, {3}, large);
    expect_moved(transport, transport.receive(Rank{2}, {1}, mutable_bytes_of(died_ns)), 8);
    expect_code(transport, pending_receive, Code::kUnavailable);
    const double waited_s = static_cast<double>(monotonic_ns() - died_ns) * 1e-9;
    EXPECT_LT(waited_s, 1.0);
    testing::Test::RecordProperty("seconds_to_notice", std::to_string(waited_s));
    expect_code(transport, pending_send, Code::kUnavailable);
    // Operations started later fail as well, and the living still reach each other.
    expect_code(transport, transport.receive(Rank{2}, {2}, large), Code::kUnavailable);
    expect_code(transport, transport.send(Rank{2}, {2}, large), Code::kUnavailable);
    const int32_t mine = transport.rank().value;
    int32_t theirs = -1;
    const TransferHandle sent = transport.send(other(transport), {4}, bytes_of(mine));
    expect_moved(transport, transport.receive(other(transport), {4}, mutable_bytes_of(theirs)), 4);
    EXPECT_EQ(theirs, 1 - mine);
    expect_moved(transport, sent, 4);
  });
}

TEST_P(TransportConformance, AbortFromAnotherThreadEndsAWaitAndEverythingAfter) {
  run({.world_size = 2}, [](RankContext& rank) {
    Transport& transport = rank.transport;
    uint64_t value = 0;
    const TransferHandle pending =
        transport.receive(other(transport), {1}, mutable_bytes_of(value));
    if (transport.rank() == Rank{1}) {  // stays until the other has left
      expect_code(transport, pending, Code::kUnavailable);
      return;
    }
    std::thread stopper([&transport] { transport.abort(); });
    expect_code(transport, pending, Code::kAborted);
    stopper.join();
    expect_code(transport, transport.receive(other(transport), {1}, mutable_bytes_of(value)),
                Code::kAborted);
    expect_code(transport, transport.send(other(transport), {1}, bytes_of(value)), Code::kAborted);
  });
}

// Peeks at a buffer that the transport still owns, on purpose: any question to the transport could
// be what moves the bytes.
[[gnu::noinline, gnu::no_sanitize("thread")]] bool is_written(const volatile std::byte& last) {
  return last != std::byte{0};
}

// What overlapping communication with compute rests on: neither side calls the transport between
// posting and the arrival of the last byte.
TEST_P(TransportConformance, MessagesArriveWhileBothSidesComputeAndSayWhenTheyWereThere) {
  run({.world_size = 2}, [](RankContext& rank) {
    Transport& transport = rank.transport;
    for (const size_t size : {size_t{64}, size_t{4} << 20}) {
      std::vector<std::byte> got(size);
      const std::vector<std::byte> sent(size, std::byte{7});
      const TransferHandle receive = transport.receive(other(transport), {size}, got);
      const TransferHandle send = transport.send(other(transport), {size}, sent);
      const int64_t posted_ns = monotonic_ns();
      while (!is_written(got.back()) && monotonic_ns() - posted_ns < 20'000'000'000) {
      }
      ASSERT_TRUE(is_written(got.back())) << size << " bytes did not move by themselves";
      int64_t completed_ns = 0;
      ASSERT_TRUE(transport.wait(receive, &completed_ns).ok());
      EXPECT_GT(completed_ns, 0);
      EXPECT_LE(completed_ns, monotonic_ns());
      ASSERT_TRUE(transport.wait(send, &completed_ns).ok());
      EXPECT_GT(completed_ns, 0);
    }
  });
}

TEST_P(TransportConformance, ACompletionKeepsItsTimeUntilItIsAskedFor) {
  run({.world_size = 2}, [](RankContext& rank) {
    Transport& transport = rank.transport;
    std::byte got{};
    const std::byte sent{1};
    const TransferHandle receive = transport.receive(other(transport), {5}, mutable_bytes_of(got));
    const TransferHandle send = transport.send(other(transport), {5}, bytes_of(sent));
    const int64_t deadline_ns = monotonic_ns() + 20'000'000'000;
    while (!transport.done(receive) && monotonic_ns() < deadline_ns) {
    }
    const int64_t seen_ns = monotonic_ns();
    int64_t completed_ns = 0;
    ASSERT_TRUE(transport.wait(receive, &completed_ns).ok());
    EXPECT_LE(completed_ns, seen_ns);
    expect_moved(transport, send, 1);
  });
}

TEST_P(TransportConformance, DoneTurnsTrueWithoutWaiting) {
  run({.world_size = 2}, [](RankContext& rank) {
    Transport& transport = rank.transport;
    std::vector<std::byte> mine = pattern(1 << 20, transport.rank().value);
    std::vector<std::byte> theirs(1 << 20);
    const TransferHandle got = transport.receive(other(transport), {1}, theirs);
    const TransferHandle sent = transport.send(other(transport), {1}, mine);
    while (!transport.done(got) || !transport.done(sent)) std::this_thread::yield();
    expect_moved(transport, got, 1 << 20);
    expect_moved(transport, sent, 1 << 20);
    EXPECT_EQ(theirs, pattern(1 << 20, other(transport).value));
  });
}

TEST_P(TransportConformance, BytesSentCountsPayload) {
  run({.world_size = 2}, [](RankContext& rank) {
    Transport& transport = rank.transport;
    std::vector<std::byte> buffer(1000);
    if (transport.rank() == Rank{0}) {
      EXPECT_EQ(transport.bytes_sent(), 0u);
      for (int i = 0; i < 3; ++i)
        expect_moved(transport, transport.send(Rank{1}, {1}, buffer), 1000);
      EXPECT_EQ(transport.bytes_sent(), 3000u);
    } else {
      for (int i = 0; i < 3; ++i) {
        expect_moved(transport, transport.receive(Rank{0}, {1}, buffer), 1000);
      }
      EXPECT_EQ(transport.bytes_sent(), 0u);
    }
  });
}

}  // namespace
}  // namespace penstock
