// The REQUIRES of kernels/kernels.h as checks, one home for every backend on the host.
#pragma once

#include "comm/base/check.h"
#include "kernels/kernels.h"

namespace penstock::contract {

inline void check_matmul(int64_t m, int64_t n, int64_t k, ConstMatrix a, Transpose transpose_a,
                         ConstMatrix b, Transpose transpose_b, ConstMatrix c) {
  PENSTOCK_CHECK(m >= 0 && n >= 0 && k >= 0, m, n, k);
  PENSTOCK_CHECK(a.stride >= (transpose_a == Transpose::kYes ? m : k), a.stride, m, k);
  PENSTOCK_CHECK(b.stride >= (transpose_b == Transpose::kYes ? k : n), b.stride, n, k);
  PENSTOCK_CHECK(c.stride >= n, c.stride, n);
}

inline void check_offsets(int64_t group_count, const int64_t* offsets) {
  PENSTOCK_CHECK(group_count >= 0 && (group_count == 0 || offsets[0] >= 0), group_count);
  for (int64_t g = 0; g < group_count; ++g) {
    PENSTOCK_CHECK(offsets[g] <= offsets[g + 1], "group", g, offsets[g], offsets[g + 1]);
  }
}

inline void check_linear(const LinearShape& shape, ConstMatrix in, ConstMatrix out) {
  check_offsets(shape.group_count, shape.offsets);
  PENSTOCK_CHECK(shape.in > 0 && shape.out > 0, shape.in, shape.out);
  PENSTOCK_CHECK(in.stride >= shape.in && out.stride >= shape.out, in.stride, out.stride);
}

inline void check_fp8_operand(RowFormat format) {
  PENSTOCK_CHECK(format == RowFormat::kE4m3 || format == RowFormat::kE4m3PowerOfTwo,
                 static_cast<int>(format));
}

inline void check_rows(int64_t rows, int64_t width) {
  PENSTOCK_CHECK(rows >= 0 && width > 0, rows, width);
}

// `what` names the ids in the error: "token id", "row index".
inline void check_ids(const char* what, int64_t count, const int32_t* ids, int64_t bound) {
  for (int64_t i = 0; i < count; ++i) {
    PENSTOCK_CHECK(ids[i] >= 0 && ids[i] < bound, what, ids[i], "at", i, "bound", bound);
  }
}

inline void check_targets(int64_t rows, int64_t vocab, const int32_t* targets) {
  check_rows(rows, vocab);
  for (int64_t i = 0; i < rows; ++i) {
    PENSTOCK_CHECK(targets[i] < vocab, "target", targets[i], "at row", i, "vocabulary", vocab);
  }
}

inline void check_rope(int64_t tokens, int64_t seq_length, int64_t heads, int64_t dim) {
  PENSTOCK_CHECK(tokens >= 0 && seq_length > 0 && heads > 0, tokens, seq_length, heads);
  PENSTOCK_CHECK(dim > 0 && dim % 2 == 0, dim);
}

inline void check_attention(const AttentionShape& shape) {
  PENSTOCK_CHECK(shape.batch >= 0 && shape.seq_length >= 0 && shape.heads > 0, shape.batch,
                 shape.seq_length, shape.heads);
  PENSTOCK_CHECK(
      shape.nope_dim >= 0 && shape.rope_dim >= 0 && shape.query_dim() > 0 && shape.value_dim > 0,
      shape.nope_dim, shape.rope_dim, shape.value_dim);
}

inline void check_router(const RouterShape& shape) {
  PENSTOCK_CHECK(shape.tokens >= 0 && shape.experts > 0, shape.tokens, shape.experts);
  PENSTOCK_CHECK(shape.groups > 0 && shape.experts % shape.groups == 0, shape.experts,
                 shape.groups);
  const int64_t group_size = shape.experts / shape.groups;
  PENSTOCK_CHECK(shape.groups == 1 || group_size >= 2, shape.experts, shape.groups);
  PENSTOCK_CHECK(shape.topk_groups > 0 && shape.topk_groups <= shape.groups, shape.topk_groups,
                 shape.groups);
  PENSTOCK_CHECK(shape.topk > 0 && shape.topk <= shape.topk_groups * group_size, shape.topk,
                 shape.topk_groups, group_size);
}

}  // namespace penstock::contract
