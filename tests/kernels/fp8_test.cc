#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "comm/base/minifloat.h"
#include "kernels/reference/fp8_reference.h"
#include "kernels/tile_scale.h"
#include "tests/kernels/support.h"

namespace penstock {
namespace {

constexpr RowFormat kTiledFormats[] = {RowFormat::kE4m3, RowFormat::kE4m3PowerOfTwo,
                                       RowFormat::kE5m6PowerOfTwo};

// Values that spread over many binades, as activations do.
std::vector<float> spread_values(int64_t count, uint64_t seed) {
  std::vector<float> values = random_values(count, seed);
  const std::vector<float> exponents = random_values(count, seed + 1000, 3.0);
  for (size_t i = 0; i < values.size(); ++i) values[i] *= std::exp2(exponents[i]);
  return values;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<float> rounded(Kernels& kernels, RowFormat format, int64_t rows, int64_t width,
                           std::vector<float> x) {
  kernels.round_rows(format, rows, width, {x.data(), width}, {x.data(), width});
  return x;
}

// One linear layer on groups of rows: its operands, and each pass from the same start.
struct Layer {
  int64_t out = 0, in = 0;
  std::vector<int64_t> offsets;
  RowFormat x_format = RowFormat::kE4m3;
  RowFormat dy_format = RowFormat::kE4m3;
  int64_t gap = 3;  // floats between rows

  int64_t rows() const { return offsets.back(); }
  int64_t groups() const { return std::ssize(offsets) - 1; }
  LinearShape shape() const { return {out, in, groups(), offsets.data(), out * in + 5}; }
  Matrix x() const { return const_cast<Layer*>(this)->x_.matrix(); }
  Matrix dy() const { return const_cast<Layer*>(this)->dy_.matrix(); }
  const float* weight() const { return weight_.data(); }

  Layer(int64_t out_width, int64_t in_width, std::vector<int64_t> row_offsets)
      : out(out_width),
        in(in_width),
        offsets(std::move(row_offsets)),
        x_(rows(), in, in + gap, 1),
        dy_(rows(), out, out + gap, 2),
        weight_(spread_values(groups() * (out * in + 5), 3)) {}

  struct Results {
    std::vector<float> y, dx, dweight;
  };
  Results run(Kernels& kernels, Store store) const {
    StridedRows y(rows(), out, out + gap, 4);
    StridedRows dx(rows(), in, in + gap, 5);
    Results results{{}, {}, random_values(std::ssize(weight_), 6)};
    // The marker behind the workspace shows writes past its end.
    const int64_t floats = kernels.fp8_workspace_floats(out, in);
    std::vector<float> workspace(static_cast<size_t>(floats + 64), StridedRows::kMarker);
    kernels.fp8_linear(shape(), x_format, x(), weight(), store, y.matrix(), workspace.data());
    kernels.fp8_linear_input_gradient(shape(), dy_format, dy(), weight(), store, dx.matrix(),
                                      workspace.data());
    kernels.fp8_linear_weight_gradient(shape(), dy_format, dy(), x_format, x(),
                                       results.dweight.data(), workspace.data());
    EXPECT_TRUE(y.gaps_untouched() && dx.gaps_untouched());
    for (int64_t i = floats; i < std::ssize(workspace); ++i) {
      EXPECT_EQ(workspace[static_cast<size_t>(i)], StridedRows::kMarker) << i - floats;
    }
    results.y = y.data();
    results.dx = dx.data();
    return results;
  }

 private:
  StridedRows x_, dy_;
  std::vector<float> weight_;
};

TEST(Fp8Test, CpuRoundsRowsToTheReferencesBitsOnEveryInstructionSet) {
  const auto reference = make_reference_kernels();
  on_each_instruction_set([&](const std::string& name) {
    const auto cpu = make_cpu_kernels();
    for (const int64_t width : {1, 5, 127, 128, 129, 300}) {
      const auto x = spread_values(3 * width, static_cast<uint64_t>(width));
      for (const RowFormat format : {RowFormat::kFp32, RowFormat::kBf16, RowFormat::kE4m3,
                                     RowFormat::kE4m3PowerOfTwo, RowFormat::kE5m6PowerOfTwo}) {
        ASSERT_TRUE(
            same_bits(rounded(*cpu, format, 3, width, x), rounded(*reference, format, 3, width, x)))
            << name << " width " << width << " format " << static_cast<int>(format);
      }
    }
  });
}

// With 448 in the tile the scale is exactly 1 and rounding is that of the format alone.
TEST(Fp8Test, CpuRoundsEveryHalfwayCaseOfE4m3ToEven) {
  const auto cpu = make_cpu_kernels();
  for (uint32_t code = 0; code < E4m3::kLargest; ++code) {
    const float halfway = (E4m3::decode(code) + E4m3::decode(code + 1)) / 2;
    const float even = E4m3::decode(code & 1 ? code + 1 : code);
    const std::vector<float> x = {448.0F, halfway, -halfway, std::nextafterf(halfway, 0.0F)};
    const std::vector<float> y = rounded(*cpu, RowFormat::kE4m3, 1, 4, x);
    ASSERT_EQ(y, (std::vector<float>{448.0F, even, -even, E4m3::decode(code)})) << halfway;
  }
}

TEST(Fp8Test, TheScaleTakesTheLargestMagnitudeToTheLargestCode) {
  EXPECT_EQ(tile_scale(448.0F, 448.0F, false), 1.0F);
  EXPECT_EQ(tile_scale(3.0F, 448.0F, false), 3.0F / 448.0F);
  EXPECT_EQ(tile_scale(448.0F, 448.0F, true), 1.0F);
  EXPECT_EQ(tile_scale(std::nextafterf(448.0F, 500.0F), 448.0F, true), 2.0F);
  EXPECT_EQ(tile_scale(std::nextafterf(448.0F, 0.0F), 448.0F, true), 1.0F);
  EXPECT_EQ(tile_scale(225.0F, 448.0F, true), 1.0F);
  EXPECT_EQ(tile_scale(0.0F, 448.0F, false), 1e-4F / 448.0F);  // the floor
  EXPECT_EQ(tile_scale(0.0F, 448.0F, true), 0x1p-22F);
  EXPECT_TRUE(std::isnan(tile_scale(std::nanf(""), 448.0F, true)));
}

TEST(Fp8Test, AnOutlierCoarsensItsOwnTileOnly) {
  const auto cpu = make_cpu_kernels();
  std::vector<float> x = spread_values(256, 7);
  const std::vector<float> before = rounded(*cpu, RowFormat::kE4m3, 1, 256, x);
  x[3] = 1e9F;
  const std::vector<float> after = rounded(*cpu, RowFormat::kE4m3, 1, 256, x);
  EXPECT_TRUE(std::equal(before.begin() + 128, before.end(), after.begin() + 128));
  EXPECT_EQ(after[4], 0.0F);
}

TEST(Fp8Test, RoundingAgainWithAPowerOfTwoScaleChangesNothing) {
  const auto cpu = make_cpu_kernels();
  for (const RowFormat format : {RowFormat::kE4m3PowerOfTwo, RowFormat::kE5m6PowerOfTwo}) {
    const auto once = rounded(*cpu, format, 50, 200, spread_values(50 * 200, 8));
    EXPECT_TRUE(same_bits(rounded(*cpu, format, 50, 200, once), once));
  }
}

TEST(Fp8Test, NanAndInfinityMakeTheirTileNan) {
  const auto cpu = make_cpu_kernels();
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    for (const RowFormat format : kTiledFormats) {
      std::vector<float> x(200, 1.0F);
      x[150] = bad;
      x = rounded(*cpu, format, 1, 200, x);
      for (size_t i = 0; i < x.size(); ++i) ASSERT_EQ(std::isnan(x[i]), i >= 128) << i;
    }
  }
}

class Fp8AccumulatorTest : public testing::TestWithParam<Fp8Accumulator> {};
INSTANTIATE_TEST_SUITE_P(Both, Fp8AccumulatorTest,
                         testing::Values(Fp8Accumulator::kFp32, Fp8Accumulator::kHopper),
                         [](const auto& accumulator) {
                           return accumulator.param == Fp8Accumulator::kFp32 ? "fp32" : "hopper";
                         });

TEST_P(Fp8AccumulatorTest, EveryPassGivesTheReferencesBitsOnRaggedShapesAndGroups) {
  const std::vector<std::vector<int64_t>> offsets = {{0, 1}, {0, 130}, {2, 2, 40, 300, 300, 301}};
  on_each_instruction_set([&](const std::string& name) {
    if (name.starts_with("SCALAR")) return;  // it has no fused multiply-add
    const auto reference = make_reference_kernels(GetParam());
    const auto cpu = make_cpu_kernels(GetParam());
    for (const auto& [out, in] : {std::pair{1, 1}, {7, 130}, {128, 128}, {200, 33}, {129, 260}}) {
      for (const auto& groups : offsets) {
        for (const Store store : {Store::kOverwrite, Store::kAccumulate}) {
          Layer layer(out, in, groups);
          layer.dy_format =
              store == Store::kAccumulate ? RowFormat::kE4m3PowerOfTwo : RowFormat::kE4m3;
          const Layer::Results ours = layer.run(*cpu, store);
          const Layer::Results right = layer.run(*reference, store);
          ASSERT_TRUE(same_bits(ours.y, right.y)) << name << out << "x" << in;
          ASSERT_TRUE(same_bits(ours.dx, right.dx)) << name << out << "x" << in;
          ASSERT_TRUE(same_bits(ours.dweight, right.dweight)) << name << out << "x" << in;
        }
      }
    }
  });
}

TEST(Fp8Test, WeightGradientsRoundWhatWasKeptBeforeTheyRoundColumns) {
  const auto reference = make_reference_kernels();
  const auto cpu = make_cpu_kernels();
  std::vector<std::vector<float>> results;
  for (const RowFormat format : {RowFormat::kFp32, RowFormat::kE4m3, RowFormat::kE4m3PowerOfTwo,
                                 RowFormat::kE5m6PowerOfTwo}) {
    Layer layer(40, 150, {0, 140});
    std::vector<float> ours(40 * 150), right(40 * 150);
    std::vector<float> workspace(static_cast<size_t>(cpu->fp8_workspace_floats(40, 150)));
    cpu->fp8_linear_weight_gradient(layer.shape(), RowFormat::kE4m3, layer.dy(), format, layer.x(),
                                    ours.data(), workspace.data());
    reference->fp8_linear_weight_gradient(layer.shape(), RowFormat::kE4m3, layer.dy(), format,
                                          layer.x(), right.data(), nullptr);
    EXPECT_TRUE(same_bits(ours, right)) << static_cast<int>(format);
    for (const auto& other : results) EXPECT_NE(ours, other) << static_cast<int>(format);
    results.push_back(ours);
  }
}

// The bound that kernels.h gives for one interval, plus the rounding of each promotion.
TEST(Fp8Test, SumsStayWithinTheirErrorBoundOfExactArithmetic) {
  constexpr int64_t kOut = 20, kIn = 30, kRows = 500;
  const auto cpu = make_cpu_kernels();
  const std::vector<float> dy = spread_values(kRows * kOut, 1);
  const std::vector<float> x = spread_values(kRows * kIn, 2);
  const int64_t offsets[] = {0, kRows};
  std::vector<float> dweight(kOut * kIn);
  std::vector<float> workspace(static_cast<size_t>(cpu->fp8_workspace_floats(kOut, kIn)));
  cpu->fp8_linear_weight_gradient({kOut, kIn, 1, offsets, 0}, RowFormat::kFp32, {dy.data(), kOut},
                                  RowFormat::kFp32, {x.data(), kIn}, dweight.data(),
                                  workspace.data());
  const auto a = reference::quantize(kRows, kOut, {dy.data(), kOut}, kTileWidth, 1, false);
  const auto b = reference::quantize(kRows, kIn, {x.data(), kIn}, kTileWidth, 1, false);
  const double unit = 0x1p-24;
  const double interval_bound = 127 * unit / (1 - 127 * unit);
  double worst_share = 0;
  for (int64_t i = 0; i < kOut; ++i) {
    for (int64_t j = 0; j < kIn; ++j) {
      double exact = 0, magnitude = 0;
      for (int64_t p = 0; p < kRows; ++p) {
        const double term = static_cast<double>(a.code(p, i)) * b.code(p, j) * a.scale(p, i) *
                            static_cast<double>(b.scale(p, j));
        exact += term;
        magnitude += std::abs(term);
      }
      // Four promotions: the product of the scales, and a fused multiply-add each.
      const double bound = (interval_bound + 6 * unit) * magnitude;
      const double error = std::abs(dweight[i * kIn + j] - exact);
      ASSERT_LE(error, bound) << i << " " << j;
      worst_share = std::max(worst_share, error / bound);
    }
  }
  EXPECT_GT(worst_share, 1e-3);  // the bound is not vacuous
}

// What was there before keeps a sign, 8 exponent and 13 fraction bits and the rest is cut off.
TEST(HopperTest, TheSumIsCutTo13FractionBits) {
  const float zero = 0;
  EXPECT_EQ(reference::hopper_sum(1 + 0x1p-13F, 1, &zero), 1 + 0x1p-13F);
  EXPECT_EQ(reference::hopper_sum(1 + 0x1p-14F, 1, &zero), 1.0F);
  EXPECT_EQ(reference::hopper_sum(1 + 0x1.8p-13F, 1, &zero), 1 + 0x1p-13F);
}

TEST(HopperTest, ProductsLoseWhatIsFarBelowTheLargest) {
  const float up[] = {1.0F, 0x1p-14F, 0x1p-14F, 0x1p-13F};
  EXPECT_EQ(reference::hopper_sum(0, 4, up), 1 + 0x1p-13F);
  const float down[] = {1.0F, -0x1p-14F};  // sign-fill: the shift of a negative number goes down
  EXPECT_EQ(reference::hopper_sum(0, 2, down), 1 - 0x1p-13F);
  const float alone[] = {0x1p-14F, 0x1p-14F};
  EXPECT_EQ(reference::hopper_sum(0, 2, alone), 0x1p-13F);
}

// DeepSeek-V3's report: up to 2% off with K = 4096 and no promotion.
TEST(HopperTest, PromotionKeepsTheErrorOfALongSumSmall) {
  constexpr int64_t kDepth = 4096, kSums = 200;
  double worst = 0, worst_promoted = 0;
  for (uint64_t seed = 0; seed < kSums; ++seed) {
    std::vector<float> products = random_values(kDepth, 2 * seed);
    const std::vector<float> right = random_values(kDepth, 2 * seed + 1);
    double exact = 0, promoted = 0;
    float sum = 0, interval = 0;
    for (int64_t p = 0; p < kDepth; ++p) {
      products[p] = std::abs(E4m3::round(products[p]) * E4m3::round(right[p]));
      exact += products[p];
    }
    for (int64_t p = 0; p < kDepth; p += reference::kHopperProducts) {
      if (p % kTileWidth == 0) {
        promoted += interval;
        interval = 0;
      }
      sum = reference::hopper_sum(sum, reference::kHopperProducts, &products[p]);
      interval = reference::hopper_sum(interval, reference::kHopperProducts, &products[p]);
    }
    worst = std::max(worst, std::abs(sum - exact) / exact);
    worst_promoted = std::max(worst_promoted, std::abs(promoted + interval - exact) / exact);
  }
  EXPECT_GT(worst, 0.001);
  EXPECT_LT(worst, 0.02);
  EXPECT_LT(worst_promoted, worst / 10);
}

TEST(HopperTest, NanShowsInItsRowOnly) {
  const auto cpu = make_cpu_kernels(Fp8Accumulator::kHopper);
  const int64_t offsets[] = {0, 3};
  std::vector<float> x(3 * 40, 1.0F), weight(20 * 40, 0.5F), y(3 * 20);
  x[45] = std::nanf("");
  std::vector<float> workspace(static_cast<size_t>(cpu->fp8_workspace_floats(20, 40)));
  cpu->fp8_linear({20, 40, 1, offsets, 0}, RowFormat::kE4m3, {x.data(), 40}, weight.data(),
                  Store::kOverwrite, {y.data(), 20}, workspace.data());
  for (int64_t i = 0; i < 60; ++i) EXPECT_EQ(std::isnan(y[i]), i / 20 == 1) << i;
}

TEST(Fp8Test, ARowHasTheSameBitsAloneAsInABatch) {
  const auto cpu = make_cpu_kernels();
  constexpr int64_t kOut = 70, kIn = 150, kRows = 300;
  const Layer together(kOut, kIn, {0, kRows});
  const Layer::Results all = together.run(*cpu, Store::kOverwrite);
  std::vector<float> workspace(static_cast<size_t>(cpu->fp8_workspace_floats(kOut, kIn)));
  for (const int64_t i : {0, 127, 128, 255, 256, 299}) {
    const int64_t offsets[] = {i, i + 1};
    const LinearShape one = {kOut, kIn, 1, offsets, 0};
    std::vector<float> y(all.y.size()), dx(all.dx.size());
    cpu->fp8_linear(one, RowFormat::kE4m3, together.x(), together.weight(), Store::kOverwrite,
                    {y.data(), kOut + 3}, workspace.data());
    cpu->fp8_linear_input_gradient(one, RowFormat::kE4m3, together.dy(), together.weight(),
                                   Store::kOverwrite, {dx.data(), kIn + 3}, workspace.data());
    EXPECT_EQ(0, std::memcmp(&y[i * (kOut + 3)], &all.y[i * (kOut + 3)], kOut * sizeof(float)));
    EXPECT_EQ(0, std::memcmp(&dx[i * (kIn + 3)], &all.dx[i * (kIn + 3)], kIn * sizeof(float)));
  }
}

TEST(Fp8Test, OutputsAreBf16) {
  const auto cpu = make_cpu_kernels();
  const Layer layer(40, 50, {0, 20});
  for (const float value : layer.run(*cpu, Store::kOverwrite).y) {
    ASSERT_TRUE(value == round_to_bf16(value) || value == StridedRows::kMarker) << value;
  }
}

// The relative error of a product of random matrices: 2^-4 per operand at most, averaged out.
TEST(Fp8Test, ALinearLayerIsCloseToItsFp32Result) {
  const auto cpu = make_cpu_kernels();
  const Layer layer(64, 256, {0, 64});
  const Layer::Results results = layer.run(*cpu, Store::kOverwrite);
  std::vector<float> exact(64 * 67);
  cpu->matmul(64, 64, 256, layer.x(), Transpose::kNo, {layer.weight(), 256}, Transpose::kYes,
              Store::kOverwrite, {exact.data(), 67});
  double error = 0, total = 0;
  for (int64_t i = 0; i < 64 * 67; ++i) {
    if (i % 67 >= 64) continue;
    error += std::pow(results.y[i] - exact[i], 2);
    total += std::pow(exact[i], 2);
  }
  const double relative = std::sqrt(error / total);
  EXPECT_LT(relative, 0.05);
  EXPECT_GT(relative, 0.005);
}

TEST(Fp8DeathTest, AFormatThatNoTensorCoreMultipliesIsRefused) {
  const auto cpu = make_cpu_kernels();
  Layer layer(4, 4, {0, 1});
  layer.x_format = RowFormat::kE5m6PowerOfTwo;
  EXPECT_DEATH(layer.run(*cpu, Store::kOverwrite), "format");
}

}  // namespace
}  // namespace penstock
