#include "kernels/cuda/loss.h"

#include "kernels/cuda/lanes.cuh"
#include "kernels/cuda/launch.cuh"

namespace penstock::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

// The sum of exp(x - largest) so far.
struct Sum {
  float largest;
  float sum;
};

// NaN in either spoils the sum; -infinity stands for nothing seen.
__device__ inline Sum merge(const Sum& a, const Sum& b) {
  const float largest = fmaxf(a.largest, b.largest);
  if (largest == -INFINITY) return {largest, a.sum + b.sum};
  return {largest, a.sum * expf(a.largest - largest) + b.sum * expf(b.largest - largest)};
}

// A block has a row: one pass for largest and sum, one for the gradient, which finds in L2 what the
// first has read.
template <typename T>
__global__ __launch_bounds__(kThreads) void cross_entropy_rows(CrossEntropy<T> in) {
  __shared__ Sum sums[kWarps];
  const int64_t row = blockIdx.x;
  const int32_t target = in.targets[row];
  const T* const logits = in.logits.data + row * in.logits.stride;
  T* const gradient =
      in.d_logits.data == nullptr ? nullptr : in.d_logits.data + row * in.d_logits.stride;
  Sum sum = {-INFINITY, 0.0F};
  for (int64_t column = threadIdx.x * kVector; target >= 0 && column < in.vocab;
       column += kThreads * kVector) {
    float x[kVector];
    load_floats(logits + column, x);
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < kVector; ++i) largest = fmaxf(largest, x[i]);
    Sum here = {largest, 0.0F};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      here.sum += largest == -INFINITY && x[i] == largest ? 0.0F : expf(x[i] - largest);
    }
    sum = merge(sum, here);
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const Sum other = {__shfl_xor_sync(kAllLanes, sum.largest, distance),
                       __shfl_xor_sync(kAllLanes, sum.sum, distance)};
    // In the same order on both sides, so that all lanes have the same bits.
    sum = threadIdx.x & distance ? merge(other, sum) : merge(sum, other);
  }
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  sum = sums[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) sum = merge(sum, sums[warp]);
  if (threadIdx.x == 0) {
    in.losses[row] =
        target < 0 ? 0.0F : sum.largest + logf(sum.sum) - static_cast<float>(logits[target]);
  }
  if (gradient == nullptr) return;
  __syncthreads();  // the target's logit was read, which the gradient may take the place of
  const float inverse = 1.0F / sum.sum;
  for (int64_t column = threadIdx.x * kVector; column < in.vocab; column += kThreads * kVector) {
    float x[kVector] = {};
    if (target >= 0) {
      load_floats(logits + column, x);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float hit = column + i == target ? 1.0F : 0.0F;
        x[i] = in.gradient_scale * (expf(x[i] - sum.largest) * inverse - hit);
      }
    }
    put(gradient + column, pack<T>(x));
  }
}

}  // namespace

template <typename T>
void cross_entropy(Stream& stream, const CrossEntropy<T>& in) {
  if (in.rows == 0) return;
  launch(stream, "cross_entropy", static_cast<unsigned>(in.rows), kThreads, 0,
         cross_entropy_rows<T>, in);
}

template void cross_entropy<Bf16>(Stream&, const CrossEntropy<Bf16>&);
template void cross_entropy<float>(Stream&, const CrossEntropy<float>&);

}  // namespace penstock::cuda
