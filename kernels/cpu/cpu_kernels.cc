#include "kernels/cpu/cpu_kernels.h"

#include <algorithm>
#include <cstring>

#include "kernels/arena.h"
#include "kernels/contract.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/fp8.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/layers.h"
#include "kernels/cpu/router.h"
#include "kernels/cpu/rows.h"

namespace penstock {
namespace {

constexpr int64_t kRopeDimMax = 1024;
constexpr int64_t kRouterFloatsMax = 8192;  // experts + groups

class CpuKernels final : public Kernels {
 public:
  explicit CpuKernels(Fp8Accumulator accumulator)
      : accumulator_(accumulator),
        scratch_("cpu kernels", Arena::rounded_bytes(cpu::gemm_workspace_floats(), sizeof(float)) +
                                    Arena::rounded_bytes(2 * kRopeDimMax, sizeof(float)) +
                                    Arena::rounded_bytes(kRouterFloatsMax, sizeof(float))),
        gemm_(scratch_.floats(cpu::gemm_workspace_floats())),
        angles_(scratch_.floats(2 * kRopeDimMax)),
        choices_(scratch_.floats(kRouterFloatsMax)) {}

  std::string_view name() const override { return "cpu"; }

  void matmul(int64_t m, int64_t n, int64_t k, ConstMatrix a, Transpose transpose_a, ConstMatrix b,
              Transpose transpose_b, Store store, Matrix c, float alpha) override {
    contract::check_matmul(m, n, k, a, transpose_a, b, transpose_b, c);
    const bool ta = transpose_a == Transpose::kYes;
    const bool tb = transpose_b == Transpose::kYes;
    cpu::gemm({.m = m,
               .n = n,
               .k = k,
               .a = a.data,
               .a_row_stride = ta ? 1 : a.stride,
               .a_depth_stride = ta ? a.stride : 1,
               .b = b.data,
               .b_depth_stride = tb ? 1 : b.stride,
               .b_column_stride = tb ? b.stride : 1,
               .c = c.data,
               .c_stride = c.stride,
               .accumulate = store == Store::kAccumulate,
               .alpha = alpha},
              gemm_);
  }

  void grouped_matmul(int64_t group_count, const int64_t* offsets, int64_t n, int64_t k,
                      ConstMatrix a, ConstMatrix b, int64_t group_stride, Transpose transpose_b,
                      Store store, Matrix c) override {
    contract::check_offsets(group_count, offsets);
    for (int64_t g = 0; g < group_count; ++g) {
      const int64_t rows = offsets[g + 1] - offsets[g];
      if (rows == 0) continue;
      matmul(rows, n, k, {a.data + offsets[g] * a.stride, a.stride}, Transpose::kNo,
             {b.data + g * group_stride, b.stride}, transpose_b, store,
             {c.data + offsets[g] * c.stride, c.stride}, 1.0F);
    }
  }

  void grouped_matmul_ragged_k(int64_t group_count, const int64_t* offsets, int64_t m, int64_t n,
                               ConstMatrix a, ConstMatrix b, Matrix c,
                               int64_t group_stride) override {
    contract::check_offsets(group_count, offsets);
    for (int64_t g = 0; g < group_count; ++g) {
      const int64_t rows = offsets[g + 1] - offsets[g];
      if (rows == 0) continue;
      matmul(m, n, rows, {a.data + offsets[g] * a.stride, a.stride}, Transpose::kYes,
             {b.data + offsets[g] * b.stride, b.stride}, Transpose::kNo, Store::kAccumulate,
             {c.data + g * group_stride, c.stride}, 1.0F);
    }
  }

  int64_t fp8_workspace_floats(int64_t out, int64_t in) const override {
    return cpu::fp8_workspace_floats(out, in);
  }

