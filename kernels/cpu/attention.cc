#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/cpu/simd_inl.h"

HWY_BEFORE_NAMESPACE();
namespace penstock::cpu::HWY_NAMESPACE {

// Row i of `scores` [rows, columns] sees its first `visible + i` entries: they become exp(s - max),
// the rest 0. log_sum_exp[i] = max + log(sum), inverse_sums[i] = 1 / sum.
void exponentiate_rows(int64_t rows, int64_t columns, int64_t visible, float* scores,
                       float* log_sum_exp, float* inverse_sums) {
  for (int64_t i = 0; i < rows; ++i) {
    float* const row = scores + i * columns;
    const int64_t count = visible + i;
    const float largest = max_of(count, row);
    const float sum = sum_lanes(count, [&](auto d, int64_t j, auto total) HWY_ATTR {
      const auto e = exp_lanes(d, hn::Sub(hn::LoadU(d, row + j), hn::Set(d, largest)));
      hn::StoreU(e, d, row + j);
      return hn::Add(total, e);
    });
    std::fill(row + count, row + columns, 0.0F);
    log_sum_exp[i] = largest + std::log(sum);
    inverse_sums[i] = 1.0F / sum;
  }
}

// out[i, :] *= factors[i], rows `stride` apart.
void scale_rows(int64_t rows, int64_t width, const float* factors, float* out, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    float* const row = out + i * stride;
    for_lanes(width, [&](auto d, int64_t j) HWY_ATTR {
      hn::StoreU(hn::Mul(hn::LoadU(d, row + j), hn::Set(d, factors[i])), d, row + j);
    });
  }
}

// The visible entries become p = exp(scores - log_sum_exp) in `scores` and p (d_scores - delta)
// scale in `d_scores`, the rest 0 in both. delta[i] = d_out[i] . out[i].
void softmax_backward_rows(int64_t rows, int64_t columns, int64_t visible, float scale,
                           const float* log_sum_exp, const float* delta, float* scores,
                           float* d_scores) {
  for (int64_t i = 0; i < rows; ++i) {
    float* const row = scores + i * columns;
    float* const d_row = d_scores + i * columns;
    const int64_t count = visible + i;
    for_lanes(count, [&](auto d, int64_t j) HWY_ATTR {
      const auto p = exp_lanes(d, hn::Sub(hn::LoadU(d, row + j), hn::Set(d, log_sum_exp[i])));
      const auto centred = hn::Sub(hn::LoadU(d, d_row + j), hn::Set(d, delta[i]));
      hn::StoreU(p, d, row + j);
      hn::StoreU(hn::Mul(hn::Mul(p, hn::Set(d, scale)), centred), d, d_row + j);
    });
    std::fill(row + count, row + columns, 0.0F);
    std::fill(d_row + count, d_row + columns, 0.0F);
  }
}

void row_products(int64_t rows, int64_t width, const float* a, int64_t a_stride, const float* b,
                  int64_t b_stride, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    out[i] = sum_lanes(width, [&](auto d, int64_t j, auto sum) HWY_ATTR {
      return hn::MulAdd(hn::LoadU(d, a + i * a_stride + j), hn::LoadU(d, b + i * b_stride + j),
                        sum);
    });
  }
}

}  // namespace penstock::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace penstock::cpu {

HWY_EXPORT(exponentiate_rows);
HWY_EXPORT(scale_rows);
HWY_EXPORT(softmax_backward_rows);
HWY_EXPORT(row_products);

namespace {

// Queries per block: four full register tiles, the most that read keys and values without repacking
// them. Of 24, 36, 48, 60, 64 and 96, this measured fastest at 128, 256 and 1024 tokens.
constexpr int64_t kQueryBlock = 48;

int64_t padded(int64_t floats) {
  return (floats + 15) / 16 * 16;
}

struct Workspace {
  float* key;       // [seq_length, query_dim]: nope and rope parts of one head side by side
  float* d_key;     // its gradient
  float* scores;    // [kQueryBlock, columns]
  float* d_scores;  // [kQueryBlock, columns]
  float* row;       // [kQueryBlock]: 1 / sum, or delta
};

Workspace divide(const AttentionShape& shape, float* base) {
  const int64_t key_floats = padded(shape.seq_length * shape.query_dim());
  const int64_t score_floats = padded(kQueryBlock * shape.seq_length);
  return {base, base + key_floats, base + 2 * key_floats, base + 2 * key_floats + score_floats,
          base + 2 * key_floats + 2 * score_floats};
}

void copy_columns(int64_t rows, int64_t width, const float* from, int64_t from_stride, float* to,
                  int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(to + i * to_stride, from + i * from_stride,
                static_cast<size_t>(width) * sizeof(float));
  }
}

