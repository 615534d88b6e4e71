#include "comm/run/interleave.h"

namespace penstock {

SubOp interleave_slot_of(SubOp op) {
  switch (op) {
    case SubOp::kEmbed:
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
    case SubOp::kOutput:
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

}  // namespace penstock
