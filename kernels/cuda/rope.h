// Rotary position. Formula: kernels/kernels.h, rope.
#pragma once

#include "kernels/cuda/stream.h"
#include "kernels/cuda/view.h"

namespace penstock::cuda {

// Rotates, in place, the pairs (x[2i], x[2i+1]) of every head; element (token, head, d) is
// x[token * token_stride + head * head_stride + d]. cosine, sine: [>= seq_length, dim / 2], fp32.
// REQUIRES: dim and both strides are multiples of 8.
template <typename T>
struct Rope {
  int64_t tokens = 0;
  int64_t seq_length = 0;
  int64_t heads = 0;
  int64_t dim = 0;
  const float* cosine = nullptr;
  const float* sine = nullptr;
  bool inverse = false;  // by minus the angle: the gradient
  T* x = nullptr;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};
template <typename T>
void rope(Stream& stream, const Rope<T>& in);

}  // namespace penstock::cuda
