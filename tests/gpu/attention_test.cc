#include "kernels/cuda/attention.h"

#include "kernels/reference/attention_reference.h"
#include "tests/gpu/harness.h"

namespace penstock::gpu_test {
namespace {

using cuda::Bf16;
using Doubles = std::vector<double>;

// [tokens, heads, dim] within wider rows, or with heads side by side in front of tokens: what the
// strides of an operation are for.
struct Layout {
  int64_t token_stride = 0;
  int64_t head_stride = 0;
  int64_t size = 0;
  static Layout of(const AttentionShape& shape, int64_t dim, bool head_major) {
    const int64_t row = dim + 8;  // never of the width itself
    if (head_major) return {row, row * shape.tokens(), row * shape.tokens() * shape.heads};
    return {row * shape.heads + 16, row, (row * shape.heads + 16) * shape.tokens()};
  }
};

// A tensor with heads, on the device and in double.
struct HeadsData {
  HeadsData(Run& run, const AttentionShape& shape, int64_t dim, bool head_major)
      : layout(Layout::of(shape, dim, head_major)), device(run, layout.size) {}
  template <typename T>
  cuda::HeadsView<T> view() const {
    return {device.get(), layout.token_stride, layout.head_stride};
  }
  reference::HeadsView<const double> in() const {
    return {host.data(), layout.token_stride, layout.head_stride};
  }
  reference::HeadsView<double> to_fill() {
    host.assign(static_cast<size_t>(layout.size), std::nan(""));
    return {host.data(), layout.token_stride, layout.head_stride};
  }
  // The device must have written what the reference wrote, and nothing between the rows.
  void check(Run& run, const std::string& what, double tolerance) const {
    run.compare(what, device.read(run), host, tolerance);
  }

  Layout layout;
  Data<Bf16> device;
  Doubles host;
};

std::string described(const AttentionShape& s) {
  std::string text;
  for (const int64_t size : {s.batch, s.seq_length, s.heads, s.nope_dim, s.rope_dim, s.value_dim}) {
    if (!text.empty()) text += '/';
    text += std::to_string(size);
  }
  return text;
}

void check_attention(Run& run, const AttentionShape& shape, bool head_major = false) {
  const std::string name = described(shape) + " ";
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.query_dim())));
  HeadsData query(run, shape, shape.query_dim(), head_major);
  HeadsData key_nope(run, shape, shape.nope_dim, !head_major);
  HeadsData value(run, shape, shape.value_dim, head_major);
  HeadsData out(run, shape, shape.value_dim, !head_major);
  const int64_t rope_stride = shape.rope_dim + 8;
  Data<Bf16> key_rope(run, shape.tokens() * rope_stride);
  Data<float> log_sum_exp(run, shape.tokens() * shape.heads);
  for (HeadsData* const data : {&query, &key_nope, &value}) {
    data->host = data->device.fill_random(run);
  }
  const Doubles rope = key_rope.fill_random(run);
  const cuda::AttentionRows rows{query.view<const Bf16>(), key_nope.view<const Bf16>(),
                                 key_rope.view(rope_stride), value.view<const Bf16>()};
  cuda::attention(run.stream(), {shape, scale, rows, out.view<Bf16>(), log_sum_exp.get()});

  const reference::AttentionViews<double> in{
      query.in(), key_nope.in(), {rope.data(), rope_stride}, value.in()};
  Doubles lse(static_cast<size_t>(shape.tokens() * shape.heads));
  reference::attention<double>(shape, scale, in, out.to_fill(), lse.data());
  out.check(run, name + "out", kBf16Tolerance);
  out.host = out.device.read(run);  // as rounded: gradients are of small differences to it
  run.compare(name + "log_sum_exp", log_sum_exp.read(run), lse, 10 * kFp32Tolerance);

  HeadsData d_out(run, shape, shape.value_dim, head_major);
  HeadsData d_query(run, shape, shape.query_dim(), !head_major);
  HeadsData d_key_nope(run, shape, shape.nope_dim, head_major);
  HeadsData d_value(run, shape, shape.value_dim, !head_major);
  Data<Bf16> d_key_rope(run, shape.tokens() * rope_stride);
  Data<float> workspace(run, cuda::attention_gradient_floats(shape));
  d_out.host = d_out.device.fill_random(run);
  cuda::AttentionGradient gradient;
  gradient.shape = shape;
  gradient.scale = scale;
  gradient.in = rows;
  gradient.out = out.view<const Bf16>();
  gradient.log_sum_exp = log_sum_exp.get();
  gradient.d_out = d_out.view<const Bf16>();
  gradient.d_query = d_query.view<Bf16>();
  gradient.d_key_nope = d_key_nope.view<Bf16>();
  gradient.d_key_rope = d_key_rope.view(rope_stride);
  gradient.d_value = d_value.view<Bf16>();
  gradient.workspace = workspace.get();
  cuda::attention_gradient(run.stream(), gradient);

  Doubles d_rope(rope.size(), std::nan(""));
  reference::attention_backward<double>(
      shape, scale, in, out.in(), lse.data(), d_out.in(),
      {d_query.to_fill(), d_key_nope.to_fill(), {d_rope.data(), rope_stride}, d_value.to_fill()});
  d_value.check(run, name + "d_value", kBf16Tolerance);
  if (shape.seq_length == 1) return;  // the others are 0 but for what sums in two orders differ by
  d_query.check(run, name + "d_query", kBf16Tolerance);
  d_key_nope.check(run, name + "d_key_nope", kBf16Tolerance);
  run.compare(name + "d_key_rope", d_key_rope.read(run), d_rope, kBf16Tolerance);

  const auto bits = [&](const Data<Bf16>& data) {
    const std::vector<Bf16> values = data.read_exact(run);
    return std::string(reinterpret_cast<const char*>(values.data()), 2 * values.size());
  };
  const std::string before = bits(d_key_rope) + bits(d_query.device) + bits(d_value.device);
  cuda::attention_gradient(run.stream(), gradient);
  const std::string after = bits(d_key_rope) + bits(d_query.device) + bits(d_value.device);
  run.expect(before == after, name + "other bits the second time");
}

}  // namespace

