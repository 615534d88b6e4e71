// The order in which the sub-operations of an overlapped forward and backward pass are issued, so
// that each exchange of tokens has compute of the other pass beside it. One table, from the issue
// order of DeepSeek-V3's own trace (deepseek.md §1.8), drives every backend:
//
//   combine(B) attn(F) mlp(B) dispatch(F) dispatch(B) mlp(W) mlp(F) attn(B) attn(W) combine(F) per
//   layer
#pragma once

#include <array>
#include <cstdint>

#include "comm/base/check.h"
#include "comm/base/status.h"
#include "comm/run/sub_op.h"

namespace penstock {

enum class Side : uint8_t { kForward, kBackward };

struct InterleaveSlot {
  Side side;
  SubOp op;
};

inline constexpr std::array<InterleaveSlot, 10> kInterleaveTable = {{
    {Side::kBackward, SubOp::kCombineBackward},
    {Side::kForward, SubOp::kAttention},
    {Side::kBackward, SubOp::kMlpBackward},
    {Side::kForward, SubOp::kDispatch},
    {Side::kBackward, SubOp::kDispatchBackward},
    {Side::kBackward, SubOp::kMlpWeight},
    {Side::kForward, SubOp::kMlp},
    {Side::kBackward, SubOp::kAttentionBackward},
    {Side::kBackward, SubOp::kAttentionWeight},
    {Side::kForward, SubOp::kCombine},
}};

// The slot of the table in which `op` is issued. Operations at the ends of a pass go where they
// have company: embedding and output in the slot of attn(F) (which, like them, starts or ends a run
// of layers), the head's gradients in that of combine(B), the embedding's in that of attn(W).
SubOp interleave_slot_of(SubOp op);

// Runs both passes to their ends, table row by table row. They need not have the same number of
// layers: the longer one runs on alone. Every rank of an expert group runs the same two passes,
// hence the same order. PassType is Pass; a test takes one that writes down what it is told to run.
template <typename PassType>
Status run_overlapped(PassType& forward, PassType& backward) {
  while (!forward.finished() || !backward.finished()) {
    bool moved = false;
    for (const InterleaveSlot& slot : kInterleaveTable) {
      PassType& pass = slot.side == Side::kForward ? forward : backward;
      while (!pass.finished() && interleave_slot_of(pass.next()) == slot.op) {
        PENSTOCK_TRY(pass.run_next());
        moved = true;
      }
    }
    PENSTOCK_CHECK(moved);  // the table has a slot for every operation
  }
  return {};
}

}  // namespace penstock
