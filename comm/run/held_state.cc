#include "comm/run/held_state.h"

#include <algorithm>
#include <limits>

namespace penstock {

uint64_t held_state_bytes(uint64_t generation_bytes) {
  return kHeldStateHeadBytes + kStateGenerations * generation_bytes;
}

Result<HeldState> read_held_state(const HeldStateHead& head, uint64_t byte_count) {
  constexpr uint64_t kGenerationBytesMax =
      (std::numeric_limits<uint64_t>::max() - kHeldStateHeadBytes) / kStateGenerations;
  if (head.magic != kHeldStateMagic || head.rank < 0 ||
      head.rank > std::numeric_limits<int32_t>::max() ||
      head.generation_bytes > kGenerationBytesMax ||
      byte_count != held_state_bytes(head.generation_bytes)) {
    return data_loss("no state of a rank");
  }
  HeldState held{
      .identity = {JobId{head.job}, Rank{static_cast<int32_t>(head.rank)}, head.contents},
      .generation_bytes = head.generation_bytes,
      .steps = {}};
  for (const std::atomic<int64_t>& whole : head.steps) {
    const int64_t step = whole.load(std::memory_order_acquire);
    if (step >= 0) held.steps.push_back(step);
  }
  std::sort(held.steps.begin(), held.steps.end());
  return held;
}

}  // namespace penstock
