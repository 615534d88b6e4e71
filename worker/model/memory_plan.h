// Hands out an arena's memory, or only counts what would be handed out: one function describes a
// set of buffers, is run once to learn their size and once to place them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/arena.h"

namespace penstock {

class MemoryPlan {
 public:
  // Counts only; every pointer is null.
  MemoryPlan() = default;
  // Takes from `arena`, which must outlive the pointers.
  explicit MemoryPlan(Arena& arena) : arena_(&arena) {}

  float* floats(int64_t count) {
    bytes_ += Arena::rounded_bytes(count, sizeof(float));
    return arena_ ? arena_->floats(count) : nullptr;
  }
  int32_t* int32s(int64_t count) {
    bytes_ += Arena::rounded_bytes(count, sizeof(int32_t));
    return arena_ ? arena_->int32s(count) : nullptr;
  }
  int64_t* int64s(int64_t count) {
    bytes_ += Arena::rounded_bytes(count, sizeof(int64_t));
    return arena_ ? arena_->int64s(count) : nullptr;
  }
  int64_t bytes() const { return bytes_; }

 private:
  Arena* arena_ = nullptr;
  int64_t bytes_ = 0;
};

// Micro-batch size: its runtime value, or the largest that buffers are made for.
struct TokenShape {
  int64_t sequences = 0;
  int64_t length = 0;
  int64_t tokens() const { return sequences * length; }
};

}  // namespace penstock
