// Vectorised row and vector operations and AdamW. Contracts: kernels/kernels.h, whose REQUIRES the
// caller has checked. Pure functions of their arguments.
#pragma once

#include "kernels/kernels.h"

namespace penstock::cpu {

void gather_rows(int64_t rows, int64_t width, ConstMatrix x, const int32_t* index,
                 const float* weights, Matrix y);
void scatter_add_rows(int64_t rows, int64_t width, ConstMatrix x, const int32_t* index,
                      const float* weights, Matrix y);
void accumulate_rows(int64_t rows, int64_t width, ConstMatrix x, Matrix y);
void add(int64_t count, const float* a, const float* b, float* y);
void scale(int64_t count, float factor, float* x);
double sum_of_squares(int64_t count, const float* x);
void adamw(int64_t count, const AdamwStep& step, const float* gradient,
           const ConstAdamwState& previous, const AdamwState& next);

}  // namespace penstock::cpu
