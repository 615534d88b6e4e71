// The small loss that keeps experts balanced within each sequence (DeepSeek-V3 report §2.1.2). For
// a sequence of T tokens with router scores s, E experts of which k are chosen:
//
//   L = alpha Σ_i f_i P_i      f_i = E / (k T) · tokens whose k largest scores hold s_i
//                              P_i = 1/T Σ_t s_ti / Σ_j s_tj
//
// The scores are the raw ones: no bias, no groups. f is a count and has no gradient; both backends
// share this code, in plain double, since it is a thousandth of the gate's work.
#pragma once

#include <cstdint>

#include "worker/model/memory_plan.h"

namespace penstock {

struct BalanceShape {
  TokenShape tokens;
  int64_t experts = 0;
  int64_t topk = 0;
};

// scores: [tokens, experts]. Fills fractions [sequences, experts] with f and returns
// Σ over the sequences of T Σ_i f_i P_i: the mean over sequences of the loss is that times
// alpha / tokens. Ties go to the lower expert.
double sequence_balance(const BalanceShape& shape, const float* scores, float* fractions);

// d_logits[tokens, experts] += the gradient of `scale` times the sum above, scores being
// sigmoid(logits).
void sequence_balance_backward(const BalanceShape& shape, double scale, const float* scores,
                               const float* fractions, float* d_logits);

}  // namespace penstock
