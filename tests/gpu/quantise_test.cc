// E4M3 with a scale for each tile: every bit as the reference has it.
#include "kernels/cuda/quantise.h"

#include <cmath>

#include "kernels/reference/fp8_reference.h"
#include "tests/gpu/harness.h"

namespace penstock::gpu_test {
namespace {

using cuda::Bf16;
constexpr int64_t kTile = 128;

std::vector<float> as_floats(const std::vector<double>& values) {
  return {values.begin(), values.end()};
}

// What a code and its scale stand for, so that NaN equals NaN.
double value_of(uint8_t code, float scale) {
  return static_cast<double>(E4m3::decode(code)) * static_cast<double>(scale);
}

void expect_equal(Run& run, const std::string& what, const std::vector<double>& got,
                  const std::vector<double>& want) {
  for (size_t i = 0; i < want.size(); ++i) {
    const bool equal = got[i] == want[i] || (std::isnan(got[i]) && std::isnan(want[i]));
    if (!equal) {
      return run.expect(false, what + "[" + std::to_string(i) + "] is " + std::to_string(got[i]) +
                                   ", not " + std::to_string(want[i]));
    }
  }
}

template <typename T>
void check_rows(Run& run, int64_t rows, int64_t width, bool power_of_two, double deviation,
                bool spoiled = false) {
  const int64_t tiles = (width + kTile - 1) / kTile;
  Data<T> x(run, rows * width);
  Data<uint8_t> codes(run, rows * width);
  Data<float> scales(run, tiles * rows);
  std::vector<float> in = as_floats(x.fill_random(run, deviation));
  if (spoiled) {
    in[3] = NAN;
    in[static_cast<size_t>(width) + 5] = INFINITY;
    std::vector<T> values;
    for (const float value : in) values.push_back(T(value));
    x.write(values);
  }
  cuda::quantise_rows<T>(run.stream(), rows, width, x.view(width), power_of_two,
                         {codes.view(width), scales.view(rows)});
  const std::vector<uint8_t> got_codes = codes.read_exact(run);
  const std::vector<float> got_scales = scales.read_exact(run);
  const reference::Fp8Matrix want =
      reference::quantize(rows, width, {in.data(), width}, 1, kTile, power_of_two);
  std::vector<double> got(in.size()), expected(in.size());
  for (int64_t i = 0; i < rows * width; ++i) {
    const float scale = got_scales[i % width / kTile * rows + i / width];
    got[i] = value_of(got_codes[i], scale);
    expected[i] = static_cast<double>(want.codes[i]) * static_cast<double>(want.scales[i]);
  }
  expect_equal(run, "row values", got, expected);
}

template <typename T>
void check_weight(Run& run, int64_t out, int64_t in) {
  const int64_t across = (in + kTile - 1) / kTile;
  Data<T> weight(run, out * in);
  Data<uint8_t> codes(run, out * in), transposed(run, in * out);
  Data<float> scales(run, across * ((out + kTile - 1) / kTile));
  const std::vector<float> values = as_floats(weight.fill_random(run, 0.02));
  cuda::quantise_weight<T>(run.stream(), out, in, weight.view(in),
                           {codes.view(in), transposed.view(out), scales.get()});
  const std::vector<uint8_t> got_codes = codes.read_exact(run);
  const std::vector<uint8_t> got_transposed = transposed.read_exact(run);
  const std::vector<float> got_scales = scales.read_exact(run);
  const reference::Fp8Matrix want =
      reference::quantize(out, in, {values.data(), in}, kTile, kTile, false);
  std::vector<double> got(values.size()), turned(values.size()), expected(values.size());
  for (int64_t i = 0; i < out * in; ++i) {
    const int64_t row = i / in;
    const int64_t column = i % in;
    const float scale = got_scales[row / kTile * across + column / kTile];
    got[i] = value_of(got_codes[i], scale);
    turned[i] = value_of(got_transposed[column * out + row], scale);
    expected[i] = static_cast<double>(want.codes[i]) * static_cast<double>(want.scales[i]);
  }
  expect_equal(run, "weight", got, expected);
  expect_equal(run, "transposed", turned, expected);
}

}  // namespace

GPU_CASE(quantise_rows_bf16) {
  for (const bool power_of_two : {false, true}) {
    check_rows<Bf16>(run, 33, 2048, power_of_two, 1.0);
    check_rows<Bf16>(run, 7, 1416, power_of_two, 300.0);  // the last tile is shorter
    check_rows<Bf16>(run, 2, 8, power_of_two, 1e-7);      // below the least magnitude of a tile
  }
  check_rows<Bf16>(run, 0, 256, false, 1.0);
}
GPU_CASE(quantise_rows_fp32) {
  for (const bool power_of_two : {false, true}) check_rows<float>(run, 65, 392, power_of_two, 2.0);
}
GPU_CASE(quantise_rows_not_finite) {
  check_rows<float>(run, 3, 256, false, 1.0, true);
  check_rows<Bf16>(run, 3, 256, true, 1.0, true);
}
GPU_CASE(quantise_weight) {
  check_weight<Bf16>(run, 256, 384);
  check_weight<float>(run, 200, 136);
  check_weight<Bf16>(run, 8, 8);
}

}  // namespace penstock::gpu_test