// One head of one sequence, strides resolved.
struct HeadSlice {
  const float* query;
  const float* value;
  int64_t query_stride;
  int64_t value_stride;
};

// Gathers the key of one head; the slice of its query and value.
HeadSlice load_head(const AttentionShape& shape, const AttentionInputs& in, int64_t first_token,
                    int64_t head, float* key) {
  const int64_t query_dim = shape.query_dim();
  copy_columns(
      shape.seq_length, shape.nope_dim,
      in.key_nope.data + first_token * in.key_nope.token_stride + head * in.key_nope.head_stride,
      in.key_nope.token_stride, key, query_dim);
  if (shape.rope_dim > 0) {
    copy_columns(shape.seq_length, shape.rope_dim,
                 in.key_rope.data + first_token * in.key_rope.stride, in.key_rope.stride,
                 key + shape.nope_dim, query_dim);
  }
  return {
      in.query.data + first_token * in.query.token_stride + head * in.query.head_stride,
      in.value.data + first_token * in.value.token_stride + head * in.value.head_stride,
      in.query.token_stride,
      in.value.token_stride,
  };
}

// scores[rows, columns] = scale * query[rows, query_dim] key[columns, query_dim]^T
GemmArguments score_product(const AttentionShape& shape, float scale, const HeadSlice& slice,
                            int64_t first, int64_t rows, int64_t columns, const Workspace& w) {
  return {.m = rows,
          .n = columns,
          .k = shape.query_dim(),
          .a = slice.query + first * slice.query_stride,
          .a_row_stride = slice.query_stride,
          .a_depth_stride = 1,
          .b = w.key,
          .b_depth_stride = 1,
          .b_column_stride = shape.query_dim(),
          .c = w.scores,
          .c_stride = columns,
          .alpha = scale};
}

void attend_head(const AttentionShape& shape, float scale, const HeadSlice& slice, float* out,
                 int64_t out_stride, float* log_sum_exp, const Workspace& w,
                 float* gemm_workspace) {
  for (int64_t first = 0; first < shape.seq_length; first += kQueryBlock) {
    const int64_t rows = std::min(kQueryBlock, shape.seq_length - first);
    const int64_t columns = first + rows;
    gemm(score_product(shape, scale, slice, first, rows, columns, w), gemm_workspace);
    HWY_DYNAMIC_DISPATCH(exponentiate_rows)
    (rows, columns, first + 1, w.scores, log_sum_exp + first, w.row);
    gemm({.m = rows,
          .n = shape.value_dim,
          .k = columns,
          .a = w.scores,
          .a_row_stride = columns,
          .a_depth_stride = 1,
          .b = slice.value,
          .b_depth_stride = slice.value_stride,
          .b_column_stride = 1,
          .c = out + first * out_stride,
          .c_stride = out_stride},
         gemm_workspace);
    HWY_DYNAMIC_DISPATCH(scale_rows)
    (rows, shape.value_dim, w.row, out + first * out_stride, out_stride);
  }
}

struct HeadGradient {
  const float* out;
  int64_t out_stride;
  const float* d_out;
  int64_t d_out_stride;
  const float* log_sum_exp;
  float* d_query;
  int64_t d_query_stride;
  float* d_value;
  int64_t d_value_stride;
};

// The four products of one block, after its scores and d_scores are known; d_key and d_value gather
// over blocks, and the first block taken (the last of the sequence, which sees every key) starts
// them.
void accumulate_block(const AttentionShape& shape, const HeadSlice& slice, const HeadGradient& g,
                      int64_t first, int64_t rows, const Workspace& w, float* gemm_workspace) {
  const int64_t columns = first + rows;
  const bool started = columns < shape.seq_length;
  gemm({.m = columns,
        .n = shape.value_dim,
        .k = rows,
        .a = w.scores,
        .a_row_stride = 1,
        .a_depth_stride = columns,
        .b = g.d_out + first * g.d_out_stride,
        .b_depth_stride = g.d_out_stride,
        .b_column_stride = 1,
        .c = g.d_value,
        .c_stride = g.d_value_stride,
        .accumulate = started},
       gemm_workspace);
  gemm({.m = rows,
        .n = shape.query_dim(),
        .k = columns,
        .a = w.d_scores,
        .a_row_stride = columns,
        .a_depth_stride = 1,
        .b = w.key,
        .b_depth_stride = shape.query_dim(),
        .b_column_stride = 1,
        .c = g.d_query + first * g.d_query_stride,
        .c_stride = g.d_query_stride},
       gemm_workspace);
  gemm({.m = columns,
        .n = shape.query_dim(),
        .k = rows,
        .a = w.d_scores,
        .a_row_stride = 1,
        .a_depth_stride = columns,
        .b = slice.query + first * slice.query_stride,
        .b_depth_stride = slice.query_stride,
        .b_column_stride = 1,
        .c = w.d_key,
        .c_stride = shape.query_dim(),
        .accumulate = started},
       gemm_workspace);
}

