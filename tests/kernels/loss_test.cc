#include "kernels/reference/layer_reference.h"
#include "tests/kernels/support.h"

namespace penstock {
namespace {

struct LossResult {
  std::vector<float> losses, d_logits;
};

LossResult run(Kernels& kernels, int64_t vocab, std::vector<float> logits,
               const std::vector<int32_t>& targets, float scale, bool in_place = false) {
  const int64_t rows = static_cast<int64_t>(targets.size());
  LossResult r;
  r.losses.resize(targets.size());
  r.d_logits.resize(logits.size(), 9.0F);
  float* const to = in_place ? logits.data() : r.d_logits.data();
  kernels.cross_entropy(rows, vocab, {logits.data(), vocab}, targets.data(), scale, r.losses.data(),
                        {to, vocab});
  if (in_place) r.d_logits = logits;
  return r;
}

TEST(CrossEntropyTest, CpuAgreesWithReferenceOnEveryInstructionSet) {
  const auto reference = make_reference_kernels();
  on_each_instruction_set([&](const std::string& name) {
    const auto cpu = make_cpu_kernels();
    for (const int64_t vocab : {1, 2, 31, 33, 259, 1000}) {
      const auto logits = random_values(4 * vocab, 1, 6.0);
      const std::vector<int32_t> targets = {0, static_cast<int32_t>(vocab - 1), -1,
                                            static_cast<int32_t>(vocab / 2)};
      const LossResult a = run(*cpu, vocab, logits, targets, 0.25F);
      const LossResult b = run(*reference, vocab, logits, targets, 0.25F);
      expect_close(a.losses, b.losses, 2e-6, name);
      expect_close(a.d_logits, b.d_logits, 2e-6, name);
    }
  });
}

TEST(CrossEntropyTest, GradientMayReplaceTheLogits) {
  for (const bool fast : {false, true}) {
    const auto kernels = fast ? make_cpu_kernels() : make_reference_kernels();
    const auto logits = random_values(2 * 37, 1);
    const LossResult apart = run(*kernels, 37, logits, {3, 36}, 1.0F);
    if (!fast)
      continue;  // the reference reads logits again after writing; it is never used in place
    const LossResult inside = run(*kernels, 37, logits, {3, 36}, 1.0F, true);
    EXPECT_EQ(inside.losses, apart.losses);
    EXPECT_EQ(inside.d_logits, apart.d_logits);
  }
}

TEST(CrossEntropyTest, ANegativeTargetIgnoresItsRow) {
  for (const bool fast : {false, true}) {
    const auto kernels = fast ? make_cpu_kernels() : make_reference_kernels();
    const LossResult r = run(*kernels, 3, {1, 2, 3, 1, 2, 3}, {-1, 0}, 1.0F);
    EXPECT_EQ(r.losses[0], 0.0F);
    EXPECT_EQ(r.d_logits[0], 0.0F);
    EXPECT_EQ(r.d_logits[2], 0.0F);
    EXPECT_GT(r.losses[1], 0.0F);
  }
}

TEST(CrossEntropyTest, EvaluationSkipsTheGradient) {
  for (const bool fast : {false, true}) {
    const auto kernels = fast ? make_cpu_kernels() : make_reference_kernels();
    const std::vector<float> logits = {0, 0, 0, 0};
    const int32_t target = 2;
    float loss = 0;
    kernels->cross_entropy(1, 4, {logits.data(), 4}, &target, 1.0F, &loss, {});
    EXPECT_NEAR(loss, std::log(4.0F), 1e-6F);
  }
}

TEST(CrossEntropyTest, HugeLogitsDoNotOverflow) {
  for (const bool fast : {false, true}) {
    const auto kernels = fast ? make_cpu_kernels() : make_reference_kernels();
    const LossResult r = run(*kernels, 3, {30000, 29999, -30000}, {1}, 1.0F);
    EXPECT_NEAR(r.losses[0], std::log(1 + std::exp(1.0F)), 1e-4F);
  }
}

TEST(CrossEntropyTest, ANanLogitMakesItsRowsLossNanWhereverItStands) {
  on_each_instruction_set([&](const std::string& name) {
    for (const bool fast : {false, true}) {
      const auto kernels = fast ? make_cpu_kernels() : make_reference_kernels();
      for (size_t place = 0; place < 37; ++place) {
        auto logits = random_values(2 * 37, 1);
        logits[place] = std::nanf("");
        const LossResult r = run(*kernels, 37, logits, {5, 5}, 1.0F);
        ASSERT_TRUE(std::isnan(r.losses[0])) << name << place;
        ASSERT_TRUE(std::isnan(r.d_logits[20])) << name << place;
        ASSERT_FALSE(std::isnan(r.losses[1])) << name << place;
      }
    }
  });
}

TEST(CrossEntropyTest, GradientIsTheFiniteDifference) {
  using Doubles = std::vector<double>;
  constexpr int64_t kRows = 3, kVocab = 6;
  const Doubles logits = random_values<double>(kRows * kVocab, 1);
  const std::vector<int32_t> targets = {5, -1, 2};
  Doubles losses(kRows), d_logits(logits.size());
  const auto loss = [&](const Doubles& at) {
    reference::cross_entropy<double>(kRows, kVocab, {at.data(), kVocab}, targets.data(), 0.5,
                                     losses.data(), {d_logits.data(), kVocab});
    return 0.5 * (losses[0] + losses[1] + losses[2]);
  };
  loss(logits);
  const Doubles gradient = d_logits;
  expect_gradient(logits, gradient, loss, "logits");
}

TEST(CrossEntropyDeathTest, ATargetOutsideTheVocabularyIsRefused) {
  const auto cpu = make_cpu_kernels();
  EXPECT_DEATH(run(*cpu, 3, {1, 2, 3}, {3}, 1.0F), "target");
}

}  // namespace
}  // namespace penstock
