// The matrix product of the CPU backend: packed panels and one register-tiled kernel, as in Goto &
// van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), sized for a small
// model's shapes.
//
// Every element of C is one chain of fused multiply-adds in rising k, started from C (accumulate)
// or from zero. So its bits depend on its own row of A, column of B and start alone: not on m, n,
// strides, alignment, threads or vector width. A token's expert output is the same whichever tokens
// it is batched with. (Targets without fused multiply-add, older than AVX2, round each product and
// so differ.)
#pragma once

#include <cstdint>

namespace penstock::cpu {

struct GemmArguments {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  const float* a = nullptr;  // element (i, p) at a[i * a_row_stride + p * a_depth_stride];
  int64_t a_row_stride = 0;  // one of the two strides is 1
  int64_t a_depth_stride = 0;
  const float* b = nullptr;    // element (p, j) at b[p * b_depth_stride + j * b_column_stride];
  int64_t b_depth_stride = 0;  // one of the two strides is 1
  int64_t b_column_stride = 0;
  float* c = nullptr;
  int64_t c_stride = 0;
  bool accumulate = false;
  float alpha = 1.0F;  // multiplies A, rounded once per element
};

// Floats of 64-byte aligned scratch that gemm() uses.
int64_t gemm_workspace_floats();

// C (= or +=) alpha * A * B.
void gemm(const GemmArguments& arguments, float* workspace);

// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns. Lanes of `to` past
// `rows` up to a multiple of 16 hold anything. REQUIRES: to_stride has room for them.
void transpose(int64_t rows, int64_t columns, const float* from, int64_t from_stride, float* to,
               int64_t to_stride);

}  // namespace penstock::cpu