  void fp8_linear(const LinearShape& shape, RowFormat x_format, ConstMatrix x, const float* weight,
                  Store store, Matrix y, float* workspace) override {
    contract::check_linear(shape, x, y);
    contract::check_fp8_operand(x_format);
    cpu::fp8_linear(shape, cpu::LinearPass::kForward, x_format, x, weight, store, y,
                    {workspace, gemm_, accumulator_});
  }

  void fp8_linear_input_gradient(const LinearShape& shape, RowFormat dy_format, ConstMatrix dy,
                                 const float* weight, Store store, Matrix dx,
                                 float* workspace) override {
    contract::check_linear(shape, dx, dy);
    contract::check_fp8_operand(dy_format);
    cpu::fp8_linear(shape, cpu::LinearPass::kInputGradient, dy_format, dy, weight, store, dx,
                    {workspace, gemm_, accumulator_});
  }

  void fp8_linear_weight_gradient(const LinearShape& shape, RowFormat dy_format, ConstMatrix dy,
                                  RowFormat x_format, ConstMatrix x, float* dweight,
                                  float* workspace) override {
    contract::check_linear(shape, x, dy);
    cpu::fp8_linear_weight_gradient(shape, dy_format, dy, x_format, x, dweight,
                                    {workspace, gemm_, accumulator_});
  }

  void round_rows(RowFormat format, int64_t rows, int64_t width, ConstMatrix x, Matrix y) override {
    contract::check_rows(rows, width);
    cpu::round_rows(format, rows, width, x, y);
  }

  void rms_norm(int64_t rows, int64_t width, ConstMatrix x, const float* weight, float eps,
                Matrix y, float* inv_rms) override {
    contract::check_rows(rows, width);
    cpu::rms_norm(rows, width, x, weight, eps, y, inv_rms);
  }

  void rms_norm_backward(int64_t rows, int64_t width, ConstMatrix x, const float* weight,
                         const float* inv_rms, ConstMatrix dy, Store store, Matrix dx,
                         float* dweight) override {
    contract::check_rows(rows, width);
    cpu::rms_norm_backward(rows, width, x, weight, inv_rms, dy, store, dx, dweight);
  }

  void rope(int64_t tokens, int64_t seq_length, int64_t heads, int64_t dim, const float* cosine,
            const float* sine, bool inverse, Heads x) override {
    contract::check_rope(tokens, seq_length, heads, dim);
    PENSTOCK_CHECK(dim <= kRopeDimMax, dim);
    cpu::rope(tokens, seq_length, heads, dim, cosine, sine, inverse, x, angles_);
  }

  int64_t attention_workspace_floats(const AttentionShape& shape) const override {
    contract::check_attention(shape);
    return cpu::attention_workspace_floats(shape);
  }

  void attention(const AttentionShape& shape, float scale, const AttentionInputs& in, Heads out,
                 float* log_sum_exp, float* workspace) override {
    contract::check_attention(shape);
    cpu::attention(shape, scale, in, out, log_sum_exp, workspace, gemm_);
  }

  void attention_backward(const AttentionShape& shape, float scale, const AttentionInputs& in,
                          ConstHeads out, const float* log_sum_exp, ConstHeads d_out,
                          const AttentionGradients& gradients, float* workspace) override {
    contract::check_attention(shape);
    cpu::attention_backward(shape, scale, in, out, log_sum_exp, d_out, gradients, workspace, gemm_);
  }

  void swiglu(int64_t rows, int64_t width, ConstMatrix gate, ConstMatrix up, Matrix y) override {
    contract::check_rows(rows, width);
    cpu::swiglu(rows, width, gate, up, y);
  }

  void swiglu_backward(int64_t rows, int64_t width, ConstMatrix gate, ConstMatrix up,
                       ConstMatrix dy, Matrix d_gate, Matrix d_up,
                       const SwigluWith& with) override {
    contract::check_rows(rows, width);
    cpu::swiglu_backward(rows, width, gate, up, dy, d_gate, d_up, with);
  }

