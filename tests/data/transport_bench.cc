// Times the UCX transport between processes of this host: one-way latency and bandwidth between
// two, a barrier and an all-to-all among several, and the CPU an idle rank uses. SPIN_MICROSECONDS
// in the environment sets how long wait() polls before it sleeps.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "comm/data/reduce.h"
#include "tests/data/rank_harness.h"

namespace penstock {
namespace {

double cpu_seconds() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

uint64_t moved(Transport& transport, TransferHandle handle) {
  const Result<uint64_t> bytes = transport.wait(handle);
  PENSTOCK_CHECK(bytes.ok(), bytes.status().message());
  return *bytes;
}

std::vector<Rank> everyone(const Transport& transport) {
  std::vector<Rank> ranks;
  for (int32_t i = 0; i < transport.world_size(); ++i) ranks.push_back({i});
  return ranks;
}

void time_ping_pong(RankContext& context, size_t size) {
  Transport& transport = context.transport;
  std::vector<std::byte> buffer(size);
  const Rank peer{1 - transport.rank().value};
  const int rounds = size > (1 << 20) ? 20 : 2000;
  const double cpu_start = cpu_seconds();
  const int64_t start_ns = monotonic_ns();
  for (int i = 0; i < rounds; ++i) {
    const bool mine = transport.rank() == Rank{0};
    if (mine) moved(transport, transport.send(peer, {1}, buffer));
    moved(transport, transport.receive(peer, {1}, buffer));
    if (!mine) moved(transport, transport.send(peer, {1}, buffer));
  }
  const double one_way_us = static_cast<double>(monotonic_ns() - start_ns) * 1e-3 / rounds / 2;
  if (transport.rank() == Rank{0}) {
    fmt::print("  {:>9} B one way {:>9.1f} us {:>8.3f} GB/s, {:.1f} us CPU per message\n", size,
               one_way_us, static_cast<double>(size) * 1e-3 / one_way_us,
               (cpu_seconds() - cpu_start) * 1e6 / rounds / 2);
  }
}

void time_barriers(RankContext& context) {
  Reducer reducer(&context.transport);
  const std::vector<Rank> ranks = everyone(context.transport);
  const int rounds = 500;
  const int64_t start_ns = monotonic_ns();
  for (int i = 0; i < rounds; ++i) PENSTOCK_CHECK(reducer.barrier(ranks, {2}).ok());
  if (context.transport.rank() == Rank{0}) {
    fmt::print("  barrier {:.1f} us\n",
               static_cast<double>(monotonic_ns() - start_ns) * 1e-3 / rounds);
  }
}

void time_all_to_all(RankContext& context, size_t size) {
  Transport& transport = context.transport;
  const auto world = static_cast<size_t>(transport.world_size());
  std::vector<std::byte> outgoing(size), incoming(size * world);
  std::vector<TransferHandle> handles;
  const int rounds = 100;
  const double cpu_start = cpu_seconds();
  const int64_t start_ns = monotonic_ns();
  for (int i = 0; i < rounds; ++i) {
    handles.clear();
    for (size_t peer = 0; peer < world; ++peer) {
      const Rank rank{static_cast<int32_t>(peer)};
      if (rank == transport.rank()) continue;
      handles.push_back(
          transport.receive(rank, {3}, MutableBytes(incoming).subspan(peer * size, size)));
      handles.push_back(transport.send(rank, {3}, outgoing));
    }
    for (const TransferHandle handle : handles) moved(transport, handle);
  }
  if (transport.rank() == Rank{0}) {
    const double seconds = static_cast<double>(monotonic_ns() - start_ns) * 1e-9;
    fmt::print(
        "  all-to-all {:>8} B per peer {:>9.1f} us, {:.3f} GB/s in all, {:.0f} us CPU per rank\n",
        size, seconds * 1e6 / rounds,
        static_cast<double>(size * world * (world - 1) * rounds) * 1e-9 / seconds,
        (cpu_seconds() - cpu_start) * 1e6 / rounds);
  }
}

// One rank sleeps in wait() while the other computes for two seconds.
void time_idle(RankContext& context) {
  Transport& transport = context.transport;
  std::byte byte{};
  if (transport.rank() == Rank{0}) {
    const double cpu_start = cpu_seconds();
    const int64_t start_ns = monotonic_ns();
    moved(transport, transport.receive(Rank{1}, {4}, {&byte, 1}));
    fmt::print(
        "  idle in wait(): {:.2f} % of a core\n",
        100 * (cpu_seconds() - cpu_start) * 1e9 / static_cast<double>(monotonic_ns() - start_ns));
  } else if (transport.rank() == Rank{1}) {
    const int64_t end_ns = monotonic_ns() + 2'000'000'000;
    while (monotonic_ns() < end_ns) {
    }
    moved(transport, transport.send(Rank{0}, {4}, {&byte, 1}));
  }
}

TEST(TransportBench, Ucx) {
  const char* const spin_text = std::getenv("SPIN_MICROSECONDS");
  const std::chrono::microseconds spin(spin_text == nullptr ? 0 : std::atoi(spin_text));
  fmt::print("spin {} us\n", spin.count());
  run_ranks(TransportKind::kUcx, {.world_size = 2, .spin = spin}, [](RankContext& context) {
    for (const size_t size : {8, 1024, 8192, 32768, 262144, 1 << 20, 16 << 20}) {
      time_ping_pong(context, size);
    }
    time_idle(context);
  });
  for (const int32_t world : {4, 8}) {
    fmt::print("{} processes\n", world);
    fflush(stdout);
    run_ranks(TransportKind::kUcx, {.world_size = world, .spin = spin}, [](RankContext& context) {
      time_barriers(context);
      for (const size_t size : {1024, 65536, 1 << 20}) time_all_to_all(context, size);
    });
  }
}

}  // namespace
}  // namespace penstock