// batch, seq_length, heads, nope_dim, rope_dim, value_dim
GPU_CASE(attention_of_deepseek_heads) {
  check_attention(run, {1, 128, 2, 128, 64, 128});
  check_attention(run, {2, 333, 3, 128, 64, 128});
  check_attention(run, {1, 640, 9, 128, 64, 128}, true);  // more heads than are taken together
}

GPU_CASE(attention_of_short_sequences) {
  for (const int64_t length : {1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 129}) {
    check_attention(run, {2, length, 2, 32, 16, 32}, length % 2 == 0);
  }
}

GPU_CASE(attention_of_every_padded_size) {
  check_attention(run, {1, 200, 2, 16, 0, 16});
  check_attention(run, {1, 200, 2, 48, 16, 64}, true);
  check_attention(run, {1, 200, 2, 64, 0, 80});  // a value wider than the query
  check_attention(run, {1, 200, 2, 80, 48, 128});
  check_attention(run, {1, 200, 2, 112, 48, 96}, true);
  check_attention(run, {1, 200, 2, 96, 96, 112});
  check_attention(run, {1, 200, 2, 192, 64, 256});
  check_attention(run, {1, 333, 1, 128, 80, 192}, true);
  check_attention(run, {1, 97, 2, 16, 16, 208});
}

GPU_CASE(attention_of_nothing) {
  check_attention(run, {0, 64, 2, 128, 64, 128});
  check_attention(run, {3, 0, 2, 128, 64, 128});
}

// Scores far apart: maxima that grow from tile to tile, weights that vanish.
GPU_CASE(attention_of_large_scores) {
  constexpr int64_t kLength = 300;
  constexpr int64_t kDim = 64;
  const AttentionShape shape{1, kLength, 1, kDim, 0, kDim};
  Data<Bf16> query(run, kLength * kDim), key(run, kLength * kDim), value(run, kLength * kDim);
  Data<Bf16> out(run, kLength * kDim);
  Data<float> log_sum_exp(run, kLength);
  const Doubles q = query.fill_random(run, 8.0);
  const Doubles k = key.fill_random(run, 8.0);
  const Doubles v = value.fill_random(run);
  const cuda::AttentionRows rows{
      {query.get(), kDim, kDim}, {key.get(), kDim, kDim}, {}, {value.get(), kDim, kDim}};
  cuda::attention(run.stream(), {shape, 0.5F, rows, {out.get(), kDim, kDim}, log_sum_exp.get()});
  Doubles want(v.size()), lse(kLength);
  reference::attention<double>(
      shape, 0.5, {{q.data(), kDim, kDim}, {k.data(), kDim, kDim}, {}, {v.data(), kDim, kDim}},
      {want.data(), kDim, kDim}, lse.data());
  run.compare("out", out.read(run), want, kBf16Tolerance);
  run.compare("log_sum_exp", log_sum_exp.read(run), lse, 10 * kFp32Tolerance);
}

}  // namespace penstock::gpu_test
