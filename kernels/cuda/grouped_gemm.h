// Matrix products over rows grouped by expert: bf16 factors, sums in fp32. Formulas:
// kernels/kernels.h, grouped_matmul and grouped_matmul_ragged_k. An ordinary layer is one group.
//
// One launch each, of no more blocks than the stream may have multiprocessors. Which rows are whose
// is read on the device, so tokens are never counted on the host. A tile of C is computed by one
// block with its sum in the order of k: the same bits in every run and on any number of blocks.
#pragma once

#include "kernels/cuda/stream.h"
#include "kernels/cuda/view.h"
#include "kernels/kernels.h"

namespace penstock::cuda {

// Group g has rows [offsets[g], offsets[g + 1]). The first offset need not be 0, groups may be
// empty, and rows of no group are neither written nor of influence on what is.
struct RowGroups {
  int64_t count = 1;
  // Rows that there is memory for. REQUIRES: offsets[count] <= rows_most < 2^31.
  int64_t rows_most = 0;
  // In device memory, count + 1 of them, non-decreasing. Null: one group has all rows.
  const int64_t* offsets = nullptr;
};

// C_g[rows, n] (= or +=) A_g[rows, k] op(B_g)[k, n],  B_g = b.data + g * group_stride.
// B_g is stored [n, k] for transpose_b == kYes (a layer forward: its weight is [out, in]) and [k,
// n] for kNo (the gradient of its input). kAccumulate adds in fp32 and rounds once. c is no input.
struct GroupedMatmul {
  RowGroups groups;
  int64_t n = 0;
  int64_t k = 0;
  View<const Bf16> a = {};
  View<const Bf16> b = {};
  int64_t group_stride = 0;  // elements, a multiple of 8
  Transpose transpose_b = Transpose::kYes;
  Store store = Store::kOverwrite;
  View<Bf16> c = {};
  bool portable = false;  // for tests: the kernel of all devices, also where there is a faster one
};
void grouped_matmul(Stream& stream, const GroupedMatmul& product);

// C_g[m, n] += A_g^T B_g over the rows of the group,  C_g = c.data + g * group_stride, in fp32: the
// gradient of a weight, with A = dy and B = x. Without rows C_g stays as it is.
struct GroupedMatmulRaggedK {
  RowGroups groups;
  int64_t m = 0;
  int64_t n = 0;
  View<const Bf16> a = {};  // [rows, m]
  View<const Bf16> b = {};  // [rows, n]
  View<float> c = {};
  int64_t group_stride = 0;
  bool portable = false;
};
void grouped_matmul_ragged_k(Stream& stream, const GroupedMatmulRaggedK& product);

}  // namespace penstock::cuda
