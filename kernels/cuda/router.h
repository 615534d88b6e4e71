// The gate that chooses experts, and its gradient: kernels/kernels.h, router and router_backward.
// All in fp32 (DeepSeek-V3 report §3.3.1 keeps the gate out of FP8).
#pragma once

#include "kernels/cuda/stream.h"
#include "kernels/cuda/view.h"
#include "kernels/kernels.h"

namespace penstock::cuda {

inline constexpr int kRouterExpertsMax = 512;
inline constexpr int kRouterGroupsMax = 32;
inline constexpr int kRouterTopkMax = 32;

// Ties go to the lowest index, NaN ranks above every number, as everywhere. logits: any stride.
// scores: [tokens, experts]; expert_ids, weights: [tokens, topk]; counts: [experts], overwritten.
struct Router {
  RouterShape shape;
  View<const float> logits = {};
  const float* bias = nullptr;
  float* scores = nullptr;
  int32_t* expert_ids = nullptr;
  float* weights = nullptr;
  int64_t* counts = nullptr;
};
void router(Stream& stream, const Router& in);

// d_logits[tokens, experts], overwritten.
struct RouterGradient {
  RouterShape shape;
  const float* scores = nullptr;
  const int32_t* expert_ids = nullptr;
  const float* d_weights = nullptr;
  View<float> d_logits = {};
};
void router_gradient(Stream& stream, const RouterGradient& in);

}  // namespace penstock::cuda
