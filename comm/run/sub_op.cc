#include "comm/run/sub_op.h"

#include "comm/base/check.h"

namespace penstock {
std::vector<PassOp> pass_ops(PassKind kind, int32_t layer_count, bool first, bool last) {
  const bool input_part = kind == PassKind::kBackward || kind == PassKind::kBackwardInput;
  const bool weight_part = kind == PassKind::kBackward || kind == PassKind::kWeight;
  std::vector<PassOp> ops;
  const auto add = [&](bool wanted, SubOp op, int32_t layer = -1) {
    if (wanted) ops.push_back({op, layer});
  };
  if (kind == PassKind::kForward) {
    add(first, SubOp::kEmbed);
    for (int32_t layer = 0; layer < layer_count; ++layer) {
      for (const SubOp op : {SubOp::kAttention, SubOp::kDispatch, SubOp::kMlp, SubOp::kCombine}) {
        add(true, op, layer);
      }
    }
    add(true, SubOp::kOutput);
    return ops;
  }
  add(last && input_part, SubOp::kOutputBackward);
  add(last && weight_part, SubOp::kOutputWeight);
  add(input_part, SubOp::kCombineBackward, layer_count - 1);
  for (int32_t layer = layer_count - 1; layer >= 0; --layer) {
    add(input_part, SubOp::kMlpBackward, layer);
    add(input_part, SubOp::kDispatchBackward, layer);
    add(weight_part, SubOp::kMlpWeight, layer);
    add(input_part, SubOp::kAttentionBackward, layer);
    add(input_part && layer > 0, SubOp::kCombineBackward, layer - 1);
    add(weight_part, SubOp::kAttentionWeight, layer);
  }
  add(first && weight_part, SubOp::kEmbedWeight);
  return ops;
}

std::string_view sub_op_name(SubOp op) {
  switch (op) {
    case SubOp::kEmbed:
      return "embed(F)";
    case SubOp::kAttention:
      return "attn(F)";
    case SubOp::kDispatch:
      return "dispatch(F)";
    case SubOp::kMlp:
      return "mlp(F)";
    case SubOp::kCombine:
      return "combine(F)";
    case SubOp::kOutput:
      return "output(F)";
    case SubOp::kOutputBackward:
      return "output(B)";
    case SubOp::kOutputWeight:
      return "output(W)";
    case SubOp::kCombineBackward:
      return "combine(B)";
    case SubOp::kMlpBackward:
      return "mlp(B)";
    case SubOp::kDispatchBackward:
      return "dispatch(B)";
    case SubOp::kMlpWeight:
      return "mlp(W)";
    case SubOp::kAttentionBackward:
      return "attn(B)";
    case SubOp::kAttentionWeight:
      return "attn(W)";
    case SubOp::kEmbedWeight:
      return "embed(W)";
  }
  PENSTOCK_CHECK(false, "unknown sub-operation");
  return {};
}

}  // namespace penstock
