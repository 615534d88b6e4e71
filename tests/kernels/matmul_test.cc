#include <gtest/gtest.h>
// After gtest, whose macros it uses.
#include <rapidcheck/gtest.h>

#include "tests/kernels/support.h"

namespace penstock {
namespace {

struct Product {
  int64_t m, n, k;
  Transpose transpose_a, transpose_b;
  Store store;
  float alpha;
  int64_t gap;  // floats between rows
};

std::vector<float> multiply(Kernels& kernels, const Product& p, bool* gaps_untouched = nullptr) {
  const bool ta = p.transpose_a == Transpose::kYes;
  const bool tb = p.transpose_b == Transpose::kYes;
  const auto rows_of = [&](int64_t rows, int64_t width, uint64_t seed) {
    return StridedRows(rows, width, width + p.gap, seed);
  };
  StridedRows a = rows_of(ta ? p.k : p.m, ta ? p.m : p.k, 1);
  StridedRows b = rows_of(tb ? p.n : p.k, tb ? p.k : p.n, 2);
  StridedRows c = rows_of(p.m, p.n, 3);
  kernels.matmul(p.m, p.n, p.k, a.matrix(), p.transpose_a, b.matrix(), p.transpose_b, p.store,
                 c.matrix(), p.alpha);
  if (gaps_untouched != nullptr) *gaps_untouched = c.gaps_untouched();
  return c.data();
}

TEST(MatmulTest, CpuAgreesWithReferenceOnEveryTransposeAndTailOnEveryInstructionSet) {
  const auto reference = make_reference_kernels();
  on_each_instruction_set([&](const std::string& name) {
    const auto cpu = make_cpu_kernels();
    for (const int64_t m : {1, 7, 13, 40}) {
      for (const int64_t n : {1, 5, 16, 31, 33, 70}) {
        for (const int64_t k : {1, 3, 17, 60}) {
          for (int bits = 0; bits < 4; ++bits) {
            const Product p = {m,
                               n,
                               k,
                               bits & 1 ? Transpose::kYes : Transpose::kNo,
                               bits & 2 ? Transpose::kYes : Transpose::kNo,
                               Store::kOverwrite,
                               1,
                               3};
            bool untouched = false;
            expect_close(multiply(*cpu, p, &untouched), multiply(*reference, p), 2e-5, name);
            ASSERT_TRUE(untouched) << name << m << "x" << n << "x" << k;
          }
        }
      }
    }
  });
}

RC_GTEST_PROP(MatmulTest, CpuAgreesWithReferenceOnRandomShapesStridesAndFactors, ()) {
  static const auto reference = make_reference_kernels();
  static const auto cpu = make_cpu_kernels();
  const auto flag = [] { return *rc::gen::arbitrary<bool>(); };
  const Product p = {*rc::gen::inRange<int64_t>(0, 90),
                     *rc::gen::inRange<int64_t>(0, 90),
                     *rc::gen::inRange<int64_t>(0, 90),
                     flag() ? Transpose::kYes : Transpose::kNo,
                     flag() ? Transpose::kYes : Transpose::kNo,
                     flag() ? Store::kAccumulate : Store::kOverwrite,
                     flag() ? 1.0F : 0.37F,
                     *rc::gen::inRange<int64_t>(1, 20)};
  expect_close(multiply(*cpu, p), multiply(*reference, p), 2e-5);
  RC_ASSERT(!::testing::Test::HasFatalFailure());
}

TEST(MatmulTest, BlocksBeyondTheCacheLimitsJoinWithoutASeam) {
  const auto reference = make_reference_kernels();
  const auto cpu = make_cpu_kernels();
  for (const Store store : {Store::kOverwrite, Store::kAccumulate}) {
    const Product p = {25, 1100, 600, Transpose::kNo, Transpose::kYes, store, 1, 0};
    expect_close(multiply(*cpu, p), multiply(*reference, p), 5e-5);
  }
}

TEST(MatmulTest, DepthZeroLeavesZerosOrWhatWasThere) {
  for (const auto& kernels : {make_reference_kernels().release(), make_cpu_kernels().release()}) {
    const std::unique_ptr<Kernels> owner(kernels);
    std::vector<float> c = {1, 2, 3, 4};
    const float unused = 0;
    owner->matmul(2, 2, 0, {&unused, 2}, Transpose::kNo, {&unused, 2}, Transpose::kNo,
                  Store::kAccumulate, {c.data(), 2});
    EXPECT_EQ(c, (std::vector<float>{1, 2, 3, 4}));
    owner->matmul(2, 2, 0, {&unused, 2}, Transpose::kNo, {&unused, 2}, Transpose::kNo,
                  Store::kOverwrite, {c.data(), 2});
    EXPECT_EQ(c, (std::vector<float>{0, 0, 0, 0}));
  }
}

// What makes a token's result independent of the tokens it shares a batch or a rank with.
TEST(MatmulTest, ARowHasTheSameBitsAloneAsInABatch) {
  const auto cpu = make_cpu_kernels();
  constexpr int64_t kRows = 45, kWidth = 50, kDepth = 300;
  const auto a = random_values(kRows * kDepth, 1);
  const auto b = random_values(kWidth * kDepth, 2);
  std::vector<float> together(kRows * kWidth);
  cpu->matmul(kRows, kWidth, kDepth, {a.data(), kDepth}, Transpose::kNo, {b.data(), kDepth},
              Transpose::kYes, Store::kOverwrite, {together.data(), kWidth});
  for (int64_t i = 0; i < kRows; ++i) {
    std::vector<float> alone(kWidth);
    cpu->matmul(1, kWidth, kDepth, {a.data() + i * kDepth, kDepth}, Transpose::kNo,
                {b.data(), kDepth}, Transpose::kYes, Store::kOverwrite, {alone.data(), kWidth});
    const std::vector<float> row(together.begin() + i * kWidth,
                                 together.begin() + (i + 1) * kWidth);
    ASSERT_EQ(alone, row) << i;
  }
}

TEST(MatmulTest, AlignmentOfTheOperandsDoesNotChangeTheBits) {
  const auto cpu = make_cpu_kernels();
  constexpr int64_t kSize = 37;
  const auto source = random_values(2 * kSize * kSize, 5);
  std::vector<std::vector<float>> results;
  for (int64_t shift = 0; shift < 3; ++shift) {
    std::vector<float> moved(source.size() + 8);
    std::copy(source.begin(), source.end(), moved.begin() + shift);
    std::vector<float> c(kSize * kSize);
    cpu->matmul(kSize, kSize, kSize, {moved.data() + shift, kSize}, Transpose::kNo,
                {moved.data() + shift + kSize * kSize, kSize}, Transpose::kYes, Store::kOverwrite,
                {c.data(), kSize});
    results.push_back(c);
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
}

TEST(MatmulTest, NanInOneRowStaysInThatRow) {
  const auto cpu = make_cpu_kernels();
  std::vector<float> a = random_values(4 * 8, 1);
  a[8] = std::nanf("");
  const auto b = random_values(8 * 5, 2);
  std::vector<float> c(4 * 5);
  cpu->matmul(4, 5, 8, {a.data(), 8}, Transpose::kNo, {b.data(), 5}, Transpose::kNo,
              Store::kOverwrite, {c.data(), 5});
  for (int64_t i = 0; i < 20; ++i) EXPECT_EQ(std::isnan(c[i]), i / 5 == 1) << i;
}

TEST(MatmulDeathTest, AStrideNarrowerThanTheRowIsRefused) {
  const auto cpu = make_cpu_kernels();
  float x[16] = {};
  EXPECT_DEATH(cpu->matmul(2, 2, 4, {x, 3}, Transpose::kNo, {x, 2}, Transpose::kNo,
                           Store::kOverwrite, {x, 2}),
               "a.stride");
}

// Groups of random sizes, empty ones among them, as offsets that do not start at 0.
std::vector<int64_t> random_offsets(int64_t group_count, int64_t start) {
  std::vector<int64_t> offsets = {start};
  for (int64_t g = 0; g < group_count; ++g) {
    const bool empty = *rc::gen::inRange(0, 3) == 0;
    offsets.push_back(offsets.back() + (empty ? 0 : *rc::gen::inRange<int64_t>(1, 30)));
  }
  return offsets;
}

RC_GTEST_PROP(GroupedMatmulTest, CpuAgreesWithReferenceWithEmptyGroups, ()) {
  static const auto reference = make_reference_kernels();
  static const auto cpu = make_cpu_kernels();
  const int64_t groups = *rc::gen::inRange<int64_t>(0, 6);
  const auto offsets = random_offsets(groups, *rc::gen::inRange<int64_t>(0, 4));
  const int64_t n = *rc::gen::inRange<int64_t>(1, 50);
  const int64_t k = *rc::gen::inRange<int64_t>(1, 50);
  const bool transposed = *rc::gen::arbitrary<bool>();
  const auto run = [&](Kernels& kernels) {
    const auto a = random_values(offsets.back() * k, 1);
    const auto b = random_values(groups * (n * k + 5), 2);
    auto c = random_values(offsets.back() * n, 3);
    kernels.grouped_matmul(
        groups, offsets.data(), n, k, {a.data(), k}, {b.data(), transposed ? k : n}, n * k + 5,
        transposed ? Transpose::kYes : Transpose::kNo, Store::kAccumulate, {c.data(), n});
    return c;
  };
  expect_close(run(*cpu), run(*reference), 2e-5);
  RC_ASSERT(!::testing::Test::HasFatalFailure());
}

RC_GTEST_PROP(GroupedMatmulTest, WeightGradientsAgreeAndEmptyGroupsKeepTheirs, ()) {
  static const auto reference = make_reference_kernels();
  static const auto cpu = make_cpu_kernels();
  const int64_t groups = *rc::gen::inRange<int64_t>(1, 6);
  const auto offsets = random_offsets(groups, *rc::gen::inRange<int64_t>(0, 4));
  const int64_t m = *rc::gen::inRange<int64_t>(1, 50);
  const int64_t n = *rc::gen::inRange<int64_t>(1, 50);
  const int64_t group_stride = m * n + 3;
  const auto before = random_values(groups * group_stride, 3);
  const auto run = [&](Kernels& kernels) {
    const auto a = random_values(offsets.back() * m, 1);
    const auto b = random_values(offsets.back() * n, 2);
    auto c = before;
    kernels.grouped_matmul_ragged_k(groups, offsets.data(), m, n, {a.data(), m}, {b.data(), n},
                                    {c.data(), n}, group_stride);
    return c;
  };
  const auto actual = run(*cpu);
  expect_close(actual, run(*reference), 2e-5);
  RC_ASSERT(!::testing::Test::HasFatalFailure());
  for (int64_t g = 0; g < groups; ++g) {
    const auto first = static_cast<size_t>(g * group_stride);
    const auto last =
        static_cast<size_t>(offsets[g] == offsets[g + 1] ? first + group_stride : first);
    for (size_t i = first; i < last; ++i) RC_ASSERT(actual[i] == before[i]);
  }
}

TEST(GroupedMatmulDeathTest, FallingOffsetsAreRefused) {
  const auto cpu = make_cpu_kernels();
  float x[64] = {};
  const int64_t offsets[] = {0, 3, 2};
  EXPECT_DEATH(cpu->grouped_matmul(2, offsets, 2, 2, {x, 2}, {x, 2}, 4, Transpose::kYes,
                                   Store::kOverwrite, {x, 2}),
               "offsets");
}

}  // namespace
}  // namespace penstock
