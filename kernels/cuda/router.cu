#include "kernels/cuda/router.h"

#include "kernels/cuda/lanes.cuh"
#include "kernels/cuda/launch.cuh"

namespace penstock::cuda {
namespace {

constexpr int kWarps = 8;  // of a block; each takes a token at a time
constexpr int kThreads = kWarps * kWarp;
constexpr int kTokensPerWarp = 4;

// Orders choices: larger is better, NaN best of all, and of equal ones the lower index. 0: dropped.
__device__ inline uint64_t rank_key(float choice, int index) {
  const uint32_t bits = __float_as_uint(choice == 0.0F ? 0.0F : choice);  // -0 equals 0
  const uint32_t rising = bits >> 31 ? ~bits : bits | 0x80000000U;
  const uint32_t value = choice != choice ? 0xffffffffU : rising;
  return static_cast<uint64_t>(value) << 32 | static_cast<uint32_t>(~index);
}

__device__ inline uint64_t best_of_lanes(uint64_t key) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, key, distance);
    key = other > key ? other : key;
  }
  return key;
}

// The sum of a group's two largest choices; NaN with one among them.
__device__ double group_score(const float* choices, int64_t size) {
  if (size == 1) return choices[0];
  float first = -INFINITY;
  float second = -INFINITY;
  bool has_nan = false;
  for (int64_t i = 0; i < size; ++i) {
    const float choice = choices[i];
    has_nan |= choice != choice;
    second = fmaxf(second, fminf(first, choice));
    first = fmaxf(first, choice);
  }
  return has_nan ? NAN : static_cast<double>(first) + second;
}

// Whether this lane's group, if it has one, is among the best topk_groups.
__device__ bool keeps_group(const RouterShape& shape, const float* choices) {
  const int group = threadIdx.x % kWarp;
  const int64_t size = shape.experts / shape.groups;
  const double score = group < shape.groups ? group_score(choices + group * size, size) : 0.0;
  int better = 0;
  for (int other = 0; other < shape.groups; ++other) {
    const double rival = __shfl_sync(kAllLanes, score, other);
    const bool wins = rival != rival ? score == score : rival > score;
    const bool equal = rival == score || (rival != rival && score != score);
    better += wins || (equal && other < group);
  }
  return group < shape.groups && better < shape.topk_groups;
}

__global__ __launch_bounds__(kThreads) void route_tokens(Router in) {
  __shared__ float all_choices[kWarps][kRouterExpertsMax];
  __shared__ int counts[kRouterExpertsMax];
  const RouterShape& shape = in.shape;
  const int lane = threadIdx.x % kWarp;
  float* const choices = all_choices[threadIdx.x / kWarp];
  const int experts = static_cast<int>(shape.experts);
  for (int e = threadIdx.x; e < experts; e += kThreads) counts[e] = 0;
  __syncthreads();
  const int group_size = experts / static_cast<int>(shape.groups);
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kTokensPerWarp;
  for (int64_t token = first; token < first + kTokensPerWarp && token < shape.tokens; ++token) {
    float* const scores = in.scores + token * shape.experts;
    for (int e = lane; e < experts; e += kWarp) {
      const float score = 1.0F / (1.0F + expf(-in.logits.data[token * in.logits.stride + e]));
      scores[e] = score;
      choices[e] = score + in.bias[e];
    }
    __syncwarp();
    const unsigned kept = __ballot_sync(kAllLanes, keeps_group(shape, choices));
    float sum = 0;
    float my_score = 0;  // of the lane-th choice
    int my_expert = 0;
    uint64_t last = ~uint64_t{0};
    for (int choice = 0; choice < shape.topk; ++choice) {
      uint64_t best = 0;
      for (int e = lane; e < experts; e += kWarp) {
        if ((kept >> (e / group_size) & 1U) == 0) continue;
        const uint64_t key = rank_key(choices[e], e);
        if (key < last && key > best) best = key;  // below what was chosen before
      }
      last = best_of_lanes(best);
      const int expert = static_cast<int>(~static_cast<uint32_t>(last));
      const float score = scores[expert];
      sum += score;
      if (lane == choice) {
        my_expert = expert;
        my_score = score;
      }
    }
    if (lane < shape.topk) {
      const float divisor = shape.normalise ? sum + 1e-20F : 1.0F;
      in.expert_ids[token * shape.topk + lane] = my_expert;
      in.weights[token * shape.topk + lane] = my_score / divisor * shape.scaling_factor;
      atomicAdd(&counts[my_expert], 1);
    }
    __syncwarp();  // before the next token's choices take this one's place
  }
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += kThreads) {
    if (counts[e] == 0) continue;
    atomicAdd(reinterpret_cast<unsigned long long*>(in.counts + e),
              static_cast<unsigned long long>(counts[e]));
  }
}

__global__ __launch_bounds__(kThreads) void route_tokens_gradient(RouterGradient in) {
  const RouterShape& shape = in.shape;
  const int lane = threadIdx.x % kWarp;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (token >= shape.tokens) return;
  float* const row = in.d_logits.data + token * in.d_logits.stride;
  for (int e = lane; e < shape.experts; e += kWarp) row[e] = 0.0F;
  const bool has = lane < shape.topk;
  const int64_t at = token * shape.topk + lane;
  const int expert = has ? in.expert_ids[at] : 0;
  const float score = has ? in.scores[token * shape.experts + expert] : 0.0F;
  const float d_weight = has ? in.d_weights[at] : 0.0F;
  const float sum = sum_lanes(score);
  const float dot = sum_lanes(score * d_weight);
  const float divisor = shape.normalise ? sum + 1e-20F : 1.0F;
  const float shared = shape.normalise ? dot / divisor : 0.0F;
  __syncwarp();  // the zeros are written
  if (!has) return;
  row[expert] = shape.scaling_factor / divisor * (d_weight - shared) * score * (1.0F - score);
}

}  // namespace

void router(Stream& stream, const Router& in) {
  const size_t bytes = sizeof(int64_t) * static_cast<size_t>(in.shape.experts);
  stream.note("router", cudaMemsetAsync(in.counts, 0, bytes, stream.get()));
  if (in.shape.tokens == 0) return;
  const auto blocks = static_cast<unsigned>(ceil_div(in.shape.tokens, kWarps * kTokensPerWarp));
  launch(stream, "router", blocks, kThreads, 0, route_tokens, in);
}

void router_gradient(Stream& stream, const RouterGradient& in) {
  if (in.shape.tokens == 0) return;
  const auto blocks = static_cast<unsigned>(ceil_div(in.shape.tokens, kWarps));
  launch(stream, "router_gradient", blocks, kThreads, 0, route_tokens_gradient, in);
}

}  // namespace penstock::cuda
