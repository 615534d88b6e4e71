// The optimizer's update, and the sum of squares that clipping needs. Formula: kernels/kernels.h,
// AdamwStep (Loshchilov & Hutter 2019, Algorithm 2).
#pragma once

#include "kernels/cuda/stream.h"
#include "kernels/cuda/view.h"
#include "kernels/kernels.h"

namespace penstock::cuda {

// One pass over `count` parameters: fp32 master weights, moments in fp32 or bf16, and the weight
// that training uses in bf16. `next` may be `previous`. `working` null: not wanted.
// `gradient_factor`: one fp32 in device memory that AdamwStep::gradient_scale is multiplied by, so
// that the norm it comes from never has to be known to the host; null: 1. REQUIRES: count a
// multiple of 8.
template <typename M>
struct AdamwPointers {
  const float* gradient = nullptr;
  const float* parameter = nullptr;
  const M* moment1 = nullptr;
  const M* moment2 = nullptr;
  float* next_parameter = nullptr;
  M* next_moment1 = nullptr;
  M* next_moment2 = nullptr;
  Bf16* working = nullptr;
};
template <typename M>
void adamw(Stream& stream, int64_t count, const AdamwStep& step, const AdamwPointers<M>& at,
           const float* gradient_factor = nullptr);

// *sum = sum of x[i]^2, in double, in an order that depends on count alone. `partials`:
// kSquarePartials doubles of scratch. REQUIRES: count a multiple of 8.
inline constexpr int kSquarePartials = 1024;
void sum_of_squares(Stream& stream, int64_t count, const float* x, double* partials, double* sum);

// *factor = min(1, limit / (sqrt(*sum) * scale)), 1 when that norm is 0: clipping by the global
// norm, of gradients that are `scale` times what they are to be.
void clip_factor(Stream& stream, const double* sum, double scale, double limit, float* factor);

}  // namespace penstock::cuda