  void router(const RouterShape& shape, ConstMatrix logits, const float* bias, float* scores,
              int32_t* expert_ids, float* weights, int64_t* counts) override {
    contract::check_router(shape);
    PENSTOCK_CHECK(shape.experts + shape.groups <= kRouterFloatsMax, shape.experts);
    cpu::router(shape, logits, bias, scores, expert_ids, weights, counts, choices_);
  }

  void router_backward(const RouterShape& shape, const float* scores, const int32_t* expert_ids,
                       const float* d_weights, Matrix d_logits) override {
    contract::check_router(shape);
    contract::check_ids("expert id", shape.tokens * shape.topk, expert_ids, shape.experts);
    cpu::router_backward(shape, scores, expert_ids, d_weights, d_logits);
  }

  void cross_entropy(int64_t rows, int64_t vocab, ConstMatrix logits, const int32_t* targets,
                     float gradient_scale, float* losses, Matrix d_logits) override {
    contract::check_targets(rows, vocab, targets);
    cpu::cross_entropy(rows, vocab, logits, targets, gradient_scale, losses, d_logits);
  }

  void embedding(int64_t rows, int64_t vocab, int64_t width, const int32_t* ids, const float* table,
                 Matrix y) override {
    gather_rows(rows, width, vocab, {table, width}, ids, nullptr, y);
  }
  void embedding_backward(int64_t rows, int64_t vocab, int64_t width, const int32_t* ids,
                          ConstMatrix dy, float* d_table) override {
    scatter_add_rows(rows, width, vocab, dy, ids, nullptr, {d_table, width});
  }

  void gather_rows(int64_t rows, int64_t width, int64_t x_rows, ConstMatrix x, const int32_t* index,
                   const float* weights, Matrix y) override {
    contract::check_rows(rows, width);
    contract::check_ids("row index", rows, index, x_rows);
    cpu::gather_rows(rows, width, x, index, weights, y);
  }

  void scatter_add_rows(int64_t rows, int64_t width, int64_t y_rows, ConstMatrix x,
                        const int32_t* index, const float* weights, Matrix y) override {
    contract::check_rows(rows, width);
    contract::check_ids("row index", rows, index, y_rows);
    cpu::scatter_add_rows(rows, width, x, index, weights, y);
  }

  void copy_rows(int64_t rows, int64_t width, ConstMatrix x, Matrix y) override {
    contract::check_rows(rows, width);
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(y.data + i * y.stride, x.data + i * x.stride,
                  static_cast<size_t>(width) * sizeof(float));
    }
  }
  void accumulate_rows(int64_t rows, int64_t width, ConstMatrix x, Matrix y) override {
    contract::check_rows(rows, width);
    cpu::accumulate_rows(rows, width, x, y);
  }

  void add(int64_t count, const float* a, const float* b, float* y) override {
    cpu::add(count, a, b, y);
  }
  void accumulate(int64_t count, const float* x, float* y) override { cpu::add(count, y, x, y); }
  void scale(int64_t count, float factor, float* x) override { cpu::scale(count, factor, x); }
  void fill(int64_t count, float value, float* x) override { std::fill_n(x, count, value); }
  double sum_of_squares(int64_t count, const float* x) override {
    return cpu::sum_of_squares(count, x);
  }

  void adamw(int64_t count, const AdamwStep& step, const float* gradient,
             const ConstAdamwState& previous, const AdamwState& next) override {
    cpu::adamw(count, step, gradient, previous, next);
  }

 private:
  const Fp8Accumulator accumulator_;
  Arena scratch_;   // holds the three below
  float* gemm_;     // packed panels
  float* angles_;   // one token's cosines and sines
  float* choices_;  // one token's biased scores
};

}  // namespace

std::unique_ptr<Kernels> make_cpu_kernels(Fp8Accumulator accumulator) {
  return std::make_unique<CpuKernels>(accumulator);
}

}  // namespace penstock
