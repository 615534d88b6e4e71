// The group-limited sigmoid gate, by sorting. Contract: kernels/kernels.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/reference/view.h"

namespace penstock::reference {

// Indices of `values`, best first: NaN before every number, then falling, equal values by index.
inline std::vector<int64_t> ranked(const std::vector<double>& values) {
  std::vector<int64_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    if (std::isnan(values[a])) return !std::isnan(values[b]);
    return values[a] > values[b];
  });
  return order;
}

// Sets the choices of every group but the best `topk_groups` to -infinity.
inline void drop_groups(const RouterShape& shape, std::vector<double>& choices) {
  const int64_t group_size = shape.experts / shape.groups;
  std::vector<double> group_scores;
  for (int64_t g = 0; g < shape.groups; ++g) {
    std::vector<double> members(choices.begin() + g * group_size,
                                choices.begin() + (g + 1) * group_size);
    const std::vector<int64_t> order = ranked(members);
    group_scores.push_back(group_size == 1 ? members[0] : members[order[0]] + members[order[1]]);
  }
  const std::vector<int64_t> order = ranked(group_scores);
  for (int64_t place = shape.topk_groups; place < shape.groups; ++place) {
    const auto first = choices.begin() + order[place] * group_size;
    std::fill(first, first + group_size, -std::numeric_limits<double>::infinity());
  }
}

template <typename T>
void router(const RouterShape& shape, MatrixView<const T> logits, const T* bias, T* scores,
            int32_t* expert_ids, T* weights, int64_t* counts) {
  std::fill(counts, counts + shape.experts, 0);
  std::vector<double> choices(static_cast<size_t>(shape.experts));
  for (int64_t t = 0; t < shape.tokens; ++t) {
    T* const row = scores + t * shape.experts;
    for (int64_t e = 0; e < shape.experts; ++e) {
      row[e] = static_cast<T>(1.0 / (1.0 + std::exp(-static_cast<double>(logits(t, e)))));
      choices[e] = static_cast<T>(row[e] + bias[e]);  // rounded as Hugging Face's fp32 sum is
    }
    drop_groups(shape, choices);
    const std::vector<int64_t> order = ranked(choices);
    double sum = 0;
    for (int64_t i = 0; i < shape.topk; ++i) sum += row[order[i]];
    const double divisor = shape.normalise ? sum + 1e-20 : 1.0;
    for (int64_t i = 0; i < shape.topk; ++i) {
      expert_ids[t * shape.topk + i] = static_cast<int32_t>(order[i]);
      weights[t * shape.topk + i] =
          static_cast<T>(row[order[i]] / divisor * static_cast<double>(shape.scaling_factor));
      ++counts[order[i]];
    }
  }
}

template <typename T>
void router_backward(const RouterShape& shape, const T* scores, const int32_t* expert_ids,
                     const T* d_weights, MatrixView<T> d_logits) {
  for (int64_t t = 0; t < shape.tokens; ++t) {
    const T* const row = scores + t * shape.experts;
    for (int64_t e = 0; e < shape.experts; ++e) d_logits(t, e) = 0;
    double sum = 0;
    double dot = 0;
    for (int64_t i = t * shape.topk; i < (t + 1) * shape.topk; ++i) {
      sum += row[expert_ids[i]];
      dot += static_cast<double>(row[expert_ids[i]]) * d_weights[i];
    }
    const double divisor = shape.normalise ? sum + 1e-20 : 1.0;
    const double shared = shape.normalise ? dot / divisor : 0.0;
    for (int64_t i = t * shape.topk; i < (t + 1) * shape.topk; ++i) {
      const double score = row[expert_ids[i]];
      const double d_score = shape.scaling_factor / divisor * (d_weights[i] - shared);
      d_logits(t, expert_ids[i]) = static_cast<T>(d_score * score * (1.0 - score));
    }
  }
}

}  // namespace penstock::reference
