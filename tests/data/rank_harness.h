// Runs one function as every rank of a small world: as threads over the loopback transport, or as
// forked processes over UCX. Expectations inside the function count as the test's own.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "comm/base/clock.h"
#include "comm/data/transport.h"

namespace penstock {

enum class TransportKind { kLoopback, kUcx };
std::string to_string(TransportKind kind);

struct HarnessOptions {
  int32_t world_size = 2;
  Duration timeout = std::chrono::seconds(20);   // of one wait()
  Duration spin = std::chrono::microseconds(0);  // UCX: of one wait(), before it sleeps
  std::vector<int32_t> killed = {};              // ranks that call die()
};

// What the function gets. die() is the end of the rank without any goodbye: SIGKILL of its process,
// kill() of its loopback end. Return right after it.
struct RankContext {
  Transport& transport;
  std::function<void()> die;
};

// Returns when every rank has ended; a rank that fails, crashes or dies without being in `killed`
// fails the test.
void run_ranks(TransportKind kind, const HarnessOptions& options,
               const std::function<void(RankContext&)>& rank_main);

}  // namespace penstock
