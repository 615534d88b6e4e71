#include "kernels/cuda/swiglu.h"

#include "kernels/cuda/lanes.cuh"
#include "kernels/cuda/launch.cuh"

namespace penstock::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / kWarp;  // a warp has a row

__device__ inline float sigmoid(float x) {
  return 1.0F / (1.0F + expf(-x));
}

template <typename T>
__global__ __launch_bounds__(kThreads) void swiglu_rows(Swiglu<T> in) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= rows_of(in.rows)) return;
  const float weight = in.weights == nullptr ? 1.0F : in.weights[row];
  const T* const gate_row = in.gate.data + row * in.gate.stride;
  const T* const up_row = in.up.data + row * in.up.stride;
  T* const y_row = in.y.data + row * in.y.stride;
#pragma unroll 2
  for (int64_t column = threadIdx.x % kWarp * kVector; column < in.width;
       column += kWarp * kVector) {
    float gate[kVector];
    float up[kVector];
    load_floats(gate_row + column, gate);
    load_floats(up_row + column, up);
#pragma unroll
    for (int i = 0; i < kVector; ++i) up[i] *= weight * gate[i] * sigmoid(gate[i]);
    put(y_row + column, pack<T>(up));
  }
}

template <typename T>
__global__ __launch_bounds__(kThreads) void swiglu_rows_gradient(SwigluGradient<T> in) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= rows_of(in.rows)) return;
  const float weight = in.weights == nullptr ? 1.0F : in.weights[row];
  float dot = 0;
  for (int64_t column = threadIdx.x % kWarp * kVector; column < in.width;
       column += kWarp * kVector) {
    float gate[kVector];
    float up[kVector];
    float dy[kVector];
    load_floats(in.gate.data + row * in.gate.stride + column, gate);
    load_floats(in.up.data + row * in.up.stride + column, up);
    load_floats(in.dy.data + row * in.dy.stride + column, dy);
    float h[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float s = sigmoid(gate[i]);
      const float silu = gate[i] * s;
      h[i] = silu * up[i];
      dot += dy[i] * h[i];
      h[i] *= weight;
      const float d = weight * dy[i];
      gate[i] = d * up[i] * s * (1.0F + gate[i] * (1.0F - s));
      up[i] = d * silu;
    }
    put(in.d_gate.data + row * in.d_gate.stride + column, pack<T>(gate));
    put(in.d_up.data + row * in.d_up.stride + column, pack<T>(up));
    if (in.y.data != nullptr) put(in.y.data + row * in.y.stride + column, pack<T>(h));
  }
  if (in.dots == nullptr) return;
  dot = sum_lanes(dot);
  if (threadIdx.x % kWarp == 0) in.dots[row] = dot;
}

unsigned blocks_of(const RowCount& rows) {
  return static_cast<unsigned>(ceil_div(rows.most, kRowsPerBlock));
}

}  // namespace

template <typename T>
void swiglu(Stream& stream, const Swiglu<T>& in) {
  if (in.rows.most == 0) return;
  launch(stream, "swiglu", blocks_of(in.rows), kThreads, 0, swiglu_rows<T>, in);
}

template <typename T>
void swiglu_gradient(Stream& stream, const SwigluGradient<T>& in) {
  if (in.rows.most == 0) return;
  launch(stream, "swiglu_gradient", blocks_of(in.rows), kThreads, 0, swiglu_rows_gradient<T>, in);
}

template void swiglu<Bf16>(Stream&, const Swiglu<Bf16>&);
template void swiglu<float>(Stream&, const Swiglu<float>&);
template void swiglu_gradient<Bf16>(Stream&, const SwigluGradient<Bf16>&);
template void swiglu_gradient<float>(Stream&, const SwigluGradient<float>&);

}  // namespace penstock::cuda
