// The sub-operations that the passes of one micro-batch through one stage are made of: the order of
// work that engine, virtual time and trace share. An engine may interleave those of two passes, so
// that each exchange of tokens between expert peers has compute beside it
// (deepseek-ai/profile-data).
//
// Forward, per layer:   attention, dispatch (starts), mlp (shared expert; finishes dispatch; routed
//                       experts), combine (starts). The next attention, or the output, finishes it.
// Backward, per layer:  combine backward (starts), mlp backward (finishes it), dispatch backward
//                       (starts), mlp weight, attention backward (finishes it), attention weight;
//                       but the next layer's combine starts before this layer's attention weight,
//                       which it does not need and which hides it.
// In a dense layer the exchanges do nothing; their sub-operations are there all the same, so that
// the order never depends on the layer.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace penstock {

enum class SubOp : uint8_t {
  kEmbed,      // first stage: token ids to vectors
  kAttention,  // finishes the combine of the layer before; norm, MLA, residual, norm, gate
  kDispatch,
  kMlp,
  kCombine,
  kOutput,          // finishes the last combine; last stage: final norm, head, loss
  kOutputBackward,  // last stage: gradient of head and final norm, towards the input
  kOutputWeight,    // last stage: gradients of lm_head
  kCombineBackward,
  kMlpBackward,
  kDispatchBackward,
  kMlpWeight,
  kAttentionBackward,
  kAttentionWeight,
  kEmbedWeight,  // first stage: gradients of the embedding
};
inline constexpr int kSubOpCount = 15;

// "attn(F)", "dispatch(B)", "mlp(W)": the names of DeepSeek's published trace.
std::string_view sub_op_name(SubOp op);

// Whether the operation makes nothing but gradients of weights.
constexpr bool is_weight_part(SubOp op) {
  return op == SubOp::kOutputWeight || op == SubOp::kMlpWeight || op == SubOp::kAttentionWeight ||
         op == SubOp::kEmbedWeight;
}

// Whether the operation starts an exchange of tokens and returns without waiting.
constexpr bool is_exchange(SubOp op) {
  return op == SubOp::kDispatch || op == SubOp::kCombine || op == SubOp::kCombineBackward ||
         op == SubOp::kDispatchBackward;
}

enum class PassKind : uint8_t { kForward, kBackward, kBackwardInput, kWeight };

struct PassOp {
  SubOp op = SubOp::kEmbed;
  int32_t layer = -1;  // of the stage's; -1 for embedding and output
  bool operator==(const PassOp&) const = default;
};

// What a pass over `layer_count` >= 1 layers does, in order. Backward kinds take the layers from
// the last to the first. `first`, `last`: whether the stage has the embedding, the head.
std::vector<PassOp> pass_ops(PassKind kind, int32_t layer_count, bool first, bool last);

}  // namespace penstock
