// Rows to experts and back. An assignment a = row * topk + j is the j-th choice of a row; its
// expert is ids[a], local to this rank, or -1: of another rank. Sorted order is by expert and then
// by a.
//
//   count_sort   ids -> offsets of each expert's rows in sorted order, and each assignment's place
//   expand_rows  sorted[place[a], :] = x[a / topk, :]
//   combine_rows y[row, :] = sum_j w[a] * sorted[place[a], :], in the order of j
//
// How many there are of an expert stays on the device: `offsets` is what grouped products read, and
// offsets + experts the count of all (RowCount).
#pragma once

#include "kernels/cuda/stream.h"
#include "kernels/cuda/view.h"

namespace penstock::cuda {

inline constexpr int kSortExpertsMax = 512;
inline constexpr int kSortBlock = 1024;  // assignments of a block

struct CountSort {
  int64_t assignments = 0;             // at most; a multiple of topk
  const int64_t* row_count = nullptr;  // rows that there are, on the device; null: all
  int64_t topk = 1;
  int experts = 0;
  const int32_t* ids = nullptr;  // [assignments]
  int64_t* offsets = nullptr;    // [experts + 1]
  int32_t* place = nullptr;      // [assignments]; -1 where ids is
  int32_t* scratch = nullptr;    // sort_scratch_ints(assignments, experts)
};
constexpr int64_t sort_scratch_ints(int64_t assignments, int experts) {
  return (assignments + kSortBlock - 1) / kSortBlock * experts;
}
// REQUIRES: 0 < experts <= kSortExpertsMax, ids below experts.
void count_sort(Stream& stream, const CountSort& sort);

// Both: [rows, width] and [assignments, width]; rows of `sorted` at and beyond offsets[experts] are
// not touched. weights, dots: [assignments], in the order of a; weights null: 1.
template <typename T>
struct PermuteRows {
  RowCount rows = 0;
  int64_t width = 0;
  int64_t topk = 1;
  const int32_t* place = nullptr;
};
// sorted[place[a], :] = w[a] * x[row, :]. Also the gradient of combine_rows, whose weights'
// gradient is dots[a] = x[row, :] . of[place[a], :], where `of` is what was combined; null data:
// not wanted.
template <typename T>
void expand_rows(Stream& stream, const PermuteRows<T>& rows, View<const T> x, const float* weights,
                 View<T> sorted, View<const T> of = {}, float* dots = nullptr);
// sorted_weights[place[a]] = weights[a]
void expand_weights(Stream& stream, int64_t assignments, const int32_t* place, const float* weights,
                    float* sorted_weights);
// y[row, :] = sum_j w[a] * sorted[place[a], :]; 0 for a row without an expert here.
template <typename T>
void combine_rows(Stream& stream, const PermuteRows<T>& rows, View<const T> sorted,
                  const float* weights, View<T> y);

}  // namespace penstock::cuda
