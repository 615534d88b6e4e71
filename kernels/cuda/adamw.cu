#include "kernels/cuda/adamw.h"

#include "kernels/cuda/lanes.cuh"
#include "kernels/cuda/launch.cuh"

namespace penstock::cuda {
namespace {

constexpr int kThreads = 256;

template <typename M>
__global__ __launch_bounds__(kThreads) void adamw_vectors(int64_t count, AdamwStep step,
                                                          AdamwPointers<M> at,
                                                          const float* gradient_factor) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector;
  if (first >= count) return;
  const float scale = step.gradient_scale * (gradient_factor == nullptr ? 1.0F : *gradient_factor);
  float g[kVector];
  float p[kVector];
  float m[kVector];
  float v[kVector];
  load_floats(at.gradient + first, g);
  load_floats(at.parameter + first, p);
  load_floats(at.moment1 + first, m);
  load_floats(at.moment2 + first, v);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float gradient = scale * g[i];
    m[i] = step.beta1 * m[i] + (1.0F - step.beta1) * gradient;
    v[i] = step.beta2 * v[i] + (1.0F - step.beta2) * gradient * gradient;
    const float update =
        m[i] / step.bias_correction1 / (sqrtf(v[i] / step.bias_correction2) + step.eps);
    p[i] -= step.lr * (update + step.weight_decay * p[i]);
  }
  put(at.next_parameter + first, pack<float>(p));
  put(at.next_moment1 + first, pack<M>(m));
  put(at.next_moment2 + first, pack<M>(v));
  if (at.working != nullptr) put(at.working + first, pack<Bf16>(p));
}

__device__ double sum_block(double value) {
  __shared__ double sums[kThreads / kWarp];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

__global__ __launch_bounds__(kThreads) void square_partials(int64_t count, const float* x,
                                                            double* partials) {
  double sum = 0;
  const int64_t step = static_cast<int64_t>(kSquarePartials) * kThreads * kVector;
  int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector;
  for (; first < count; first += step) {
    float values[kVector];
    load_floats(x + first, values);
    // Eight squares in fp32 lose nothing that matters to a norm, and double is slow.
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares += values[i] * values[i];
    sum += static_cast<double>(squares);
  }
  sum = sum_block(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ __launch_bounds__(kThreads) void square_sum(const double* partials, double* result) {
  double sum = 0;
  for (int i = threadIdx.x; i < kSquarePartials; i += kThreads) sum += partials[i];
  sum = sum_block(sum);
  if (threadIdx.x == 0) *result = sum;
}

__global__ void clip_one(const double* sum, double scale, double limit, float* factor) {
  const double norm = sqrt(*sum) * scale;
  *factor = norm > limit ? static_cast<float>(limit / norm) : 1.0F;
}

}  // namespace

template <typename M>
void adamw(Stream& stream, int64_t count, const AdamwStep& step, const AdamwPointers<M>& at,
           const float* gradient_factor) {
  if (count == 0) return;
  const auto blocks = static_cast<unsigned>(ceil_div(count, kThreads * kVector));
  launch(stream, "adamw", blocks, kThreads, 0, adamw_vectors<M>, count, step, at, gradient_factor);
}

void sum_of_squares(Stream& stream, int64_t count, const float* x, double* partials, double* sum) {
  launch(stream, "sum_of_squares", kSquarePartials, kThreads, 0, square_partials, count, x,
         partials);
  launch(stream, "sum_of_squares", 1, kThreads, 0, square_sum, partials, sum);
}

void clip_factor(Stream& stream, const double* sum, double scale, double limit, float* factor) {
  launch(stream, "clip_factor", 1, 1, 0, clip_one, sum, scale, limit, factor);
}

template void adamw<float>(Stream&, int64_t, const AdamwStep&, const AdamwPointers<float>&,
                           const float*);
template void adamw<Bf16>(Stream&, int64_t, const AdamwStep&, const AdamwPointers<Bf16>&,
                          const float*);

}  // namespace penstock::cuda
