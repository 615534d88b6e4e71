#include "worker/engine/slot_needs.h"

#include <algorithm>
#include <deque>

#include "comm/base/check.h"

namespace penstock {
namespace {

// Raises `needs` to what one step takes.
void walk(const std::vector<Instruction>& training, std::array<SlotNeeds, 2>& needs) {
  std::array<int32_t, 2> live{};
  std::array<int32_t, 2> waiting{};  // weight parts queued
  std::deque<uint8_t> weight_queue;  // their directions, oldest first
  const auto begin_backward = [&](uint8_t d) {
    needs[d].gradients = std::max(needs[d].gradients, waiting[d] + 1);
  };
  for (const Instruction& i : training) {
    switch (i.op) {
      case Op::kForward:
      case Op::kOverlapped:
        needs[i.direction].activations =
            std::max(needs[i.direction].activations, ++live[i.direction]);
        if (i.op == Op::kOverlapped) {
          begin_backward(i.backward_direction);
          --live[i.backward_direction];
        }
        break;
      case Op::kBackward:
        begin_backward(i.direction);
        --live[i.direction];
        break;
      case Op::kBackwardInput:
        begin_backward(i.direction);
        ++waiting[i.direction];
        weight_queue.push_back(i.direction);
        break;
      case Op::kBackwardWeight: {
        PENSTOCK_CHECK(!weight_queue.empty());
        const uint8_t d = weight_queue.front();
        weight_queue.pop_front();
        --waiting[d];
        --live[d];
        break;
      }
      default:
        break;
    }
  }
}

}  // namespace

std::array<SlotNeeds, 2> slot_needs(const Program& program) {
  std::array<SlotNeeds, 2> needs;
  walk(program.training, needs);
  for (const ResizedTraining& resized : program.resized) walk(resized.training, needs);
  return needs;
}

}  // namespace penstock
