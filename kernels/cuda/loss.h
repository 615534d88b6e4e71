// Cross-entropy of logits. Formula: kernels/kernels.h, cross_entropy.
#pragma once

#include "kernels/cuda/stream.h"
#include "kernels/cuda/view.h"

namespace penstock::cuda {

// losses[i] = log_sum_exp(logits[i, :]) - logits[i, targets[i]], fp32;
// d_logits[i, :] = gradient_scale * (softmax(logits[i, :]) - onehot(targets[i])); may be logits;
// null data: not wanted. A row with targets[i] < 0 has loss and gradient 0. The logits of all
// tokens are never there at once: callers take rows in chunks, each through the head, this and the
// head's gradients. REQUIRES: vocab a multiple of 8, targets[i] < vocab.
template <typename T>
struct CrossEntropy {
  int64_t rows = 0;
  int64_t vocab = 0;
  View<const T> logits = {};
  const int32_t* targets = nullptr;
  float gradient_scale = 1;
  float* losses = nullptr;
  View<T> d_logits = {};
};
template <typename T>
void cross_entropy(Stream& stream, const CrossEntropy<T>& in);

}  // namespace penstock::cuda
