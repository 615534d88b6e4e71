// The memory in which a rank keeps its training state, as others see it: its daemon, when the rank
// is gone, and the rank that takes its place (worker/engine/state_memory.h).
//
//   | head 4 KiB | generation 0 | generation 1 | generation 2 |
//
// A generation is the state after one step. A step reads the newest and writes another, so that the
// newest is whole wherever the writer dies; three, because besides these two one may be kept still
// while a checkpoint of it is written. What lies where in a generation only the rank knows, who
// makes it from its layout; `contents` names what that layout is made from.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "comm/base/bytes.h"
#include "comm/base/hash.h"
#include "comm/base/ids.h"
#include "comm/base/status.h"

namespace penstock {

inline constexpr size_t kStateGenerations = 3;
inline constexpr uint64_t kHeldStateMagic = 0x31455441'54534c50;  // "PLSTATE1"
inline constexpr uint64_t kHeldStateHeadBytes = 4096;

// Whose state: it is of use to a rank with the same identity only.
struct HeldStateIdentity {
  JobId job;
  Rank rank;
  Digest contents;  // of all that says which bytes lie where, and what they mean
  bool operator==(const HeldStateIdentity&) const = default;
};

// In host byte order: it never leaves the host. A step is written after the bytes of its
// generation, and the magic number after all the rest of a new head, so that memory holds what its
// head says whenever the writer dies.
struct HeldStateHead {
  uint64_t magic = 0;  // kHeldStateMagic: the rest is there
  uint64_t job = 0;
  int64_t rank = 0;
  Digest contents;
  uint64_t generation_bytes = 0;
  // The step whose state each generation is; -1: none, or it is being written.
  std::array<std::atomic<int64_t>, kStateGenerations> steps = {-1, -1, -1};
};
static_assert(sizeof(HeldStateHead) <= kHeldStateHeadBytes);
static_assert(std::atomic<int64_t>::is_always_lock_free, "processes share it");

uint64_t held_state_bytes(uint64_t generation_bytes);

struct HeldState {
  HeldStateIdentity identity;
  uint64_t generation_bytes = 0;
  std::vector<int64_t> steps;  // that are whole, ascending
};

// From the head of such memory, whose size is `byte_count`. Nobody may be writing it. kDataLoss:
// it is none, or holds less than it says.
Result<HeldState> read_held_state(const HeldStateHead& head, uint64_t byte_count);

}  // namespace penstock
