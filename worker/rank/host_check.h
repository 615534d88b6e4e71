// Finds out whether a host can be trusted with ranks: memory that keeps what is written to it,
// processors that compute what the others compute, a disk and a network that return what they were
// given. A host that fails wastes the work of every rank it works with.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "comm/base/bytes.h"
#include "comm/base/clock.h"
#include "comm/base/file.h"

namespace penstock {

struct HostCheck {
  std::string name;      // "memory"
  std::string measured;  // "64 MiB kept what was written, 3.1 GiB/s"
  std::string problem;   // empty: passed
  bool passed() const { return problem.empty(); }
};

enum class CheckEffort : uint8_t {
  kQuick,     // some tens of milliseconds: before a worker registers
  kThorough,  // a minute: half of the memory that is free, every processor under load for 30 s
};

// All of those below. `directory` exists; nothing is left in it.
std::vector<HostCheck> check_host(CheckEffort effort, const Path& directory);

// Two patterns, each the inverse of the other, so that every bit was 0 and 1. `between` runs after
// each was written, before it is read.
HostCheck check_memory(MutableBytes memory, const std::function<void(size_t pattern)>& between);

// c = a b, of square fp32 matrices of that many rows.
using Multiply = std::function<void(int64_t size, const float* a, const float* b, float* c)>;
Multiply multiply_by_kernels();  // as training does

// The same matrix product on every processor this process may use, one after the other or, for
// `span`, all at once again and again: right to 1e-5 (relative Frobenius norm, against fp64), and
// of the same bits everywhere.
// One `multiply_on(processor)` for each, used on it.
HostCheck check_processors(const std::function<Multiply(int processor)>& multiply_on,
                           Duration span);

// Writes a file, syncs it, drops it from the page cache and reads it back.
HostCheck check_disk(const Path& directory, uint64_t byte_count);

// Sends through a TCP connection from this host to itself.
HostCheck check_loopback(uint64_t byte_count);

// Says whether the kernel's clock is synchronised. Never fails: nothing is decided by clocks.
HostCheck check_clock();

}  // namespace penstock
