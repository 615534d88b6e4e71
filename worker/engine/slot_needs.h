// How many micro-batches a program keeps alive at once: what a stage's memory is sized by.
#pragma once

#include <array>
#include <cstdint>

#include "comm/run/program.h"

namespace penstock {

struct SlotNeeds {
  int32_t activations =
      0;  // most micro-batches whose forward began and whose last backward part has not ended
  int32_t gradients = 0;  // most whose backward began and whose weight part has not ended
};

// By direction. A pure walk of the training program, of every size of it.
std::array<SlotNeeds, 2> slot_needs(const Program& program);

}  // namespace penstock
