#include "kernels/cpu/router.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/layers.h"

namespace penstock::cpu {
namespace {

// Strictly better, so that of equal values the one seen first (the lowest index) stays. NaN is
// best.
bool better(float a, float b) {
  return a > b || (std::isnan(a) && !std::isnan(b));
}

// The sum of the two largest of `count` >= 2 values.
float top_two_sum(const float* values, int64_t count) {
  float first = values[0];
  float second = values[1];
  if (better(second, first)) std::swap(first, second);
  for (int64_t i = 2; i < count; ++i) {
    if (better(values[i], first)) {
      second = first;
      first = values[i];
    } else if (better(values[i], second)) {
      second = values[i];
    }
  }
  return first + second;
}

// Sets the choices of every group but the best to -infinity. A group is kept when fewer than
// topk_groups others go before it; groups are few, so counting beats sorting.
void drop_groups(const RouterShape& shape, float* choices, float* group_scores) {
  const int64_t group_size = shape.experts / shape.groups;
  for (int64_t g = 0; g < shape.groups; ++g) {
    group_scores[g] = top_two_sum(choices + g * group_size, group_size);
  }
  for (int64_t g = 0; g < shape.groups; ++g) {
    int64_t before = 0;
    for (int64_t other = 0; other < shape.groups; ++other) {
      const bool tie_won = other < g && !better(group_scores[g], group_scores[other]);
      before += tie_won || better(group_scores[other], group_scores[g]) ? 1 : 0;
    }
    if (before >= shape.topk_groups) {
      std::fill_n(choices + g * group_size, group_size, -std::numeric_limits<float>::infinity());
    }
  }
}

// The topk best of choices[experts] into ids, best first, by insertion.
void choose(const RouterShape& shape, const float* choices, int32_t* ids) {
  int64_t chosen = 0;
  for (int64_t e = 0; e < shape.experts; ++e) {
    if (chosen == shape.topk && !better(choices[e], choices[ids[chosen - 1]])) continue;
    int64_t place = chosen < shape.topk ? chosen++ : chosen - 1;
    for (; place > 0 && better(choices[e], choices[ids[place - 1]]); --place) {
      ids[place] = ids[place - 1];
    }
    ids[place] = static_cast<int32_t>(e);
  }
}

}  // namespace

void router(const RouterShape& shape, ConstMatrix logits, const float* bias, float* scores,
            int32_t* expert_ids, float* weights, int64_t* counts, float* workspace) {
  float* const choices = workspace;
  float* const group_scores = workspace + shape.experts;
  std::fill_n(counts, shape.experts, 0);
  for (int64_t t = 0; t < shape.tokens; ++t) {
    float* const row = scores + t * shape.experts;
    int32_t* const ids = expert_ids + t * shape.topk;
    float* const out = weights + t * shape.topk;
    sigmoid(shape.experts, logits.data + t * logits.stride, row);
    for (int64_t e = 0; e < shape.experts; ++e) choices[e] = row[e] + bias[e];
    if (shape.topk_groups < shape.groups) drop_groups(shape, choices, group_scores);
    choose(shape, choices, ids);
    float sum = 0.0F;
    for (int64_t i = 0; i < shape.topk; ++i) sum += row[ids[i]];
    const float divisor = shape.normalise ? sum + 1e-20F : 1.0F;
    for (int64_t i = 0; i < shape.topk; ++i) {
      out[i] = row[ids[i]] / divisor * shape.scaling_factor;
      ++counts[ids[i]];
    }
  }
}

void router_backward(const RouterShape& shape, const float* scores, const int32_t* expert_ids,
                     const float* d_weights, Matrix d_logits) {
  for (int64_t t = 0; t < shape.tokens; ++t) {
    const float* const row = scores + t * shape.experts;
    const int32_t* const ids = expert_ids + t * shape.topk;
    const float* const gradient = d_weights + t * shape.topk;
    float* const out = d_logits.data + t * d_logits.stride;
    std::fill_n(out, shape.experts, 0.0F);
    float sum = 0.0F;
    float dot = 0.0F;
    for (int64_t i = 0; i < shape.topk; ++i) {
      sum += row[ids[i]];
      dot += row[ids[i]] * gradient[i];
    }
    const float divisor = shape.normalise ? sum + 1e-20F : 1.0F;
    const float shared = shape.normalise ? dot / divisor : 0.0F;
    for (int64_t i = 0; i < shape.topk; ++i) {
      const float score = row[ids[i]];
      const float d_score = shape.scaling_factor / divisor * (gradient[i] - shared);
      out[ids[i]] = d_score * score * (1.0F - score);
    }
  }
}

}  // namespace penstock::cpu
