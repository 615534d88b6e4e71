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

// body(i, mask) over the first `count` entries of a row whose memory goes on to the next whole
// vector: every vector at i, with the lanes that count set in `mask`.
template <class Body>
HWY_INLINE void for_padded(int64_t count, const Body& body) {
  const Lanes d;
  const auto all = hn::FirstN(d, static_cast<size_t>(kLaneCount));
  int64_t i = 0;
  for (; i + kLaneCount <= count; i += kLaneCount) body(i, all);
  if (i < count) body(i, hn::FirstN(d, static_cast<size_t>(count - i)));
}

// Rows of `scores` are `stride` apart, a multiple of 16, and stand for scale * score. Row i sees
// its first `visible + i` entries: they become exp(scale * (s - max)), the rest up to `columns` 0.
// log_sum_exp[i] = scale * max + log(sum), inverse_sums[i] = 1 / sum. REQUIRES: scale > 0.
void exponentiate_rows(int64_t rows, int64_t columns, int64_t visible, float scale, float* scores,
                       int64_t stride, float* log_sum_exp, float* inverse_sums) {
  const Lanes d;
  constexpr int64_t kParts = kSumLanes / kLaneCount;
  for (int64_t i = 0; i < rows; ++i) {
    float* const row = scores + i * stride;
    const int64_t count = visible + i;
    auto highest = hn::Set(d, row[0]);
    for_padded(count, [&](int64_t j, auto mask) HWY_ATTR {
      highest = hn::Max(highest, hn::IfThenElse(mask, hn::LoadU(d, row + j), highest));
    });
    const float largest = hn::GetLane(hn::MaxOfLanes(d, highest));
    hn::Vec<Lanes> part[kParts];  // as in sum_lanes(): a lane that does not count adds 0
    for (int64_t v = 0; v < kParts; ++v) part[v] = hn::Zero(d);
    for_padded(count, [&](int64_t j, auto mask) HWY_ATTR {
      const auto below = hn::Sub(hn::LoadU(d, row + j), hn::Set(d, largest));
      const auto e = exp_lanes(d, hn::Mul(hn::Set(d, scale), below));
      const auto counted = hn::IfThenElseZero(mask, e);
      hn::StoreU(counted, d, row + j);
      auto& sum = part[j / kLaneCount % kParts];
      sum = hn::Add(sum, counted);
    });
    alignas(64) float sums[kSumLanes];
    for (int64_t v = 0; v < kParts; ++v) hn::Store(part[v], d, sums + v * kLaneCount);
    const float sum = fold(sums);
    std::fill(row + count, row + columns, 0.0F);
    log_sum_exp[i] = scale * largest + std::log(sum);
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

// The visible entries become p = exp(scale * score - log_sum_exp) in `scores` and p (d_scores -
// delta) scale in `d_scores`, the rest up to `columns` 0 in both. delta[i] = d_out[i] . out[i].
void softmax_backward_rows(int64_t rows, int64_t columns, int64_t visible, float scale,
                           const float* log_sum_exp, const float* delta, float* scores,
                           float* d_scores, int64_t stride) {
  const Lanes d;
  const auto factor = hn::Set(d, scale);
  for (int64_t i = 0; i < rows; ++i) {
    float* const row = scores + i * stride;
    float* const d_row = d_scores + i * stride;
    const int64_t count = visible + i;
    for_padded(count, [&](int64_t j, auto mask) HWY_ATTR {
      const auto p =
          exp_lanes(d, hn::MulSub(factor, hn::LoadU(d, row + j), hn::Set(d, log_sum_exp[i])));
      const auto centred = hn::Sub(hn::LoadU(d, d_row + j), hn::Set(d, delta[i]));
      const auto d_score = hn::Mul(hn::Mul(p, factor), centred);
      hn::StoreU(hn::IfThenElseZero(mask, p), d, row + j);
      hn::StoreU(hn::IfThenElseZero(mask, d_score), d, d_row + j);
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

// Queries per panel, one register tile high on the widest target. A panel meets no key block past
// its last query, so the finer it is, the less of what causality masks is computed.
constexpr int64_t kPanel = 12;
// Queries per block of the backward, whose scores are kept until keys and values have their
// gradients from them. Of 48, 96 and 144 measured fastest at 128 and 256 tokens.
constexpr int64_t kBlock = 8 * kPanel;

int64_t padded(int64_t floats) {
  return (floats + 15) / 16 * 16;
}

// Floats between rows that run over the sequence: whole vectors, and not a multiple of what maps
// every row to the same place of the first cache.
int64_t sequence_stride(int64_t seq_length) {
  return padded(seq_length) + (padded(seq_length) % 256 == 0 ? 16 : 0);
}

// What one head needs. Transposed, keys and values are read by products with queries and output
// gradients without being packed again for every panel.
struct Workspace {
  int64_t stride;           // sequence_stride()
  float* key;               // [seq_length, query_dim]: nope and rope parts side by side
  float* key_transposed;    // [query_dim, stride]
  float* value_transposed;  // [value_dim, stride]
  float* d_key;             // [seq_length, query_dim]
  float* scores;            // [kBlock, stride]
  float* d_scores;          // [kBlock, stride]
  float* row;               // [kPanel]: 1 / sum, or delta
  float* gemm;
};

// Lays the buffers out behind each other from `base` (null: only counts); returns the floats taken.
int64_t lay_out(const AttentionShape& shape, float* base, Workspace* w) {
  int64_t taken = 0;
  const auto take = [&](float*& buffer, int64_t floats) {
    buffer = base == nullptr ? nullptr : base + taken;
    taken += padded(floats);
  };
  w->stride = sequence_stride(shape.seq_length);
  take(w->key, shape.seq_length * shape.query_dim());
  take(w->key_transposed, shape.query_dim() * w->stride);
  take(w->value_transposed, shape.value_dim * w->stride);
  take(w->d_key, shape.seq_length * shape.query_dim());
  take(w->scores, kBlock * w->stride);
  take(w->d_scores, kBlock * w->stride);
  take(w->row, kPanel);
  return taken;
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
  const float* key_nope;
  const float* key_rope;
  const float* value;
  int64_t query_stride;
  int64_t key_nope_stride;
  int64_t key_rope_stride;
  int64_t value_stride;
};

HeadSlice slice_of(const AttentionInputs& in, int64_t first_token, int64_t head) {
  const auto at = [&](const ConstHeads& heads) {
    return heads.data + first_token * heads.token_stride + head * heads.head_stride;
  };
  return {at(in.query),
          at(in.key_nope),
          in.key_rope.data + first_token * in.key_rope.stride,
          at(in.value),
          in.query.token_stride,
          in.key_nope.token_stride,
          in.key_rope.stride,
          in.value.token_stride};
}

void transpose_key(const AttentionShape& shape, const HeadSlice& slice, const Workspace& w) {
  transpose(shape.seq_length, shape.nope_dim, slice.key_nope, slice.key_nope_stride,
            w.key_transposed, w.stride);
  if (shape.rope_dim == 0) return;
  transpose(shape.seq_length, shape.rope_dim, slice.key_rope, slice.key_rope_stride,
            w.key_transposed + shape.nope_dim * w.stride, w.stride);
}

void gather_key(const AttentionShape& shape, const HeadSlice& slice, const Workspace& w) {
  copy_columns(shape.seq_length, shape.nope_dim, slice.key_nope, slice.key_nope_stride, w.key,
               shape.query_dim());
  if (shape.rope_dim == 0) return;
  copy_columns(shape.seq_length, shape.rope_dim, slice.key_rope, slice.key_rope_stride,
               w.key + shape.nope_dim, shape.query_dim());
}

// to[rows, the columns they see, in whole vectors] = from[rows, width] transposed[width, columns]
void sequence_product(int64_t rows, int64_t visible, int64_t width, const float* from,
                      int64_t from_stride, const float* transposed, const Workspace& w, float* to) {
  gemm({.m = rows,
        .n = padded(visible),
        .k = width,
        .a = from,
        .a_row_stride = from_stride,
        .a_depth_stride = 1,
        .b = transposed,
        .b_depth_stride = w.stride,
        .b_column_stride = 1,
        .c = to,
        .c_stride = w.stride},
       w.gemm);
}

void attend_head(const AttentionShape& shape, float scale, const HeadSlice& slice, float* out,
                 int64_t out_stride, float* log_sum_exp, const Workspace& w) {
  transpose_key(shape, slice, w);
  for (int64_t first = 0; first < shape.seq_length; first += kPanel) {
    const int64_t rows = std::min(kPanel, shape.seq_length - first);
    const int64_t visible = first + rows;
    sequence_product(rows, visible, shape.query_dim(), slice.query + first * slice.query_stride,
                     slice.query_stride, w.key_transposed, w, w.scores);
    HWY_DYNAMIC_DISPATCH(exponentiate_rows)
    (rows, visible, first + 1, scale, w.scores, w.stride, log_sum_exp + first, w.row);
    gemm({.m = rows,
          .n = shape.value_dim,
          .k = visible,
          .a = w.scores,
          .a_row_stride = w.stride,
          .a_depth_stride = 1,
          .b = slice.value,
          .b_depth_stride = slice.value_stride,
          .b_column_stride = 1,
          .c = out + first * out_stride,
          .c_stride = out_stride},
         w.gemm);
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

// Probabilities and score gradients of one panel of queries, into its rows of the block, and the
// gradient of its queries.
void backward_panel(const AttentionShape& shape, float scale, const HeadSlice& slice,
                    const HeadGradient& g, int64_t first, int64_t rows, float* scores,
                    float* d_scores, const Workspace& w) {
  const int64_t visible = first + rows;
  const float* const d_out = g.d_out + first * g.d_out_stride;
  sequence_product(rows, visible, shape.query_dim(), slice.query + first * slice.query_stride,
                   slice.query_stride, w.key_transposed, w, scores);
  sequence_product(rows, visible, shape.value_dim, d_out, g.d_out_stride, w.value_transposed, w,
                   d_scores);
  HWY_DYNAMIC_DISPATCH(row_products)
  (rows, shape.value_dim, g.out + first * g.out_stride, g.out_stride, d_out, g.d_out_stride, w.row);
  HWY_DYNAMIC_DISPATCH(softmax_backward_rows)
  (rows, visible, first + 1, scale, g.log_sum_exp + first, w.row, scores, d_scores, w.stride);
  gemm({.m = rows,
        .n = shape.query_dim(),
        .k = visible,
        .a = d_scores,
        .a_row_stride = w.stride,
        .a_depth_stride = 1,
        .b = w.key,
        .b_depth_stride = shape.query_dim(),
        .b_column_stride = 1,
        .c = g.d_query + first * g.d_query_stride,
        .c_stride = g.d_query_stride},
       w.gemm);
}

// What the queries [first, end) give to the keys and values they see, a panel of keys at a time,
// from its first query on. The first block taken (the last of the sequence, which sees every key)
// starts the sums.
void accumulate_block(const AttentionShape& shape, const HeadSlice& slice, const HeadGradient& g,
                      int64_t first, int64_t end, const Workspace& w) {
  for (int64_t key = 0; key < end; key += kPanel) {
    const int64_t query = std::max(key, first);
    GemmArguments product = {.m = std::min(kPanel, end - key),
                             .n = shape.value_dim,
                             .k = end - query,
                             .a = w.scores + (query - first) * w.stride + key,
                             .a_row_stride = 1,
                             .a_depth_stride = w.stride,
                             .b = g.d_out + query * g.d_out_stride,
                             .b_depth_stride = g.d_out_stride,
                             .b_column_stride = 1,
                             .c = g.d_value + key * g.d_value_stride,
                             .c_stride = g.d_value_stride,
                             .accumulate = end < shape.seq_length};
    gemm(product, w.gemm);
    product.n = shape.query_dim();
    product.a = w.d_scores + (query - first) * w.stride + key;
    product.b = slice.query + query * slice.query_stride;
    product.b_depth_stride = slice.query_stride;
    product.c = w.d_key + key * shape.query_dim();
    product.c_stride = shape.query_dim();
    gemm(product, w.gemm);
  }
}

void backward_head(const AttentionShape& shape, float scale, const HeadSlice& slice,
                   const HeadGradient& g, const Workspace& w) {
  transpose_key(shape, slice, w);
  gather_key(shape, slice, w);
  transpose(shape.seq_length, shape.value_dim, slice.value, slice.value_stride, w.value_transposed,
            w.stride);
  for (int64_t end = shape.seq_length; end > 0;) {
    const int64_t first = (end - 1) / kBlock * kBlock;
    for (int64_t panel = first; panel < end; panel += kPanel) {
      const int64_t row = (panel - first) * w.stride;
      backward_panel(shape, scale, slice, g, panel, std::min(kPanel, end - panel), w.scores + row,
                     w.d_scores + row, w);
    }
    accumulate_block(shape, slice, g, first, end, w);
    end = first;
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
  Workspace w;
  return lay_out(shape, nullptr, &w);
}

void attention(const AttentionShape& shape, float scale, const AttentionInputs& in, Heads out,
               float* log_sum_exp, float* workspace, float* gemm_workspace) {
  Workspace w;
  lay_out(shape, workspace, &w);
  w.gemm = gemm_workspace;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t first_token = b * shape.seq_length;
    for (int64_t head = 0; head < shape.heads; ++head) {
      attend_head(shape, scale, slice_of(in, first_token, head),
                  out.data + first_token * out.token_stride + head * out.head_stride,
                  out.token_stride, log_sum_exp + (b * shape.heads + head) * shape.seq_length, w);
    }
  }
}

void attention_backward(const AttentionShape& shape, float scale, const AttentionInputs& in,
                        ConstHeads out, const float* log_sum_exp, ConstHeads d_out,
                        const AttentionGradients& gradients, float* workspace,
                        float* gemm_workspace) {
  Workspace w;
  lay_out(shape, workspace, &w);
  w.gemm = gemm_workspace;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t first_token = b * shape.seq_length;
    for (int64_t head = 0; head < shape.heads; ++head) {
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
      backward_head(shape, scale, slice_of(in, first_token, head), g, w);
      store_key_gradient(shape, gradients, first_token, head, w.d_key);
    }
  }
}

}  // namespace penstock::cpu
#endif  // HWY_ONCE