void backward_head(const AttentionShape& shape, float scale, const HeadSlice& slice,
                   const HeadGradient& g, const Workspace& w, float* gemm_workspace) {
  const int64_t block_count = (shape.seq_length + kQueryBlock - 1) / kQueryBlock;
  for (int64_t block = block_count - 1; block >= 0; --block) {
    const int64_t first = block * kQueryBlock;
    const int64_t rows = std::min(kQueryBlock, shape.seq_length - first);
    const int64_t columns = first + rows;
    const float* const d_out = g.d_out + first * g.d_out_stride;
    gemm(score_product(shape, scale, slice, first, rows, columns, w), gemm_workspace);
    gemm({.m = rows,
          .n = columns,
          .k = shape.value_dim,
          .a = d_out,
          .a_row_stride = g.d_out_stride,
          .a_depth_stride = 1,
          .b = slice.value,
          .b_depth_stride = 1,
          .b_column_stride = slice.value_stride,
          .c = w.d_scores,
          .c_stride = columns},
         gemm_workspace);
    HWY_DYNAMIC_DISPATCH(row_products)
    (rows, shape.value_dim, g.out + first * g.out_stride, g.out_stride, d_out, g.d_out_stride,
     w.row);
    HWY_DYNAMIC_DISPATCH(softmax_backward_rows)
    (rows, columns, first + 1, scale, g.log_sum_exp + first, w.row, w.scores, w.d_scores);
    accumulate_block(shape, slice, g, first, rows, w, gemm_workspace);
  }
}

// Spreads d_key of one head: its own part is copied, the shared part is added over heads in head
// order.
void store_key_gradient(const AttentionShape& shape, const AttentionGradients& gradients,
                        int64_t first_token, int64_t head, const float* d_key) {
  const int64_t query_dim = shape.query_dim();
  copy_columns(shape.seq_length, shape.nope_dim, d_key, query_dim,
               gradients.key_nope.data + first_token * gradients.key_nope.token_stride +
                   head * gradients.key_nope.head_stride,
               gradients.key_nope.token_stride);
  for (int64_t t = 0; t < shape.seq_length && shape.rope_dim > 0; ++t) {
    const float* const from = d_key + t * query_dim + shape.nope_dim;
    float* const to = gradients.key_rope.data + (first_token + t) * gradients.key_rope.stride;
    for (int64_t d = 0; d < shape.rope_dim; ++d) to[d] = head == 0 ? from[d] : to[d] + from[d];
  }
}

}  // namespace

int64_t attention_workspace_floats(const AttentionShape& shape) {
  return 2 * padded(shape.seq_length * shape.query_dim()) +
         2 * padded(kQueryBlock * shape.seq_length) + padded(kQueryBlock);
}

void attention(const AttentionShape& shape, float scale, const AttentionInputs& in, Heads out,
               float* log_sum_exp, float* workspace, float* gemm_workspace) {
  const Workspace w = divide(shape, workspace);
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t first_token = b * shape.seq_length;
    for (int64_t head = 0; head < shape.heads; ++head) {
      const HeadSlice slice = load_head(shape, in, first_token, head, w.key);
      attend_head(shape, scale, slice,
                  out.data + first_token * out.token_stride + head * out.head_stride,
                  out.token_stride, log_sum_exp + (b * shape.heads + head) * shape.seq_length, w,
                  gemm_workspace);
    }
  }
}

void attention_backward(const AttentionShape& shape, float scale, const AttentionInputs& in,
                        ConstHeads out, const float* log_sum_exp, ConstHeads d_out,
                        const AttentionGradients& gradients, float* workspace,
                        float* gemm_workspace) {
  const Workspace w = divide(shape, workspace);
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t first_token = b * shape.seq_length;
    for (int64_t head = 0; head < shape.heads; ++head) {
      const HeadSlice slice = load_head(shape, in, first_token, head, w.key);
      const auto at = [&](auto heads) {
        return heads.data + first_token * heads.token_stride + head * heads.head_stride;
      };
      const HeadGradient g = {
          .out = at(out),
          .out_stride = out.token_stride,
          .d_out = at(d_out),
          .d_out_stride = d_out.token_stride,
          .log_sum_exp = log_sum_exp + (b * shape.heads + head) * shape.seq_length,
          .d_query = at(gradients.query),
          .d_query_stride = gradients.query.token_stride,
          .d_value = at(gradients.value),
          .d_value_stride = gradients.value.token_stride};
      backward_head(shape, scale, slice, g, w, gemm_workspace);
      store_key_gradient(shape, gradients, first_token, head, w.d_key);
    }
  }
}

}  // namespace penstock::cpu
#endif  // HWY_ONCE
