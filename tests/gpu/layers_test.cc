// SwiGLU, rotary position, the loss and the optimizer.
#include <cmath>

#include "kernels/cuda/adamw.h"
#include "kernels/cuda/loss.h"
#include "kernels/cuda/rope.h"
#include "kernels/cuda/swiglu.h"
#include "kernels/reference/layer_reference.h"
#include "tests/gpu/harness.h"

namespace penstock::gpu_test {
namespace {

using cuda::Bf16;

template <typename T>
void check_swiglu(Run& run, int64_t rows, int64_t width, bool weighted) {
  Data<T> gate_up(run, rows * 2 * width), dy(run, rows * width), y(run, rows * width);
  Data<T> d_gate_up(run, rows * 2 * width), again(run, rows * width);
  Data<float> weights(run, rows), dots(run, rows);
  const std::vector<double> in = gate_up.fill_random(run, 2.0);
  const std::vector<double> g = dy.fill_random(run);
  std::vector<double> w = weights.fill_random(run);
  if (!weighted) w.assign(w.size(), 1.0);
  cuda::Swiglu<T> forward{.rows = rows, .width = width};
  forward.gate = gate_up.view(2 * width);
  forward.up = {gate_up.get() + width, 2 * width};
  forward.weights = weighted ? weights.get() : nullptr;
  forward.y = y.view(width);
  cuda::swiglu<T>(run.stream(), forward);
  cuda::SwigluGradient<T> gradient{.rows = rows, .width = width};
  gradient.gate = forward.gate;
  gradient.up = forward.up;
  gradient.dy = dy.view(width);
  gradient.weights = forward.weights;
  gradient.d_gate = d_gate_up.view(2 * width);
  gradient.d_up = {d_gate_up.get() + width, 2 * width};
  gradient.y = again.view(width);
  gradient.dots = dots.get();
  cuda::swiglu_gradient<T>(run.stream(), gradient);
  std::vector<double> want_y(g.size()), want_d(in.size()), want_dots(w.size());
  reference::swiglu_backward<double>(rows, width, {in.data(), 2 * width},
                                     {in.data() + width, 2 * width}, {g.data(), width},
                                     {want_d.data(), 2 * width}, {want_d.data() + width, 2 * width},
                                     w.data(), {want_y.data(), width}, want_dots.data());
  run.compare("y", y.read(run), want_y, tolerance_of<T>());
  run.compare("y computed again", again.read(run), want_y, tolerance_of<T>());
  run.compare("d_gate and d_up", d_gate_up.read(run), want_d, tolerance_of<T>());
  run.compare("dots", dots.read(run), want_dots, kFp32Tolerance);
}

template <typename T>
void check_rope(Run& run, int64_t tokens, int64_t heads, int64_t dim, int64_t head_stride) {
  constexpr int64_t kLength = 19;
  const int64_t stride = heads * head_stride;
  Data<T> x(run, tokens * stride);
  Data<float> cosine(run, kLength * dim / 2), sine(run, kLength * dim / 2);
  const std::vector<double> before = x.fill_random(run);
  const std::vector<double> c = cosine.fill_random(run);
  const std::vector<double> s = sine.fill_random(run);
  for (const bool inverse : {false, true}) {
    std::vector<double> want = x.read(run);
    const cuda::Rope<T> rope{.tokens = tokens,
                             .seq_length = kLength,
                             .heads = heads,
                             .dim = dim,
                             .cosine = cosine.get(),
                             .sine = sine.get(),
                             .inverse = inverse,
                             .x = x.get(),
                             .token_stride = stride,
                             .head_stride = head_stride};
    cuda::rope<T>(run.stream(), rope);
    reference::rope<double>(tokens, kLength, heads, dim, c.data(), s.data(), inverse,
                            {want.data(), stride, head_stride});
    run.compare(inverse ? "turned back" : "turned", x.read(run), want, tolerance_of<T>());
  }
}

template <typename T>
void check_loss(Run& run, int64_t rows, int64_t vocab, bool in_place) {
  Data<T> logits(run, rows * vocab), d_logits(run, rows * vocab);
  Data<int32_t> targets(run, rows);
  Data<float> losses(run, rows);
  const std::vector<double> in = logits.fill_random(run, 4.0);
  std::vector<int32_t> hits(static_cast<size_t>(rows));
  for (int32_t& hit : hits) hit = static_cast<int32_t>(run.below(vocab));
  if (rows > 2) hits[1] = -1;
  targets.write(hits);
  cuda::CrossEntropy<T> call{.rows = rows, .vocab = vocab};
  call.logits = logits.view(vocab);
  call.targets = targets.get();
  call.gradient_scale = 0.25F;
  call.losses = losses.get();
  call.d_logits = in_place ? logits.view(vocab) : d_logits.view(vocab);
  cuda::cross_entropy<T>(run.stream(), call);
  std::vector<double> want(hits.size()), want_d(in.size());
  reference::cross_entropy<double>(rows, vocab, {in.data(), vocab}, hits.data(), 0.25, want.data(),
                                   {want_d.data(), vocab});
  run.compare("losses", losses.read(run), want, kFp32Tolerance);
  run.compare("d_logits", (in_place ? logits : d_logits).read(run), want_d, tolerance_of<T>());
}

template <typename M>
void check_adamw(Run& run, int64_t count) {
  Data<float> gradient(run, count), parameter(run, count), factor(run, 1), next(run, count);
  Data<M> moment1(run, count), moment2(run, count), next1(run, count), next2(run, count);
  Data<Bf16> working(run, count);
  const std::vector<double> g = gradient.fill_random(run);
  const std::vector<double> p = parameter.fill_random(run);
  const std::vector<double> m = moment1.fill_random(run);
  std::vector<double> v(static_cast<size_t>(count));
  std::vector<M> squares;
  for (double& value : v) {
    squares.push_back(M(static_cast<float>(std::abs(run.normal()))));
    value = static_cast<double>(static_cast<float>(squares.back()));
  }
  moment2.write(squares);
  factor.write({0.5F});
  const AdamwStep step{.lr = 0.01F,
                       .weight_decay = 0.1F,
                       .bias_correction1 = 0.3F,
                       .bias_correction2 = 0.2F,
                       .gradient_scale = 1.5F};
  cuda::AdamwPointers<M> at;
  at.gradient = gradient.get();
  at.parameter = parameter.get();
  at.moment1 = moment1.get();
  at.moment2 = moment2.get();
  at.next_parameter = next.get();
  at.next_moment1 = next1.get();
  at.next_moment2 = next2.get();
  at.working = working.get();
  cuda::adamw<M>(run.stream(), count, step, at, factor.get());
  std::vector<double> want_p(p), want_m(m), want_v(v);
  for (size_t i = 0; i < p.size(); ++i) {
    const double scaled = 0.75 * g[i];
    want_m[i] = step.beta1 * m[i] + (1.0 - step.beta1) * scaled;
    want_v[i] = step.beta2 * v[i] + (1.0 - step.beta2) * scaled * scaled;
    const double update =
        want_m[i] / step.bias_correction1 / (std::sqrt(want_v[i] / step.bias_correction2) + 1e-8);
    want_p[i] = p[i] - step.lr * (update + step.weight_decay * p[i]);
  }
  run.compare("parameter", next.read(run), want_p, kFp32Tolerance);
  run.compare("moment 1", next1.read(run), want_m, tolerance_of<M>());
  run.compare("moment 2", next2.read(run), want_v, tolerance_of<M>());
  run.compare("working weight", working.read(run), want_p, kBf16Tolerance);
}

}  // namespace

GPU_CASE(swiglu_bf16) {
  for (const bool weighted : {false, true}) {
    check_swiglu<Bf16>(run, 0, 64, weighted);
    check_swiglu<Bf16>(run, 77, 1408, weighted);
    check_swiglu<Bf16>(run, 3, 8, weighted);
  }
}
GPU_CASE(swiglu_fp32) {
  check_swiglu<float>(run, 129, 264, true);
}

GPU_CASE(rope_bf16) {
  check_rope<Bf16>(run, 41, 16, 64, 192);
  check_rope<Bf16>(run, 1, 1, 8, 8);
}
GPU_CASE(rope_fp32) {
  check_rope<float>(run, 41, 3, 64, 64);
}

GPU_CASE(loss_bf16) {
  for (const bool in_place : {false, true}) check_loss<Bf16>(run, 5, 102400, in_place);
  check_loss<Bf16>(run, 1, 8, false);
}
GPU_CASE(loss_fp32) {
  for (const bool in_place : {false, true}) check_loss<float>(run, 37, 1000, in_place);
}
// A NaN among the logits shows in its row's loss and in no other.
GPU_CASE(loss_of_nan) {
  constexpr int64_t kVocab = 4096;
  Data<float> logits(run, 2 * kVocab), losses(run, 2);
  Data<int32_t> targets(run, 2);
  std::vector<float> values(2 * kVocab, 0.5F);
  values[kVocab + 777] = NAN;
  logits.write(values);
  targets.write({3, 3});
  cuda::CrossEntropy<float> call{.rows = 2, .vocab = kVocab};
  call.logits = logits.view(kVocab);
  call.targets = targets.get();
  call.losses = losses.get();
  cuda::cross_entropy<float>(run.stream(), call);
  run.compare("losses", losses.read(run), {std::log(4096.0), NAN}, kFp32Tolerance);
}

GPU_CASE(adamw_fp32_moments) {
  check_adamw<float>(run, 8);
  check_adamw<float>(run, 100'000);
}
GPU_CASE(adamw_bf16_moments) {
  check_adamw<Bf16>(run, 4'104);
}

GPU_CASE(norm_of_gradients) {
  for (const int64_t count : {int64_t{0}, int64_t{8}, int64_t{3'000'000}}) {
    Data<float> x(run, count), factor(run, 1);
    Data<double> partials(run, cuda::kSquarePartials), sum(run, 1);
    double want = 0;
    for (const double value : x.fill_random(run)) want += value * value;
    cuda::sum_of_squares(run.stream(), count, x.get(), partials.get(), sum.get());
    cuda::clip_factor(run.stream(), sum.get(), 0.5, 1.0, factor.get());
    run.compare("sum", sum.read(run), {want}, kFp32Tolerance);
    const double norm = 0.5 * std::sqrt(want);
    run.compare("factor", factor.read(run), {norm > 1.0 ? 1.0 / norm : 1.0}, kFp32Tolerance);
  }
}

}  // namespace penstock::gpu_test
