// Memory of ranks' state, filled as ranks fill it: for tests of what their daemon does with it.
#pragma once

#include <algorithm>

#include "tests/worker/agent_harness.h"
#include "worker/engine/state_memory.h"

namespace penstock {

inline HeldStateIdentity identity(int32_t rank) {
  return {kJob, Rank{rank}, {5, 6}};
}

// A step of a rank: its state, of so many bytes, is `value` in each of them.
inline void write_step(StateMemory& memory, uint64_t byte_count, int64_t step, std::byte value) {
  const auto g = static_cast<size_t>(step) % kStateGenerations;
  memory.begin_writing(g);
  std::fill_n(memory.generation(g), byte_count, value);
  memory.publish(g, step);
}

}  // namespace penstock
