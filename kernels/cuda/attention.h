// Causal attention and its gradients. Formulas and shapes: kernels/kernels.h, attention() and
// attention_backward(); scores are never stored, but taken again, tile by tile, for the gradients.
//
// Inputs and outputs are bf16, softmax and all sums fp32; weights of values and gradients of scores
// are rounded to bf16 before they are multiplied.
//
// REQUIRES: scale > 0; nope_dim >= 16; every dim a multiple of 16, query_dim() and value_dim <= 256
// (fast where they are 192 and 128 or just below); data 16-byte aligned, strides multiples of 8;
// strides, tokens() and tokens() * heads / 16 below 2^31. A NaN of a token may reach the outputs of
// the 127 tokens before it, too.
#pragma once

#include "kernels/cuda/stream.h"
#include "kernels/cuda/view.h"
#include "kernels/kernels.h"

namespace penstock::cuda {

// Element (token, head, d) is data[token * token_stride + head * head_stride + d].
template <typename T>
struct HeadsView {
  T* data = nullptr;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

struct AttentionRows {
  HeadsView<const Bf16> query;     // [tokens, heads, nope_dim + rope_dim]
  HeadsView<const Bf16> key_nope;  // [tokens, heads, nope_dim]
  View<const Bf16> key_rope;       // [tokens, rope_dim]; unused when rope_dim is 0
  HeadsView<const Bf16> value;     // [tokens, heads, value_dim]
};

struct Attention {
  AttentionShape shape;
  float scale = 0;
  AttentionRows in;
  HeadsView<Bf16> out;           // [tokens, heads, value_dim]
  float* log_sum_exp = nullptr;  // [batch, heads, seq_length], natural, kept for the gradients
};
void attention(Stream& stream, const Attention& attention);

struct AttentionGradient {
  AttentionShape shape;
  float scale = 0;
  AttentionRows in;
  HeadsView<const Bf16> out;
  const float* log_sum_exp = nullptr;
  HeadsView<const Bf16> d_out;
  // All overwritten.
  HeadsView<Bf16> d_query;
  HeadsView<Bf16> d_key_nope;
  View<Bf16> d_key_rope;  // summed over heads, in their order
  HeadsView<Bf16> d_value;
  float* workspace = nullptr;  // 16-byte aligned, attention_gradient_floats(shape)
};
void attention_gradient(Stream& stream, const AttentionGradient& gradient);

// For every token and head out . d_out, then the gradient of the shared part of its key, which a
// second kernel sums over the heads: at 128 heads of 64, 32 KiB a token.
inline int64_t attention_delta_floats(const AttentionShape& shape) {
  return (shape.tokens() * shape.heads + 3) / 4 * 4;  // what follows stays aligned
}
inline int64_t attention_gradient_floats(const AttentionShape& shape) {
  return attention_delta_floats(shape) + shape.tokens() * shape.heads * shape.rope_dim;
}

}  // namespace penstock::cuda
