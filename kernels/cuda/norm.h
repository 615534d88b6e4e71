// RMSNorm and its gradients. Formulas: kernels/kernels.h, rms_norm and rms_norm_backward.
#pragma once

#include "kernels/cuda/stream.h"
#include "kernels/cuda/view.h"

namespace penstock::cuda {

inline constexpr int64_t kNormWidthMax = 8192;

// y = rms_norm(h) * weight with h = x + residual, which is written to `sum`; without a residual
// (null data) h = x, and `sum` is not touched. inv_rms: [rows], kept for the gradients. `sum` may
// be x or residual. weight: [width], fp32. REQUIRES: width <= kNormWidthMax.
template <typename T>
struct RmsNorm {
  RowCount rows = 0;
  int64_t width = 0;
  View<const T> x = {};
  View<const T> residual = {};
  const float* weight = nullptr;
  float eps = 0;
  View<T> sum = {};
  View<T> y = {};
  float* inv_rms = nullptr;
};
template <typename T>
void rms_norm(Stream& stream, const RmsNorm<T>& norm);

// dx[i, :] = inv_rms[i] * (weight * dy[i, :] - xhat[i, :] * mean(xhat * weight * dy)) [+ add[i, :]]
// `add`: the gradient that passes by the norm; null data: none. dx may be dy or add.
template <typename T>
struct RmsNormInputGradient {
  RowCount rows = 0;
  int64_t width = 0;
  View<const T> x = {};
  const float* weight = nullptr;
  const float* inv_rms = nullptr;
  View<const T> dy = {};
  View<const T> add = {};
  View<T> dx = {};
};
template <typename T>
void rms_norm_input_gradient(Stream& stream, const RmsNormInputGradient<T>& gradient);

// dweight += sum_i dy[i, :] * xhat[i, :]. `partials`: norm_partials_floats(width), scratch.
inline constexpr int64_t kNormPartials = 256;
constexpr int64_t norm_partials_floats(int64_t width) {
  return kNormPartials * width;
}
template <typename T>
void rms_norm_weight_gradient(Stream& stream, const RowCount& rows, int64_t width, View<const T> x,
                              const float* inv_rms, View<const T> dy, float* dweight,
                              float* partials);

}  // namespace penstock::cuda
