#include "comm/data/ucx_transport.h"

#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <numeric>

#include "comm/base/file.h"
#include "comm/data/reduce.h"
#include "tests/data/expert_problem.h"
#include "tests/data/transport_conformance.h"
#include "tests/support/allocation_counter.h"

namespace penstock {
namespace {

INSTANTIATE_TEST_SUITE_P(Ucx, TransportConformance, testing::Values(TransportKind::kUcx));

std::vector<Rank> first_ranks(int32_t count) {
  std::vector<Rank> ranks;
  for (int32_t i = 0; i < count; ++i) ranks.push_back({i});
  return ranks;
}

TEST(UcxTransportTest, ExpertExchangeMatchesOneProcessBitForBit) {
  const ExpertProblem problem{
      .group_size = 4, .experts_per_rank = 4, .top_k = 4, .hidden_size = 96, .tokens_max = 300};
  run_ranks(TransportKind::kUcx, {.world_size = 4}, [&](RankContext& rank) {
    const int32_t self = rank.transport.rank().value;
    auto exchange = ExpertExchange::create(&rank.transport, problem.config(self));
    ASSERT_TRUE(exchange.ok()) << exchange.status().to_string();
    const RankOutput expected = expected_output(problem, self);
    for (int step = 0; step < 3; ++step) {
      ExchangedLayer layer(problem, self, **exchange, 0, {64});
      const uint64_t allocations_before = allocations_of_this_thread();
      const Status status = layer.run();
      EXPECT_EQ(allocations_of_this_thread() - allocations_before, 0u);
      ASSERT_TRUE(status.ok()) << status.to_string();
      EXPECT_TRUE(layer.output() == expected);
    }
    Reducer reducer(&rank.transport);
    EXPECT_TRUE(reducer.barrier(first_ranks(4), {1}).ok());
  });
}

TEST(UcxTransportTest, ReductionsGiveTheSumInRankOrderOnEveryRank) {
  constexpr size_t kCount = 300'007;
  const auto value_of = [](int32_t rank, size_t i) {
    return static_cast<float>(i % 1000) * 0.37f + 1e4f / static_cast<float>(rank + 1);
  };
  run_ranks(TransportKind::kUcx, {.world_size = 4}, [&](RankContext& rank) {
    Reducer reducer(&rank.transport, 256 << 10);
    std::vector<float> values(kCount), expected(kCount);
    for (size_t i = 0; i < kCount; ++i) {
      values[i] = value_of(rank.transport.rank().value, i);
      expected[i] = value_of(0, i);
      for (int32_t other = 1; other < 4; ++other) expected[i] += value_of(other, i);
    }
    ASSERT_TRUE(reducer.reduce_scatter_sum(first_ranks(4), {1}, values).ok());
    ASSERT_TRUE(reducer.all_gather(first_ranks(4), {1}, values).ok());
    EXPECT_TRUE(values == expected);
    std::vector<double> numbers = {0.1 * rank.transport.rank().value};
    ASSERT_TRUE(reducer.all_reduce_sum(first_ranks(4), {2}, numbers).ok());
    EXPECT_EQ(numbers[0], ((0.1 * 0 + 0.1 * 1) + 0.1 * 2) + 0.1 * 3);
    EXPECT_TRUE(reducer.barrier(first_ranks(4), {1}).ok());
  });
}

// The bar is 100 ms; what it takes is a fraction of one, plus what a loaded machine adds.
TEST(UcxTransportTest, EveryRankNoticesADeadPeerWithinATenthOfASecond) {
  run_ranks(TransportKind::kUcx, {.world_size = 4, .killed = {3}}, [](RankContext& rank) {
    Transport& transport = rank.transport;
    Reducer reducer(&transport);
    ASSERT_TRUE(reducer.barrier(first_ranks(4), {1}).ok());
    if (transport.rank() == Rank{3}) {
      rank.die();
      return;
    }
    const int64_t start_ns = monotonic_ns();
    std::byte byte{};
    const TransferHandle receive = transport.receive(Rank{3}, {2}, {&byte, 1});
    EXPECT_EQ(transport.wait(receive).status().code(), Code::kUnavailable);
    EXPECT_LT(monotonic_ns() - start_ns, 100'000'000);
    // Nobody leaves before everybody has seen it, so that it is rank 3's death each one sees.
    EXPECT_TRUE(reducer.barrier(first_ranks(3), {3}).ok());
  });
}

TEST(UcxTransportTest, LastMessageOfAPeerThatLeftCanStillBeReceived) {
  run_ranks(TransportKind::kUcx, {.world_size = 2, .killed = {1}}, [](RankContext& rank) {
    Transport& transport = rank.transport;
    uint64_t value = 42;
    if (transport.rank() == Rank{1}) {
      EXPECT_TRUE(
          transport.wait(transport.send(Rank{0}, {5}, std::as_bytes(std::span(&value, 1)))).ok());
      rank.die();
      return;
    }
    // Learn of the death first, through another tag.
    std::byte byte{};
    EXPECT_EQ(transport.wait(transport.receive(Rank{1}, {6}, {&byte, 1})).status().code(),
              Code::kUnavailable);
    value = 0;
    const auto got = transport.wait(
        transport.receive(Rank{1}, {5}, std::as_writable_bytes(std::span(&value, 1))));
    ASSERT_TRUE(got.ok()) << got.status().to_string();
    EXPECT_EQ(value, 42u);
  });
}

double cpu_seconds() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
}

TEST(UcxTransportTest, WaitingRankUsesNoCpu) {
  run_ranks(TransportKind::kUcx, {.world_size = 2, .timeout = std::chrono::milliseconds(500)},
            [](RankContext& rank) {
              std::byte byte{};
              const double before = cpu_seconds();
              const Rank peer{1 - rank.transport.rank().value};
              (void)rank.transport.wait(rank.transport.receive(peer, {1}, {&byte, 1}));
              EXPECT_LT(cpu_seconds() - before, 0.05);  // of half a second
            });
}

// While this rank computes, its progress thread answers the other's rendezvous: the peer's send
// completes although its receiver is not in a call.
TEST(UcxTransportTest, TransfersMoveWhileTheReceiverComputes) {
  run_ranks(TransportKind::kUcx, {.world_size = 2}, [](RankContext& rank) {
    Transport& transport = rank.transport;
    std::vector<std::byte> large(8 << 20);
    std::byte token{};
    if (transport.rank() == Rank{0}) {
      const TransferHandle receive = transport.receive(Rank{1}, {1}, large);
      ASSERT_TRUE(transport.wait(transport.send(Rank{1}, {2}, {&token, 1})).ok());
      // "Computes" until the sender has finished, which it tells outside of the transport.
      std::filesystem::path done =
          std::filesystem::temp_directory_path() / fmt::format("penstock-sent-{}", getppid());
      const int64_t deadline_ns = monotonic_ns() + 15'000'000'000;
      while (!std::filesystem::exists(done) && monotonic_ns() < deadline_ns) {
      }
      EXPECT_TRUE(std::filesystem::remove(done)) << "the send did not complete meanwhile";
      EXPECT_TRUE(transport.wait(receive).ok());
      ASSERT_TRUE(transport.wait(transport.send(Rank{1}, {2}, {&token, 1})).ok());
    } else {
      ASSERT_TRUE(transport.wait(transport.receive(Rank{0}, {2}, {&token, 1})).ok());
      ASSERT_TRUE(transport.wait(transport.send(Rank{0}, {1}, large)).ok());
      const auto done =
          std::filesystem::temp_directory_path() / fmt::format("penstock-sent-{}", getppid());
      ASSERT_TRUE(write_and_sync(done, {}).ok());
      ASSERT_TRUE(transport.wait(transport.receive(Rank{0}, {2}, {&token, 1})).ok());
    }
  });
}

TEST(UcxTransportTest, NothingIsLeftInSharedMemory) {
  const auto count = [] {
    using Iterator = std::filesystem::directory_iterator;
    return std::count_if(Iterator("/dev/shm"), Iterator(), [](const auto& entry) {
      return entry.path().filename().string().starts_with("ucx");
    });
  };
  const auto before = count();
  run_ranks(TransportKind::kUcx, {.world_size = 3, .killed = {2}}, [](RankContext& rank) {
    if (rank.transport.rank() == Rank{2}) rank.die();
  });
  EXPECT_LE(count(), before);
}

// Runs `body` in a process of its own, because UCX must not be started in one that forks later.
void run_alone(const std::function<void()>& body) {
  fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    body();
    fflush(nullptr);
    _exit(testing::Test::HasFailure() ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

std::unique_ptr<UcxTransport> make_alone(Rank rank, Epoch epoch, const std::string& tls = "^cma") {
  auto transport =
      UcxTransport::create({.rank = rank, .world_size = 2, .epoch = epoch, .tls = tls});
  PENSTOCK_CHECK(transport.ok(), transport.status().message());
  return std::move(transport).value();
}

TEST(UcxTransportTest, AddressesOfAnotherEpochRankOrWorldSizeAreRefused) {
  run_alone([] {
    const auto self = make_alone({0}, {2});
    const auto older = make_alone({1}, {1});
    const auto refused = [&](const std::vector<std::string>& addresses) {
      const Status status = make_alone({0}, {2})->connect(addresses);
      EXPECT_EQ(status.code(), Code::kInvalidArgument) << status.to_string();
      return status.message();
    };
    EXPECT_EQ(refused({self->address(), older->address()}),
              "the data-plane address given for rank 1 of epoch 2 is that of rank 1 of epoch 1");
    refused({self->address(), self->address()});
    refused({self->address()});
    refused({self->address(), "garbage"});
  });
}

TEST(UcxTransportTest, UnknownTransportIsAnErrorNotACrash) {
  run_alone([] {
    const auto transport =
        UcxTransport::create({.rank = {0}, .world_size = 1, .epoch = {1}, .tls = "carrier_pigeon"});
    EXPECT_FALSE(transport.ok());
    EXPECT_NE(transport.status().message().find("carrier_pigeon"), std::string::npos);
  });
}

TEST(UcxTransportTest, ConnectingToARankThatHasDiedIsUnavailable) {
  int pipe_ends[2];
  ASSERT_EQ(pipe(pipe_ends), 0);
  run_alone([&] {
    const std::string address = make_alone({1}, {1})->address();
    ASSERT_EQ(::write(pipe_ends[1], address.data(), address.size()), std::ssize(address));
  });
  char text[16384];
  const ssize_t size = ::read(pipe_ends[0], text, sizeof(text));
  ASSERT_GT(size, 0);
  run_alone([&] {
    const auto self = make_alone({0}, {1});
    const Status status = self->connect({self->address(), std::string(text, size)});
    EXPECT_EQ(status.code(), Code::kUnavailable) << status.to_string();
  });
  ::close(pipe_ends[0]);
  ::close(pipe_ends[1]);
}

// What it never reads keeps the connection from closing, and UCX from being taken apart.
TEST(UcxTransportTest, ARankWhosePeerHangsCanStillClose) {
  run_alone([] {
    int ends[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends), 0);
    const pid_t peer = fork();
    const Rank self{peer == 0 ? 1 : 0};
    if (peer == 0) prctl(PR_SET_PDEATHSIG, SIGKILL);
    auto transport = make_alone(self, {1}, "tcp");
    const std::string mine = transport->address();
    ASSERT_EQ(::write(ends[self.value], mine.data(), mine.size()), std::ssize(mine));
    std::string theirs(64 << 10, '\0');
    theirs.resize(static_cast<size_t>(::read(ends[self.value], theirs.data(), theirs.size())));
    ASSERT_TRUE(
        transport->connect(peer == 0 ? std::vector{theirs, mine} : std::vector{mine, theirs}).ok());
    if (peer == 0) raise(SIGSTOP);
    int status = 0;
    ASSERT_EQ(waitpid(peer, &status, WUNTRACED), peer);
    ASSERT_TRUE(WIFSTOPPED(status));
    const std::vector<std::byte> message(100'000);
    for (int i = 0; i < 400; ++i) transport->send(Rank{1}, {1}, message);  // more than sockets hold
    EXPECT_EQ(transport->close().code(), Code::kDeadlineExceeded);
    transport.reset();
    kill(peer, SIGKILL);
    waitpid(peer, &status, 0);
  });
}

}  // namespace
}  // namespace penstock
