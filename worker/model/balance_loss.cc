#include "worker/model/balance_loss.h"

#include <algorithm>

namespace penstock {
namespace {

constexpr double kScoreSumMin = 1e-20;  // as in the gate's own normalisation

// Adds `share` to the fraction of each of the topk largest scores: each next one is the largest of
// those that come after the one before, by falling score, then by number.
void count_choices(const BalanceShape& shape, const float* scores, float share, float* fractions) {
  int64_t previous = -1;
  for (int64_t k = 0; k < shape.topk; ++k) {
    int64_t best = -1;
    for (int64_t e = 0; e < shape.experts; ++e) {
      const bool later = previous < 0 || scores[e] < scores[previous] ||
                         (scores[e] == scores[previous] && e > previous);
      if (later && (best < 0 || scores[e] > scores[best])) best = e;
    }
    if (best < 0) return;  // NaN scores: the gate's weights show them
    fractions[best] += share;
    previous = best;
  }
}

double sum_of(const float* scores, int64_t count) {
  double sum = kScoreSumMin;
  for (int64_t e = 0; e < count; ++e) sum += scores[e];
  return sum;
}

// Σ_i f_i s_i / Σ_j s_j of one token.
double weighted_share(const float* scores, const float* fractions, int64_t count) {
  double weighted = 0.0;
  for (int64_t e = 0; e < count; ++e) weighted += static_cast<double>(fractions[e]) * scores[e];
  return weighted / sum_of(scores, count);
}

}  // namespace

double sequence_balance(const BalanceShape& shape, const float* scores, float* fractions) {
  const int64_t length = shape.tokens.length;
  const auto share = static_cast<float>(static_cast<double>(shape.experts) /
                                        static_cast<double>(shape.topk * length));
  double total = 0.0;
  for (int64_t s = 0; s < shape.tokens.sequences; ++s) {
    float* const fraction = fractions + s * shape.experts;
    const float* const first = scores + s * length * shape.experts;
    std::fill_n(fraction, shape.experts, 0.0F);
    for (int64_t t = 0; t < length; ++t) {
      count_choices(shape, first + t * shape.experts, share, fraction);
    }
    for (int64_t t = 0; t < length; ++t) {
      total += weighted_share(first + t * shape.experts, fraction, shape.experts);
    }
  }
  return total;
}

// With S = Σ_j s_j: d/ds_i Σ_j f_j s_j / S = (f_i - Σ_j f_j s_j / S) / S.
void sequence_balance_backward(const BalanceShape& shape, double scale, const float* scores,
                               const float* fractions, float* d_logits) {
  for (int64_t t = 0; t < shape.tokens.tokens(); ++t) {
    const float* const fraction = fractions + t / shape.tokens.length * shape.experts;
    const float* const score = scores + t * shape.experts;
    const double share = weighted_share(score, fraction, shape.experts);
    const double factor = scale / sum_of(score, shape.experts);
    for (int64_t e = 0; e < shape.experts; ++e) {
      const double slope = static_cast<double>(score[e]) * (1.0 - score[e]);
      d_logits[t * shape.experts + e] += static_cast<float>(factor * (fraction[e] - share) * slope);
    }
  }
}

}  // namespace penstock
