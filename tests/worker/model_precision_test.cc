// Whole models in emulated FP8: what fp32 promises about passes and cuts holds bit for bit, and the
// roundings stay small.
#include <gtest/gtest.h>

#include "kernels/cpu/cpu_kernels.h"
#include "tests/worker/model_test_support.h"

namespace penstock {
namespace {

class PrecisionTest : public testing::Test {
 protected:
  Pipeline make(int64_t stage_count, Precision precision = Precision::kFp8) {
    Pipeline pipeline({.model = tiny_model(), .stage_count = stage_count, .precision = precision},
                      *kernels_);
    pipeline.initialize(5);
    return pipeline;
  }
  std::unique_ptr<Kernels> kernels_ = make_cpu_kernels();
  const TokenBatch batch_ = random_batch(tiny_model(), 4, 16, 1);
};

TEST_F(PrecisionTest, LossAndGradientsAreNearThoseOfFp32AndNotEqual) {
  Pipeline fp32 = make(1, Precision::kFp32), fp8 = make(1);
  const double loss = fp32.train(batch_, 1.0 / 64);
  const double rounded = fp8.train(batch_, 1.0 / 64);
  EXPECT_NE(rounded, loss);
  EXPECT_NEAR(rounded, loss, 1e-3 * loss);
  const auto gradients = fp8.gradients();
  for (const auto& [name, gradient] : fp32.gradients()) {
    const double difference = relative_difference(gradients.at(name), gradient);
    EXPECT_GT(difference, 0.0) << name;
    // An expert that few tokens choose may see one more or less of them.
    EXPECT_LT(difference, name.find("experts.") == std::string::npos ? 0.4 : 1.0) << name;
  }
}

TEST_F(PrecisionTest, ForwardOnlyComputesTheLossOfTheTrainingForward) {
  Pipeline pipeline = make(2);
  EXPECT_EQ(pipeline.evaluate(batch_), pipeline.train(batch_, 1.0));
}

TEST_F(PrecisionTest, CuttingIntoStagesChangesNoBitOfLossAndGradients) {
  Pipeline whole = make(1);
  const double loss = whole.train(batch_, 1.0 / 64);
  for (const int64_t stage_count : {2, 4}) {
    Pipeline cut = make(stage_count);
    EXPECT_EQ(cut.train(batch_, 1.0 / 64), loss) << stage_count;
    EXPECT_EQ(cut.gradients(), whole.gradients()) << stage_count;
  }
}

TEST_F(PrecisionTest, InputThenWeightBackwardEqualsFullBackwardBitForBit) {
  Pipeline full = make(2), split = make(2);
  full.train(batch_, 0.01);
  split.train(batch_, 0.01, BackwardMode::kInputThenWeight);
  EXPECT_EQ(full.gradients(), split.gradients());
}

// What is on its way to the experts must survive the other pass.
TEST_F(PrecisionTest, ForwardOfOneMicroBatchInterleavesWithBackwardOfAnother) {
  Pipeline one_by_one = make(1), woven = make(1);
  const TokenBatch other = random_batch(tiny_model(), 4, 16, 2);
  one_by_one.train(batch_, 0.05);
  const double loss = one_by_one.train(other, 0.05);

  Stage& stage = woven.stage(0);
  ASSERT_TRUE(stage.forward(0, {4, 16, batch_.tokens, batch_.targets, 0.05}).run().ok());
  Pass backward = stage.backward(0);
  Pass forward = stage.forward(1, {4, 16, other.tokens, other.targets, 0.05});
  while (!backward.finished() || !forward.finished()) {
    for (Pass* pass : {&backward, &forward}) {
      if (pass->finished()) continue;
      ASSERT_TRUE(pass->run_next().ok());
    }
  }
  ASSERT_TRUE(stage.backward(1).run().ok());
  EXPECT_EQ(stage.loss_sum(1), loss);
  EXPECT_EQ(woven.gradients(), one_by_one.gradients());
}

}  // namespace
}  // namespace penstock
