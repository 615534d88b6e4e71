#include "kernels/reference/reference_kernels.h"

#include <algorithm>
#include <cmath>

#include "kernels/contract.h"
#include "kernels/reference/attention_reference.h"
#include "kernels/reference/fp8_reference.h"
#include "kernels/reference/layer_reference.h"
#include "kernels/reference/matmul_reference.h"
#include "kernels/reference/router_reference.h"

namespace penstock {
namespace {

using reference::HeadsView;
using reference::MatrixView;

MatrixView<const float> view(ConstMatrix m) {
  return {m.data, m.stride};
}
MatrixView<float> view(Matrix m) {
  return {m.data, m.stride};
}
HeadsView<const float> view(ConstHeads h) {
  return {h.data, h.token_stride, h.head_stride};
}
HeadsView<float> view(Heads h) {
  return {h.data, h.token_stride, h.head_stride};
}

class ReferenceKernels final : public Kernels {
 public:
  explicit ReferenceKernels(Fp8Accumulator accumulator) : accumulator_(accumulator) {}

  std::string_view name() const override { return "reference"; }

  void matmul(int64_t m, int64_t n, int64_t k, ConstMatrix a, Transpose transpose_a, ConstMatrix b,
              Transpose transpose_b, Store store, Matrix c, float alpha) override {
    contract::check_matmul(m, n, k, a, transpose_a, b, transpose_b, c);
    reference::matmul(m, n, k, view(a), transpose_a, view(b), transpose_b, store, view(c), alpha);
  }

  void grouped_matmul(int64_t group_count, const int64_t* offsets, int64_t n, int64_t k,
                      ConstMatrix a, ConstMatrix b, int64_t group_stride, Transpose transpose_b,
                      Store store, Matrix c) override {
    contract::check_offsets(group_count, offsets);
    for (int64_t g = 0; g < group_count; ++g) {
      matmul(offsets[g + 1] - offsets[g], n, k, {a.data + offsets[g] * a.stride, a.stride},
             Transpose::kNo, {b.data + g * group_stride, b.stride}, transpose_b, store,
             {c.data + offsets[g] * c.stride, c.stride}, 1.0F);
    }
  }

  void grouped_matmul_ragged_k(int64_t group_count, const int64_t* offsets, int64_t m, int64_t n,
                               ConstMatrix a, ConstMatrix b, Matrix c,
                               int64_t group_stride) override {
    contract::check_offsets(group_count, offsets);
    for (int64_t g = 0; g < group_count; ++g) {
      matmul(m, n, offsets[g + 1] - offsets[g], {a.data + offsets[g] * a.stride, a.stride},
             Transpose::kYes, {b.data + offsets[g] * b.stride, b.stride}, Transpose::kNo,
             Store::kAccumulate, {c.data + g * group_stride, c.stride}, 1.0F);
    }
  }

  int64_t fp8_workspace_floats(int64_t, int64_t) const override { return 0; }

  void fp8_linear(const LinearShape& shape, RowFormat x_format, ConstMatrix x, const float* weight,
                  Store store, Matrix y, float*) override {
    contract::check_linear(shape, x, y);
    contract::check_fp8_operand(x_format);
    reference::fp8_linear(accumulator_, shape, false, x_format, x, weight, store, y);
  }

  void fp8_linear_input_gradient(const LinearShape& shape, RowFormat dy_format, ConstMatrix dy,
                                 const float* weight, Store store, Matrix dx, float*) override {
    contract::check_linear(shape, dx, dy);
    contract::check_fp8_operand(dy_format);
    reference::fp8_linear(accumulator_, shape, true, dy_format, dy, weight, store, dx);
  }

  void fp8_linear_weight_gradient(const LinearShape& shape, RowFormat dy_format, ConstMatrix dy,
                                  RowFormat x_format, ConstMatrix x, float* dweight,
                                  float*) override {
    contract::check_linear(shape, x, dy);
    reference::fp8_linear_weight_gradient(accumulator_, shape, dy_format, dy, x_format, x, dweight);
  }

  void round_rows(RowFormat format, int64_t rows, int64_t width, ConstMatrix x, Matrix y) override {
    contract::check_rows(rows, width);
    reference::round_rows(format, rows, width, x, y);
  }

  void rms_norm(int64_t rows, int64_t width, ConstMatrix x, const float* weight, float eps,
                Matrix y, float* inv_rms) override {
    contract::check_rows(rows, width);
    reference::rms_norm(rows, width, view(x), weight, eps, view(y), inv_rms);
  }

  void rms_norm_backward(int64_t rows, int64_t width, ConstMatrix x, const float* weight,
                         const float* inv_rms, ConstMatrix dy, Store store, Matrix dx,
                         float* dweight) override {
    contract::check_rows(rows, width);
    reference::rms_norm_backward(rows, width, view(x), weight, inv_rms, view(dy), store, view(dx),
                                 dweight);
  }

  void rope(int64_t tokens, int64_t seq_length, int64_t heads, int64_t dim, const float* cosine,
            const float* sine, bool inverse, Heads x) override {
    contract::check_rope(tokens, seq_length, heads, dim);
    reference::rope(tokens, seq_length, heads, dim, cosine, sine, inverse, view(x));
  }

  // The reference keeps its scores in vectors of its own.
  int64_t attention_workspace_floats(const AttentionShape&) const override { return 0; }

  void attention(const AttentionShape& shape, float scale, const AttentionInputs& in, Heads out,
                 float* log_sum_exp, float*) override {
    contract::check_attention(shape);
    reference::attention(shape, scale, views(in), view(out), log_sum_exp);
  }

