#include "kernels/reference/layer_reference.h"

#include <algorithm>
#include <numeric>

#include "tests/kernels/support.h"

namespace penstock {
namespace {

using reference::HeadsView;
using reference::MatrixView;
using Doubles = std::vector<double>;

MatrixView<const double> in(const Doubles& x, int64_t stride) {
  return {x.data(), stride};
}
MatrixView<double> out(Doubles& x, int64_t stride) {
  return {x.data(), stride};
}

// ---- rms_norm ----------------------------------------------------------------------------------

struct NormResult {
  std::vector<float> y, inv_rms, dx, dweight;
  bool operator==(const NormResult&) const = default;
};

NormResult run_norm(Kernels& kernels, int64_t rows, int64_t width, Store store) {
  StridedRows x(rows, width, width + 5, 1);  // a slice of a wider row
  const auto weight = random_values(width, 2);
  const auto dy = random_values(rows * width, 3);
  NormResult r;
  r.y.resize(static_cast<size_t>(rows * width));
  r.inv_rms.resize(static_cast<size_t>(rows));
  r.dx = random_values(rows * width, 4);
  r.dweight = random_values(width, 5);
  kernels.rms_norm(rows, width, x.matrix(), weight.data(), 1e-6F, {r.y.data(), width},
                   r.inv_rms.data());
  kernels.rms_norm_backward(rows, width, x.matrix(), weight.data(), r.inv_rms.data(),
                            {dy.data(), width}, store, {r.dx.data(), width}, r.dweight.data());
  return r;
}

TEST(RmsNormTest, CpuAgreesWithReferenceOnEveryInstructionSet) {
  const auto reference = make_reference_kernels();
  on_each_instruction_set([&](const std::string& name) {
    const auto cpu = make_cpu_kernels();
    for (const int64_t width : {1, 3, 16, 31, 32, 33, 129, 256}) {
      for (const int64_t rows : {0, 1, 6}) {
        for (const Store store : {Store::kOverwrite, Store::kAccumulate}) {
          const NormResult a = run_norm(*cpu, rows, width, store);
          const NormResult b = run_norm(*reference, rows, width, store);
          expect_close(a.y, b.y, 1e-5, name);
          expect_close(a.inv_rms, b.inv_rms, 1e-5, name);
          expect_close(a.dx, b.dx, 2e-5, name);
          expect_close(a.dweight, b.dweight, 2e-5, name);
        }
      }
    }
  });
}

TEST(RmsNormTest, GradientsAreTheFiniteDifferences) {
  constexpr int64_t kRows = 3, kWidth = 7;
  const Doubles x = random_values<double>(kRows * kWidth, 1);
  const Doubles weight = random_values<double>(kWidth, 2);
  const Doubles dy = random_values<double>(kRows * kWidth, 3);
  const auto loss = [&](const Doubles& at, const Doubles& scale) {
    Doubles y(at.size()), inv_rms(kRows);
    reference::rms_norm<double>(kRows, kWidth, in(at, kWidth), scale.data(), 1e-3, out(y, kWidth),
                                inv_rms.data());
    return dot(y, dy);
  };
  Doubles y(x.size()), inv_rms(kRows), dx(x.size()), dweight(kWidth);
  reference::rms_norm<double>(kRows, kWidth, in(x, kWidth), weight.data(), 1e-3, out(y, kWidth),
                              inv_rms.data());
  reference::rms_norm_backward<double>(kRows, kWidth, in(x, kWidth), weight.data(), inv_rms.data(),
                                       in(dy, kWidth), Store::kOverwrite, out(dx, kWidth),
                                       dweight.data());
  expect_gradient(
      x, dx, [&](const Doubles& at) { return loss(at, weight); }, "dx");
  expect_gradient(
      weight, dweight, [&](const Doubles& at) { return loss(x, at); }, "dweight");
}

TEST(RmsNormTest, InputAndWeightGradientsMayBeTakenApart) {
  for (const bool fast : {false, true}) {
    const auto kernels = fast ? make_cpu_kernels() : make_reference_kernels();
    constexpr int64_t kRows = 4, kWidth = 20;
    const auto x = random_values(kRows * kWidth, 1);
    const auto weight = random_values(kWidth, 2);
    const auto dy = random_values(kRows * kWidth, 3);
    const std::vector<float> inv_rms = {0.5F, 1.5F, 0.75F, 2.0F};
    const auto backward = [&](float* dx, float* dweight) {
      kernels->rms_norm_backward(kRows, kWidth, {x.data(), kWidth}, weight.data(), inv_rms.data(),
                                 {dy.data(), kWidth}, Store::kOverwrite, {dx, kWidth}, dweight);
    };
    std::vector<float> dx_both(kRows * kWidth), dw_both(kWidth), dx(kRows * kWidth), dw(kWidth);
    backward(dx_both.data(), dw_both.data());
    backward(dx.data(), nullptr);
    backward(nullptr, dw.data());
    EXPECT_EQ(dx, dx_both);
    EXPECT_EQ(dw, dw_both);
  }
}

TEST(RmsNormTest, InputGradientMayReplaceTheOutputGradient) {
  const auto cpu = make_cpu_kernels();
  constexpr int64_t kWidth = 37;
  const auto x = random_values(kWidth, 1);
  const auto weight = random_values(kWidth, 2);
  auto dy = random_values(kWidth, 3);
  const float inv_rms = 0.9F;
  std::vector<float> dx(kWidth);
  cpu->rms_norm_backward(1, kWidth, {x.data(), kWidth}, weight.data(), &inv_rms,
                         {dy.data(), kWidth}, Store::kOverwrite, {dx.data(), kWidth}, nullptr);
  cpu->rms_norm_backward(1, kWidth, {x.data(), kWidth}, weight.data(), &inv_rms,
                         {dy.data(), kWidth}, Store::kOverwrite, {dy.data(), kWidth}, nullptr);
  EXPECT_EQ(dy, dx);
}

// ---- rope --------------------------------------------------------------------------------------

std::vector<float> run_rope(Kernels& kernels, int64_t dim, int64_t heads, bool inverse,
                            std::vector<float> x) {
  constexpr int64_t kSequence = 5, kTokens = 10;
  std::vector<float> cosine(kSequence * dim / 2), sine(kSequence * dim / 2);
  make_rope_tables(kSequence, dim, 10000.0, cosine.data(), sine.data());
  // Head slices of dim + 3 floats, the rotated part last, as in [nope | rope].
  kernels.rope(kTokens, kSequence, heads, dim, cosine.data(), sine.data(), inverse,
               {x.data() + 3, heads * (dim + 3), dim + 3});
  return x;
}

TEST(RopeTest, CpuAgreesWithReferenceAndTouchesOnlyItsSliceOnEveryInstructionSet) {
  const auto reference = make_reference_kernels();
  on_each_instruction_set([&](const std::string& name) {
    const auto cpu = make_cpu_kernels();
    for (const int64_t dim : {2, 4, 6, 16, 22, 64}) {
      for (const bool inverse : {false, true}) {
        const auto x = random_values(10 * 3 * (dim + 3), 7);
        const auto actual = run_rope(*cpu, dim, 3, inverse, x);
        expect_close(actual, run_rope(*reference, dim, 3, inverse, x), 1e-6, name);
        for (size_t i = 0; i < x.size(); ++i) {
          const bool outside = static_cast<int64_t>(i) % (dim + 3) < 3;
          ASSERT_TRUE(!outside || actual[i] == x[i]) << name << i;
        }
      }
    }
  });
}

TEST(RopeTest, InverseUndoesForward) {
  for (const bool fast : {false, true}) {
    const auto kernels = fast ? make_cpu_kernels() : make_reference_kernels();
    const auto x = random_values(10 * 19, 8);
    const auto there = run_rope(*kernels, 16, 1, false, x);
    EXPECT_NE(there, x);
    expect_close(run_rope(*kernels, 16, 1, true, there), x, 1e-6);
  }
}

TEST(RopeTest, ScoresDependOnDistanceAlone) {
  constexpr int64_t kDim = 8, kPositions = 12;
  std::vector<float> cosine(kPositions * kDim / 2), sine(kPositions * kDim / 2);
  make_rope_tables(kPositions, kDim, 10000.0, cosine.data(), sine.data());
  const auto cpu = make_cpu_kernels();
  const auto q = random_values(kDim, 1);
  const auto k = random_values(kDim, 2);
  std::vector<float> queries, keys;
  for (int64_t p = 0; p < kPositions; ++p) {
    queries.insert(queries.end(), q.begin(), q.end());
    keys.insert(keys.end(), k.begin(), k.end());
  }
  const auto rotate = [&](std::vector<float>& x) {
    cpu->rope(kPositions, kPositions, 1, kDim, cosine.data(), sine.data(), false,
              {x.data(), kDim, kDim});
  };
  rotate(queries);
  rotate(keys);
  const auto score = [&](int64_t i, int64_t j) {
    return std::inner_product(queries.begin() + i * kDim, queries.begin() + (i + 1) * kDim,
                              keys.begin() + j * kDim, 0.0);
  };
  EXPECT_NEAR(score(5, 2), score(9, 6), 1e-5);
  EXPECT_NEAR(score(0, 0), score(11, 11), 1e-5);
  EXPECT_GT(std::abs(score(5, 2) - score(5, 5)), 1e-3);
}

TEST(RopeTest, BackwardIsTheInverseRotation) {
  constexpr int64_t kTokens = 6, kSequence = 3, kDim = 4;
  std::vector<float> narrow_cosine(kSequence * kDim / 2), narrow_sine(kSequence * kDim / 2);
  make_rope_tables(kSequence, kDim, 100.0, narrow_cosine.data(), narrow_sine.data());
  const Doubles cosine(narrow_cosine.begin(), narrow_cosine.end());
  const Doubles sine(narrow_sine.begin(), narrow_sine.end());
  const Doubles x = random_values<double>(kTokens * kDim, 1);
  const Doubles dy = random_values<double>(kTokens * kDim, 2);
  const auto rotate = [&](Doubles at, bool inverse) {
    reference::rope<double>(kTokens, kSequence, 1, kDim, cosine.data(), sine.data(), inverse,
                            {at.data(), kDim, kDim});
    return at;
  };
  // The tables are rounded, so the rotation is orthogonal to 1e-7: its transpose, not its exact
  // inverse.
  expect_gradient(
      x, rotate(dy, true), [&](const Doubles& at) { return dot(rotate(at, false), dy); }, "dx");
}

TEST(RopeTest, TablesHoldTheAnglesOfTheFormula) {
  std::vector<float> cosine(3 * 2), sine(3 * 2);
  make_rope_tables(3, 4, 10000.0, cosine.data(), sine.data());
  EXPECT_EQ(cosine[0], 1.0F);
  EXPECT_EQ(sine[1], 0.0F);
  EXPECT_FLOAT_EQ(sine[2 * 2 + 0], std::sin(2.0F));
  EXPECT_FLOAT_EQ(sine[2 * 2 + 1], std::sin(0.02F));
}

// ---- swiglu ------------------------------------------------------------------------------------

TEST(SwigluTest, CpuAgreesWithReferenceOnHalvesOfOneBufferOnEveryInstructionSet) {
  const auto reference = make_reference_kernels();
  on_each_instruction_set([&](const std::string& name) {
    const auto cpu = make_cpu_kernels();
    for (const int64_t width : {1, 5, 16, 37, 64}) {
      constexpr int64_t kRows = 3;
      const auto both = random_values(kRows * 2 * width, 1, 5.0);
      const auto dy = random_values(kRows * width, 2);
      const auto run = [&](Kernels& kernels) {
        std::vector<float> result(kRows * width);
        const ConstMatrix gate = {both.data(), 2 * width};
        const ConstMatrix up = {both.data() + width, 2 * width};
        kernels.swiglu(kRows, width, gate, up, {result.data(), width});
        std::vector<float> d_both = both;  // in place
        kernels.swiglu_backward(kRows, width, {d_both.data(), 2 * width},
                                {d_both.data() + width, 2 * width}, {dy.data(), width},
                                {d_both.data(), 2 * width}, {d_both.data() + width, 2 * width});
        result.insert(result.end(), d_both.begin(), d_both.end());
        return result;
      };
      expect_close(run(*cpu), run(*reference), 2e-6, name);
    }
  });
}

TEST(SwigluTest, GradientsAreTheFiniteDifferences) {
  constexpr int64_t kRows = 2, kWidth = 5;
  const Doubles gate = random_values<double>(kRows * kWidth, 1, 2.0);
  const Doubles up = random_values<double>(kRows * kWidth, 2);
  const Doubles dy = random_values<double>(kRows * kWidth, 3);
  const auto loss = [&](const Doubles& g, const Doubles& u) {
    Doubles y(g.size());
    reference::swiglu<double>(kRows, kWidth, in(g, kWidth), in(u, kWidth), out(y, kWidth));
    return dot(y, dy);
  };
  Doubles d_gate(gate.size()), d_up(up.size());
  reference::swiglu_backward<double>(kRows, kWidth, in(gate, kWidth), in(up, kWidth),
                                     in(dy, kWidth), out(d_gate, kWidth), out(d_up, kWidth));
  expect_gradient(
      gate, d_gate, [&](const Doubles& at) { return loss(at, up); }, "gate");
  expect_gradient(
      up, d_up, [&](const Doubles& at) { return loss(gate, at); }, "up");
}

TEST(SwigluTest, BackwardWithItsByproductsIsTheSeparateOperationsBitForBit) {
  on_each_instruction_set([&](const std::string& name) {
    const auto cpu = make_cpu_kernels();
    for (const int64_t width : {1, 5, 16, 37, 96}) {
      constexpr int64_t kRows = 3;
      const auto gate = random_values(kRows * width, 1, 5.0);
      const auto up = random_values(kRows * width, 2);
      const auto dy = random_values(kRows * width, 3);
      const auto weights = random_values(kRows, 4);
      const std::vector<int32_t> order = {0, 1, 2};
      const auto matrix = [&](const std::vector<float>& v) { return ConstMatrix{v.data(), width}; };
      const auto output = [&](std::vector<float>& v) { return Matrix{v.data(), width}; };
      std::vector<float> y(gate.size()), d_gate(gate.size()), d_up(gate.size()), dots(kRows);
      cpu->swiglu_backward(kRows, width, matrix(gate), matrix(up), matrix(dy), output(d_gate),
                           output(d_up),
                           {.weights = weights.data(), .y = output(y), .dots = dots.data()});
      std::vector<float> h(gate.size()), expected(gate.size()), weighted(gate.size());
      std::vector<float> expected_gate(gate.size()), expected_up(gate.size());
      cpu->swiglu(kRows, width, matrix(gate), matrix(up), output(h));
      cpu->gather_rows(kRows, width, kRows, matrix(h), order.data(), weights.data(),
                       output(expected));
      cpu->gather_rows(kRows, width, kRows, matrix(dy), order.data(), weights.data(),
                       output(weighted));
      cpu->swiglu_backward(kRows, width, matrix(gate), matrix(up), matrix(weighted),
                           output(expected_gate), output(expected_up));
      EXPECT_EQ(y, expected) << name << ", width " << width;
      for (int64_t i = 0; i < kRows; ++i) {  // no operation of its own
        const double dot =
            std::inner_product(&dy[i * width], &dy[i * width] + width, &h[i * width], 0.0);
        EXPECT_NEAR(dots[i], dot, 1e-4) << name << ", width " << width;
      }
      EXPECT_EQ(d_gate, expected_gate) << name << ", width " << width;
      EXPECT_EQ(d_up, expected_up) << name << ", width " << width;
    }
  });
}

TEST(SwigluTest, ReferenceByproductsAreTheWeightedOutputAndItsGradient) {
  const auto reference = make_reference_kernels();
  const std::vector<float> gate = {0.5F, -1.0F}, up = {2.0F, 3.0F}, dy = {0.25F, -0.5F};
  const float weight = 4.0F;
  std::vector<float> h(2), y(2), d_gate(2), d_up(2);
  float dot = 0;
  reference->swiglu(1, 2, {gate.data(), 2}, {up.data(), 2}, {h.data(), 2});
  reference->swiglu_backward(1, 2, {gate.data(), 2}, {up.data(), 2}, {dy.data(), 2},
                             {d_gate.data(), 2}, {d_up.data(), 2},
                             {.weights = &weight, .y = {y.data(), 2}, .dots = &dot});
  EXPECT_FLOAT_EQ(y[0], weight * h[0]);
  EXPECT_FLOAT_EQ(y[1], weight * h[1]);
  EXPECT_NEAR(dot, dy[0] * h[0] + dy[1] * h[1], 1e-6F);
}

TEST(SwigluTest, ExtremeGatesSaturateAndNanStays) {
  const auto cpu = make_cpu_kernels();
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> gate = {-1000, -88, 0, 88, 1000, std::nanf(""), infinity};
  const std::vector<float> up(gate.size(), 1.0F);
  std::vector<float> y(gate.size());
  const int64_t width = static_cast<int64_t>(gate.size());
  cpu->swiglu(1, width, {gate.data(), width}, {up.data(), width}, {y.data(), width});
  EXPECT_EQ(y[0], 0.0F);
  EXPECT_NEAR(y[1], 0.0F, 1e-30F);
  EXPECT_EQ(y[2], 0.0F);
  EXPECT_EQ(y[3], 88.0F);
  EXPECT_EQ(y[4], 1000.0F);
  EXPECT_TRUE(std::isnan(y[5]));
  EXPECT_EQ(y[6], infinity);
}

}  // namespace
}  // namespace penstock
