#include "kernels/cuda/norm.h"

#include "kernels/reference/layer_reference.h"
#include "tests/gpu/harness.h"

namespace penstock::gpu_test {
namespace {

using cuda::Bf16;
using cuda::View;
constexpr float kEps = 1e-6F;

struct Shape {
  int64_t rows;
  int64_t width;
};
// Every size of team, full and not; a row alone; none.
constexpr Shape kShapes[] = {{1, 8},     {37, 256}, {64, 1536}, {513, 2048},
                             {19, 7168}, {5, 8192}, {0, 64}};

template <typename T>
void check_norm(Run& run, const Shape& shape, bool adds) {
  const auto [rows, width] = shape;
  Data<T> x(run, rows * width), residual(run, rows * width), sum(run, rows * width);
  Data<T> y(run, rows * width), dy(run, rows * width), dx(run, rows * width);
  Data<float> weight(run, width), inv_rms(run, rows), dweight(run, width);
  Data<float> partials(run, cuda::norm_partials_floats(width));
  std::vector<double> h = x.fill_random(run);
  const std::vector<double> w = weight.fill_random(run);
  const std::vector<double> g = dy.fill_random(run);
  const std::vector<double> r = residual.fill_random(run);
  cuda::RmsNorm<T> norm{.rows = rows};
  norm.width = width;
  norm.x = x.view(width);
  norm.y = y.view(width);
  norm.weight = weight.get();
  norm.eps = kEps;
  norm.inv_rms = inv_rms.get();
  if (adds) {
    norm.residual = residual.view(width);
    norm.sum = sum.view(width);
  }
  cuda::rms_norm<T>(run.stream(), norm);
  if (adds) {
    std::vector<double> want(h.size());
    for (size_t i = 0; i < h.size(); ++i) want[i] = h[i] + r[i];
    h = sum.read(run);  // as rounded: what the rest is to be computed from
    run.compare("sum", h, want, tolerance_of<T>());
  }
  std::vector<double> want(h.size()), inverse(static_cast<size_t>(rows));
  reference::rms_norm<double>(rows, width, {h.data(), width}, w.data(), kEps, {want.data(), width},
                              inverse.data());
  run.compare("y", y.read(run), want, tolerance_of<T>());
  run.compare("inv_rms", inv_rms.read(run), inverse, kFp32Tolerance);

  cuda::RmsNormInputGradient<T> gradient{.rows = rows};
  gradient.width = width;
  gradient.x = adds ? sum.view(width) : x.view(width);
  gradient.weight = weight.get();
  gradient.inv_rms = inv_rms.get();
  gradient.dy = dy.view(width);
  if (adds) gradient.add = residual.view(width);
  gradient.dx = dx.view(width);
  cuda::rms_norm_input_gradient<T>(run.stream(), gradient);
  std::vector<double> d_x(r), d_weight = dweight.fill_random(run);
  reference::rms_norm_backward<double>(
      rows, width, {h.data(), width}, w.data(), inverse.data(), {g.data(), width},
      adds ? Store::kAccumulate : Store::kOverwrite, {d_x.data(), width}, d_weight.data());
  run.compare("dx", dx.read(run), d_x, tolerance_of<T>());
  cuda::rms_norm_weight_gradient<T>(run.stream(), rows, width, gradient.x, inv_rms.get(),
                                    dy.view(width), dweight.get(), partials.get());
  run.compare("dweight", dweight.read(run), d_weight, kFp32Tolerance);
}

template <typename T>
void check_shapes(Run& run) {
  for (const Shape& shape : kShapes) {
    for (const bool adds : {false, true}) check_norm<T>(run, shape, adds);
  }
}

}  // namespace

GPU_CASE(rms_norm_bf16) {
  check_shapes<Bf16>(run);
}
GPU_CASE(rms_norm_fp32) {
  check_shapes<float>(run);
}

// Rows beyond a count that only the device knows stay as they were.
GPU_CASE(rms_norm_rows_of_device) {
  constexpr int64_t kMost = 100, kRows = 61, kWidth = 512;
  Data<Bf16> x(run, kMost * kWidth), y(run, kMost * kWidth);
  Data<float> weight(run, kWidth), inv_rms(run, kMost);
  Data<int64_t> count(run, 1);
  x.fill_random(run);
  weight.fill_random(run);
  count.write({kRows});
  cuda::RmsNorm<Bf16> norm{.rows = {kMost, count.get()}};
  norm.width = kWidth;
  norm.x = x.view(kWidth);
  norm.y = y.view(kWidth);
  norm.weight = weight.get();
  norm.eps = kEps;
  norm.inv_rms = inv_rms.get();
  cuda::rms_norm<Bf16>(run.stream(), norm);
  const std::vector<double> got = y.read(run);
  for (int64_t row = 0; row < kMost; ++row) {
    const bool written = got[row * kWidth] == got[row * kWidth];
    run.expect(written == (row < kRows), "row " + std::to_string(row));
  }
}

}  // namespace penstock::gpu_test
