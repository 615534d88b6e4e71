// FP8 linear layers of the CPU backend: codes as the fp32 numbers they stand for, one gemm() per
// interval of 128, promoted between intervals. The same bits as kernels/reference/fp8_reference.h
// on every target with fused multiply-add. Contracts: kernels/kernels.h.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace penstock::cpu {

// Floats of 64-byte aligned scratch for layers up to [out, in].
int64_t fp8_workspace_floats(int64_t out, int64_t in);

enum class LinearPass { kForward, kInputGradient };

struct Fp8Context {
  float* workspace;       // fp8_workspace_floats()
  float* gemm_workspace;  // kernels/cpu/gemm.h
  Fp8Accumulator accumulator;
};
void fp8_linear(const LinearShape& shape, LinearPass pass, RowFormat format, ConstMatrix x,
                const float* weight, Store store, Matrix y, const Fp8Context& context);
void fp8_linear_weight_gradient(const LinearShape& shape, RowFormat dy_format, ConstMatrix dy,
                                RowFormat x_format, ConstMatrix x, float* dweight,
                                const Fp8Context& context);
void round_rows(RowFormat format, int64_t rows, int64_t width, ConstMatrix x, Matrix y);

}  // namespace penstock::cpu
