// SwiGLU, its gradients and what the gate weights of experts need of it. Formulas:
// kernels/kernels.h, swiglu and swiglu_backward.
#pragma once

#include "kernels/cuda/stream.h"
#include "kernels/cuda/view.h"

namespace penstock::cuda {

// y[i, :] = w[i] * silu(gate[i, :]) * up[i, :]; weights null: w = 1. gate and up may be the halves
// of one wider buffer.
template <typename T>
struct Swiglu {
  RowCount rows = 0;
  int64_t width = 0;
  View<const T> gate = {};
  View<const T> up = {};
  const float* weights = nullptr;
  View<T> y = {};
};
template <typename T>
void swiglu(Stream& stream, const Swiglu<T>& in);

// With h = silu(gate) * up and d[i, :] = w[i] * dy[i, :]:
//   d_gate = d * up * silu'(gate), d_up = d * silu(gate), dots[i] = dy[i, :] . h[i, :], y = w h.
// dots and y where they are not null: the gradient of w, and the input of the next layer's weight
// gradient, computed again instead of kept. d_gate may be gate and d_up may be up.
template <typename T>
struct SwigluGradient {
  RowCount rows = 0;
  int64_t width = 0;
  View<const T> gate = {};
  View<const T> up = {};
  View<const T> dy = {};
  const float* weights = nullptr;
  View<T> d_gate = {};
  View<T> d_up = {};
  View<T> y = {};
  float* dots = nullptr;
};
template <typename T>
void swiglu_gradient(Stream& stream, const SwigluGradient<T>& in);

}  // namespace penstock::cuda
