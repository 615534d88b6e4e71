// What operations on the device take: rows in device memory.
//
// - View: row-major, element (i, j) is data[i * stride + j]. REQUIRES of every operation, unless it
//   says otherwise: data is 16-byte aligned; widths and strides are multiples of 8 elements, so
//   that every row begins aligned, too. Memory is padded when it is laid out, never while training.
// - Elements are bf16 or fp32; sums are taken in fp32, in an order that depends on shapes alone, so
//   the same inputs give the same bits in every run.
// - RowCount: how many rows there are may be known to the device alone (tokens that arrived). Then
//   `most` bounds the launch, and rows beyond what `count` points to are neither read nor written.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

namespace penstock::cuda {

using Bf16 = __nv_bfloat16;

template <typename T>
struct View {
  View() = default;
  View(T* rows, int64_t row_stride) : data(rows), stride(row_stride) {}
  template <typename U>
  requires(std::is_same_v<const U, T>) View(const View<U>& other)
      : data(other.data), stride(other.stride) {}  // NOLINT: const is added
  T* data = nullptr;
  int64_t stride = 0;
};

struct RowCount {
  RowCount(int64_t rows) : most(rows) {}  // NOLINT: a number is a count that the host knows
  RowCount(int64_t most_rows, const int64_t* device_count) : most(most_rows), count(device_count) {}
  int64_t most = 0;
  const int64_t* count = nullptr;  // in device memory; null: `most` of them
};

}  // namespace penstock::cuda
