#include <limits>

#include "tests/kernels/support.h"

namespace penstock {
namespace {

// Every row and vector operation once, over widths with and without tails.
std::vector<float> run_all(Kernels& kernels, int64_t rows, int64_t width) {
  std::vector<float> all;
  const auto keep = [&](const std::vector<float>& v) { all.insert(all.end(), v.begin(), v.end()); };
  StridedRows x(rows, width, width + 3, 1);
  const auto weights = random_values(rows, 2);
  std::vector<int32_t> index;
  for (int64_t i = 0; i < rows; ++i) index.push_back(static_cast<int32_t>(i * 7 % rows / 2));
  for (const float* w : {static_cast<const float*>(nullptr), weights.data()}) {
    StridedRows y(rows, width, width + 1, 3);
    kernels.gather_rows(rows, width, rows, x.matrix(), index.data(), w, y.matrix());
    EXPECT_TRUE(y.gaps_untouched());
    keep(y.data());
    StridedRows z(rows, width, width + 1, 4);
    kernels.scatter_add_rows(rows, width, rows, x.matrix(), index.data(), w, z.matrix());
    EXPECT_TRUE(z.gaps_untouched());
    keep(z.data());
  }
  StridedRows y(rows, width, width + 1, 5);
  kernels.accumulate_rows(rows, width, x.matrix(), y.matrix());
  EXPECT_TRUE(y.gaps_untouched());
  keep(y.data());
  kernels.copy_rows(rows, width, x.matrix(), y.matrix());
  EXPECT_TRUE(y.gaps_untouched());
  keep(y.data());
  const int64_t count = rows * width;
  auto a = random_values(count, 6);
  const auto b = random_values(count, 7);
  kernels.add(count, a.data(), b.data(), a.data());
  kernels.accumulate(count, b.data(), a.data());
  kernels.scale(count, -0.3F, a.data());
  keep(a);
  std::vector<float> filled(static_cast<size_t>(count));
  kernels.fill(count, 2.5F, filled.data());
  keep(filled);
  return all;
}

TEST(RowsTest, CpuAgreesWithReferenceOnEveryInstructionSet) {
  const auto reference = make_reference_kernels();
  on_each_instruction_set([&](const std::string& name) {
    const auto cpu = make_cpu_kernels();
    for (const int64_t rows : {1, 2, 9}) {
      for (const int64_t width : {1, 3, 16, 21, 64, 100}) {
        expect_close(run_all(*cpu, rows, width), run_all(*reference, rows, width), 1e-5, name);
      }
    }
  });
}

TEST(RowsTest, NoRowsIsNoWork) {
  for (const bool fast : {false, true}) {
    const auto kernels = fast ? make_cpu_kernels() : make_reference_kernels();
    kernels->gather_rows(0, 4, 0, {}, nullptr, nullptr, {});
    kernels->scatter_add_rows(0, 4, 0, {}, nullptr, nullptr, {});
    EXPECT_EQ(kernels->sum_of_squares(0, nullptr), 0.0);
  }
}

TEST(RowsTest, ScatteringTheGatheredRowsReturnsEachTokensWeightSum) {
  const auto cpu = make_cpu_kernels();
  const std::vector<float> x = {1, 10, 2, 20};   // 2 tokens
  const std::vector<int32_t> token = {1, 0, 1};  // 3 expert rows
  const std::vector<float> weights = {0.25F, 1.0F, 0.5F};
  std::vector<float> gathered(6), y(4, 0.0F);
  cpu->gather_rows(3, 2, 2, {x.data(), 2}, token.data(), nullptr, {gathered.data(), 2});
  cpu->scatter_add_rows(3, 2, 2, {gathered.data(), 2}, token.data(), weights.data(), {y.data(), 2});
  EXPECT_EQ(y, (std::vector<float>{1, 10, 1.5F, 15}));
}

TEST(EmbeddingTest, LooksRowsUpAndAddsTheirGradientsUp) {
  for (const bool fast : {false, true}) {
    const auto kernels = fast ? make_cpu_kernels() : make_reference_kernels();
    const auto table = random_values(5 * 19, 1);
    const std::vector<int32_t> ids = {4, 0, 4};
    std::vector<float> y(3 * 19), d_table(5 * 19, 1.0F);
    kernels->embedding(3, 5, 19, ids.data(), table.data(), {y.data(), 19});
    kernels->embedding_backward(3, 5, 19, ids.data(), {y.data(), 19}, d_table.data());
    for (int64_t j = 0; j < 19; ++j) {
      EXPECT_EQ(y[j], table[4 * 19 + j]);
      EXPECT_EQ(y[19 + j], table[j]);
      EXPECT_FLOAT_EQ(d_table[j], 1.0F + table[j]);
      EXPECT_EQ(d_table[19 + j], 1.0F);
      EXPECT_NEAR(d_table[4 * 19 + j], 1.0F + 2 * table[4 * 19 + j], 1e-5F);
    }
  }
}

TEST(EmbeddingDeathTest, ATokenOutsideTheVocabularyIsRefused) {
  for (const int32_t id : {-1, 5}) {
    const auto cpu = make_cpu_kernels();
    const float table[10] = {};
    float y[2];
    EXPECT_DEATH(cpu->embedding(1, 5, 2, &id, table, {y, 2}), "row index");
  }
}

TEST(SumOfSquaresTest, IsAccurateToDoubleForLongVectorsOnEveryInstructionSet) {
  const auto reference = make_reference_kernels();
  on_each_instruction_set([&](const std::string& name) {
    const auto cpu = make_cpu_kernels();
    for (const int64_t count : {1, 31, 32, 33, 100000}) {
      const auto x = random_values(count, 1);
      const double expected = reference->sum_of_squares(count, x.data());
      EXPECT_NEAR(cpu->sum_of_squares(count, x.data()), expected, 1e-12 * expected) << name;
    }
  });
}

TEST(SumOfSquaresTest, LargeGradientsDoNotOverflowAndNanShows) {
  const auto cpu = make_cpu_kernels();
  std::vector<float> x(40, 1e30F);
  EXPECT_NEAR(cpu->sum_of_squares(40, x.data()), 40e60, 1e55);
  for (const size_t place : {size_t{0}, size_t{39}}) {
    auto damaged = x;
    damaged[place] = std::nanf("");
    EXPECT_TRUE(std::isnan(cpu->sum_of_squares(40, damaged.data())));
  }
}

// ---- adamw -------------------------------------------------------------------------------------

struct AdamwVectors {
  std::vector<float> parameter, moment1, moment2;
  bool operator==(const AdamwVectors&) const = default;
};

AdamwVectors start(int64_t count) {
  AdamwVectors s = {random_values(count, 1), random_values(count, 2, 0.1),
                    random_values(count, 3, 0.1)};
  for (float& v : s.moment2) v = v * v;
  return s;
}

constexpr AdamwStep kStep = {.lr = 1e-3F,
                             .beta1 = 0.9F,
                             .beta2 = 0.95F,
                             .eps = 1e-8F,
                             .weight_decay = 0.1F,
                             .bias_correction1 = 0.271F,
                             .bias_correction2 = 0.142625F,
                             .gradient_scale = 0.5F};

AdamwVectors update(Kernels& kernels, const AdamwStep& step, const std::vector<float>& gradient,
                    const AdamwVectors& s) {
  AdamwVectors next = s;
  for (std::vector<float>* v : {&next.parameter, &next.moment1, &next.moment2}) {
    std::fill(v->begin(), v->end(), 7.0F);
  }
  kernels.adamw(static_cast<int64_t>(gradient.size()), step, gradient.data(),
                {s.parameter.data(), s.moment1.data(), s.moment2.data()},
                {next.parameter.data(), next.moment1.data(), next.moment2.data()});
  return next;
}

TEST(AdamwTest, CpuAgreesWithReferenceOnEveryInstructionSet) {
  const auto reference = make_reference_kernels();
  on_each_instruction_set([&](const std::string& name) {
    const auto cpu = make_cpu_kernels();
    for (const int64_t count : {1, 15, 16, 100}) {
      const auto gradient = random_values(count, 9);
      const AdamwVectors a = update(*cpu, kStep, gradient, start(count));
      const AdamwVectors b = update(*reference, kStep, gradient, start(count));
      expect_close(a.parameter, b.parameter, 1e-6, name);
      expect_close(a.moment1, b.moment1, 1e-6, name);
      expect_close(a.moment2, b.moment2, 1e-6, name);
    }
  });
}

TEST(AdamwTest, InPlaceGivesTheSameBitsAsIntoTheOtherGeneration) {
  const auto cpu = make_cpu_kernels();
  const auto gradient = random_values(37, 9);
  const AdamwVectors apart = update(*cpu, kStep, gradient, start(37));
  AdamwVectors s = start(37);
  cpu->adamw(37, kStep, gradient.data(), {s.parameter.data(), s.moment1.data(), s.moment2.data()},
             {s.parameter.data(), s.moment1.data(), s.moment2.data()});
  EXPECT_EQ(s, apart);
}

TEST(AdamwTest, TheFirstStepMovesByTheLearningRateAgainstTheGradient) {
  // With zero moments m-hat / sqrt(v-hat) is the gradient's sign, whatever its size.
  AdamwStep step = {.lr = 0.01F};
  step.bias_correction1 = 1 - step.beta1;
  step.bias_correction2 = 1 - step.beta2;
  for (const bool fast : {false, true}) {
    const auto kernels = fast ? make_cpu_kernels() : make_reference_kernels();
    const AdamwVectors zero = {{1, 1}, {0, 0}, {0, 0}};
    const AdamwVectors next = update(*kernels, step, {5.0F, -0.001F}, zero);
    EXPECT_NEAR(next.parameter[0], 0.99F, 1e-5F);
    EXPECT_NEAR(next.parameter[1], 1.01F, 1e-5F);
  }
}

TEST(AdamwTest, WeightDecayIsDecoupledFromTheGradient) {
  AdamwStep step = {.lr = 0.1F};
  step.weight_decay = 0.5F;
  for (const bool fast : {false, true}) {
    const auto kernels = fast ? make_cpu_kernels() : make_reference_kernels();
    const AdamwVectors next = update(*kernels, step, {0.0F}, {{2.0F}, {0.0F}, {0.0F}});
    EXPECT_FLOAT_EQ(next.parameter[0], 2.0F - 0.1F * 0.5F * 2.0F);
    EXPECT_EQ(next.moment1[0], 0.0F);
  }
}

TEST(AdamwTest, ClippingScalesTheGradientBeforeTheMoments) {
  AdamwStep step = kStep;
  step.gradient_scale = 0.25F;
  const auto cpu = make_cpu_kernels();
  auto gradient = random_values(20, 9);
  const AdamwVectors scaled = update(*cpu, step, gradient, start(20));
  for (float& g : gradient) g *= 0.25F;
  step.gradient_scale = 1.0F;
  EXPECT_EQ(update(*cpu, step, gradient, start(20)), scaled);
}

TEST(AdamwTest, ANanGradientMakesItsParameterNanAndNoOther) {
  const auto cpu = make_cpu_kernels();
  auto gradient = random_values(20, 9);
  gradient[3] = std::nanf("");
  const AdamwVectors next = update(*cpu, kStep, gradient, start(20));
  for (size_t i = 0; i < 20; ++i) EXPECT_EQ(std::isnan(next.parameter[i]), i == 3) << i;
}

}  // namespace
}  // namespace penstock