  void attention_backward(const AttentionShape& shape, float scale, const AttentionInputs& in,
                          ConstHeads out, const float* log_sum_exp, ConstHeads d_out,
                          const AttentionGradients& gradients, float*) override {
    contract::check_attention(shape);
    reference::attention_backward(shape, scale, views(in), view(out), log_sum_exp, view(d_out),
                                  {view(gradients.query), view(gradients.key_nope),
                                   view(gradients.key_rope), view(gradients.value)});
  }

  void swiglu(int64_t rows, int64_t width, ConstMatrix gate, ConstMatrix up, Matrix y) override {
    contract::check_rows(rows, width);
    reference::swiglu(rows, width, view(gate), view(up), view(y));
  }

  void swiglu_backward(int64_t rows, int64_t width, ConstMatrix gate, ConstMatrix up,
                       ConstMatrix dy, Matrix d_gate, Matrix d_up,
                       const SwigluWith& with) override {
    contract::check_rows(rows, width);
    reference::swiglu_backward(rows, width, view(gate), view(up), view(dy), view(d_gate),
                               view(d_up), with.weights, view(with.y), with.dots);
  }

  void router(const RouterShape& shape, ConstMatrix logits, const float* bias, float* scores,
              int32_t* expert_ids, float* weights, int64_t* counts) override {
    contract::check_router(shape);
    reference::router(shape, view(logits), bias, scores, expert_ids, weights, counts);
  }

  void router_backward(const RouterShape& shape, const float* scores, const int32_t* expert_ids,
                       const float* d_weights, Matrix d_logits) override {
    contract::check_router(shape);
    contract::check_ids("expert id", shape.tokens * shape.topk, expert_ids, shape.experts);
    reference::router_backward(shape, scores, expert_ids, d_weights, view(d_logits));
  }

  void cross_entropy(int64_t rows, int64_t vocab, ConstMatrix logits, const int32_t* targets,
                     float gradient_scale, float* losses, Matrix d_logits) override {
    contract::check_targets(rows, vocab, targets);
    reference::cross_entropy(rows, vocab, view(logits), targets, gradient_scale, losses,
                             view(d_logits));
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
    for (int64_t i = 0; i < rows; ++i) {
      const float weight = weights == nullptr ? 1.0F : weights[i];
      for (int64_t j = 0; j < width; ++j) view(y)(i, j) = weight * view(x)(index[i], j);
    }
  }

  void scatter_add_rows(int64_t rows, int64_t width, int64_t y_rows, ConstMatrix x,
                        const int32_t* index, const float* weights, Matrix y) override {
    contract::check_rows(rows, width);
    contract::check_ids("row index", rows, index, y_rows);
    for (int64_t i = 0; i < rows; ++i) {
      const double weight = weights == nullptr ? 1.0 : weights[i];
      for (int64_t j = 0; j < width; ++j) {
        float& sum = view(y)(index[i], j);
        sum = static_cast<float>(sum + weight * view(x)(i, j));
      }
    }
  }

  void copy_rows(int64_t rows, int64_t width, ConstMatrix x, Matrix y) override {
    contract::check_rows(rows, width);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < width; ++j) view(y)(i, j) = view(x)(i, j);
    }
  }
  void accumulate_rows(int64_t rows, int64_t width, ConstMatrix x, Matrix y) override {
    contract::check_rows(rows, width);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < width; ++j) view(y)(i, j) += view(x)(i, j);
    }
  }

  void add(int64_t count, const float* a, const float* b, float* y) override {
    for (int64_t i = 0; i < count; ++i) y[i] = a[i] + b[i];
  }
  void accumulate(int64_t count, const float* x, float* y) override {
    for (int64_t i = 0; i < count; ++i) y[i] += x[i];
  }
  void scale(int64_t count, float factor, float* x) override {
    for (int64_t i = 0; i < count; ++i) x[i] *= factor;
  }
  void fill(int64_t count, float value, float* x) override { std::fill(x, x + count, value); }
  double sum_of_squares(int64_t count, const float* x) override {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * x[i];
    return sum;
  }

  void adamw(int64_t count, const AdamwStep& step, const float* gradient,
             const ConstAdamwState& previous, const AdamwState& next) override {
    for (int64_t i = 0; i < count; ++i) {
      const double g = static_cast<double>(step.gradient_scale) * gradient[i];
      const double m =
          step.beta1 * static_cast<double>(previous.moment1[i]) + (1.0 - step.beta1) * g;
      const double v =
          step.beta2 * static_cast<double>(previous.moment2[i]) + (1.0 - step.beta2) * g * g;
      const double denominator = std::sqrt(v / step.bias_correction2) + step.eps;
      const double p = previous.parameter[i];
      next.parameter[i] = static_cast<float>(
          p - step.lr * (m / step.bias_correction1 / denominator + step.weight_decay * p));
      next.moment1[i] = static_cast<float>(m);
      next.moment2[i] = static_cast<float>(v);
    }
  }

 private:
  static reference::AttentionViews<float> views(const AttentionInputs& in) {
    return {view(in.query), view(in.key_nope), view(in.key_rope), view(in.value)};
  }

 private:
  const Fp8Accumulator accumulator_;
};

}  // namespace

std::unique_ptr<Kernels> make_reference_kernels(Fp8Accumulator accumulator) {
  return std::make_unique<ReferenceKernels>(accumulator);
}

}  // namespace penstock
