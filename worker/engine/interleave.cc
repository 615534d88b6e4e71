#include "worker/engine/interleave.h"

#include "comm/base/check.h"

namespace penstock {

SubOp interleave_slot_of(SubOp op) {
  switch (op) {
    case SubOp::kEmbed:
    case SubOp::kOutput:
      return SubOp::kAttention;
    case SubOp::kOutputBackward:
    case SubOp::kOutputWeight:
      return SubOp::kCombineBackward;
    case SubOp::kEmbedWeight:
      return SubOp::kAttentionWeight;
    case SubOp::kAttention:
    case SubOp::kDispatch:
    case SubOp::kMlp:
    case SubOp::kCombine:
    case SubOp::kCombineBackward:
    case SubOp::kMlpBackward:
    case SubOp::kDispatchBackward:
    case SubOp::kMlpWeight:
    case SubOp::kAttentionBackward:
    case SubOp::kAttentionWeight:
      return op;
  }
  PENSTOCK_CHECK(false, static_cast<int>(op));
}

Status run_overlapped(Pass& forward, Pass& backward) {
  while (!forward.finished() || !backward.finished()) {
    bool moved = false;
    for (const InterleaveSlot& slot : kInterleaveTable) {
      Pass& pass = slot.side == Side::kForward ? forward : backward;
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
