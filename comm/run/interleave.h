// The order in which the sub-operations of an overlapped forward and backward pass are issued, so
// that each exchange of tokens has compute of the other pass beside it. One table drives every
// backend:
//
//   combine(B) | attn(F) dispatch(F) mlp(B) dispatch(B) mlp(W) mlp(F) combine(F) attn(B) combine(B)
//   output(F) attn(W) | the same again for the next layer
//
// Compute and exchanges each come in the order of DeepSeek-V3's own trace
// (deepseek-ai/profile-data).
// There a host issues both ahead of the device, and a stream starts an exchange when its input is
// ready, wherever it was issued; here every exchange is issued right when its input is ready,
// because a backend that computes as it issues (the CPU) would otherwise start it operations late
// and leave combine(F) with nothing beside it. What runs beside each, until what needs it:
//
//   combine(B)   attn(W) of the layer before it, attn(F)      dispatch(F)  mlp(B), mlp(W)
//   dispatch(B)  mlp(W), mlp(F)                               combine(F)   attn(B), attn(W)
//
// The output of the last layer and the gradient of the first one's input, which neighbouring stages
// wait for, are there before the last attn(W), which nobody waits for: so that has both sends
// beside it, and the last combine(F) only attn(B).
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

inline constexpr std::array<InterleaveSlot, 12> kInterleaveTable = {{
    {Side::kBackward, SubOp::kCombineBackward},  // of the first layer; later ones stand below
    {Side::kForward, SubOp::kAttention},
    {Side::kForward, SubOp::kDispatch},
    {Side::kBackward, SubOp::kMlpBackward},
    {Side::kBackward, SubOp::kDispatchBackward},
    {Side::kBackward, SubOp::kMlpWeight},
    {Side::kForward, SubOp::kMlp},
    {Side::kForward, SubOp::kCombine},
    {Side::kBackward, SubOp::kAttentionBackward},
    {Side::kBackward, SubOp::kCombineBackward},  // of the next layer
    {Side::kForward, SubOp::kOutput},
    {Side::kBackward, SubOp::kAttentionWeight},
}};

// The slot of the table in which `op` is issued. Operations at the ends of a pass go where they
// have company: the embedding in the slot of attn(F), the head's gradients in that of combine(B),
// the embedding's in that of attn(W).
SubOp interleave_slot_of(SubOp op);

// Runs both passes to their ends, table row by table row. They need not have the same number of
// layers: the longer one runs on alone. Every rank of an expert group runs the same two passes,
// hence the same order. A pass is a Pass, or what can stand for one.
template <typename ForwardPass, typename BackwardPass>
Status run_overlapped(ForwardPass& forward, BackwardPass& backward) {
  bool moved = false;
  const auto run_slot = [&moved](auto& pass, SubOp slot) -> Status {
    while (!pass.finished() && interleave_slot_of(pass.next()) == slot) {
      PENSTOCK_TRY(pass.run_next());
      moved = true;
    }
    return {};
  };
  while (!forward.finished() || !backward.finished()) {
    moved = false;
    for (const InterleaveSlot& slot : kInterleaveTable) {
      PENSTOCK_TRY(slot.side == Side::kForward ? run_slot(forward, slot.op)
                                               : run_slot(backward, slot.op));
    }
    PENSTOCK_CHECK(moved);  // the table has a slot for every operation
  }
  return {};
}

}  // namespace penstock
