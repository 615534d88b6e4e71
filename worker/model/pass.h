// The passes of one micro-batch through one stage, as linear lists of sub-operations that an engine
// may interleave with those of another pass, so that each exchange of tokens between expert peers
// has compute beside it (deepseek.md §1.8).
//
// Forward, per layer:   attention, dispatch (starts), mlp (shared expert; finishes dispatch; routed
// experts),
//                       combine (starts). The next attention, or the output, finishes the combine.
// Backward, per layer:  combine backward (starts), mlp backward, dispatch backward (starts), mlp
// weight,
//                       attention backward (finishes dispatch backward), attention weight.
// In a dense layer the exchanges do nothing; their sub-operations are there all the same, so that
// the order never depends on the layer.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "comm/base/status.h"

namespace penstock {

class Stage;

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

// "attn(F)", "dispatch(B)", "mlp(W)": the names of DeepSeek's published trace.
std::string_view sub_op_name(SubOp op);
// Whether the operation starts an exchange of tokens and returns without waiting.
constexpr bool is_exchange(SubOp op) {
  return op == SubOp::kDispatch || op == SubOp::kCombine || op == SubOp::kCombineBackward ||
         op == SubOp::kDispatchBackward;
}

// A pass under way: a cursor over its sub-operations. Small, copyable; no copy may run beside the
// original.
// A default-made pass is finished.
class Pass {
 public:
  bool finished() const { return next_ >= count_; }
  // The sub-operation that run_next() will run. REQUIRES: !finished().
  SubOp next() const;
  // Layer (global index) of next(); -1 for embedding and output.
  int64_t next_layer() const;
  // Runs one. An error (a lost peer) leaves the stage unusable: the rank exits. REQUIRES:
  // !finished().
  Status run_next();
  // Runs all that is left.
  Status run();
  Pass() = default;

 private:
  friend class Stage;
  enum class Kind : uint8_t { kForward, kBackward, kBackwardInput, kWeight };
  Pass(Stage* stage, Kind kind, int32_t slot, int32_t gradient_slot);
  struct Shape {
    std::span<const SubOp> before, layer, after;
  };
  Shape shape() const;
  struct Position {
    SubOp op;
    int32_t layer;  // index inside the stage; -1 for embedding and output
  };
  Position position() const;

  Stage* stage_ = nullptr;
  Kind kind_ = Kind::kForward;
  int32_t slot_ = -1;
  int32_t gradient_slot_ = -1;
  int32_t next_ = 0;
  int32_t count_ = 0;
};

}  // namespace penstock
