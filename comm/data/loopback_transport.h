// Transport between threads of one process: every rank of a small world, for tests and
// single-process runs.
//
// A send completes when its receiver has copied the bytes out, never before: a program that only
// works because a network happens to buffer its messages deadlocks here, and its timeout says so.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "comm/base/clock.h"
#include "comm/data/transport.h"

namespace penstock {

struct LoopbackOptions {
  Duration timeout = std::chrono::seconds(30);  // of one wait()
  uint32_t operations_max = 4096;  // under way at once, per rank; more is a failed check
};

// One rank's end. All ends of a world share it; the last one destroyed frees it. An end that is
// destroyed is dead to the others, like a process that exited.
class LoopbackTransport : public Transport {
 public:
  // The rank dies: its own operations fail with kAborted, those of its peers on it with
  // kUnavailable. Any thread; idempotent.
  virtual void kill() = 0;
};

// The ends of a world of `world_size` ranks, by rank. Each may be used by one thread at a time.
std::vector<std::unique_ptr<LoopbackTransport>> make_loopback(int32_t world_size,
                                                              const LoopbackOptions& options = {});

}  // namespace penstock
