// Whole models in emulated FP8: what fp32 promises about passes and cuts holds bit for bit, and the
// roundings stay small.
#include <gtest/gtest.h>

#include "kernels/cpu/cpu_kernels.h"
#include "tests/worker/model_test_support.h"
#include "worker/model/attention_block.h"
#include "worker/model/feed_forward_block.h"

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

// The blocks of layer 0 alone, on one sequence.
class KeptFormatTest : public testing::Test {
 protected:
  static constexpr TokenShape kShape = {1, 12};
  KeptFormatTest() : parameters_(model_, {.layers = {0, 1}, .experts = {0, 8}}) {
    parameters_.initialize(3, 0.1);
    linears_.take_workspace(plan_, parameters_.all());
    x_ = plan_.floats(kShape.tokens() * hidden());
    y_ = plan_.floats(kShape.tokens() * hidden());
    for (int64_t i = 0; i < kShape.tokens() * hidden(); ++i) {
      x_[i] = std::sin(static_cast<float>(7 * i));
    }
  }
  int64_t hidden() const { return model_.hidden_size; }
  std::vector<float> rounded(RowFormat format, int64_t width, Matrix x) {
    std::vector<float> result(static_cast<size_t>(kShape.tokens() * width));
    kernels_->round_rows(format, kShape.tokens(), width, x, {result.data(), width});
    return result;
  }
  std::vector<float> copied(int64_t width, Matrix x) { return rounded(RowFormat::kFp32, width, x); }

  const ModelConfig model_ = tiny_model();
  std::unique_ptr<Kernels> kernels_ = make_cpu_kernels();
  Arena arena_{"kept formats", 16 << 20};
  MemoryPlan plan_{arena_};
  ParameterSet parameters_;
  Linears linears_{*kernels_, Precision::kFp8};
  float* x_ = nullptr;
  float* y_ = nullptr;
};

TEST_F(KeptFormatTest, InputsOfSwigluAreKeptInE4m3EachWithItsOwnTiles) {
  const int64_t width = model_.intermediate_size;
  const FeedForwardBlock block(*kernels_, linears_, parameters_, "model.layers.0.mlp.", width,
                               hidden());
  float* const gate_up = plan_.floats(kShape.tokens() * 2 * width);
  float* const unrounded = plan_.floats(kShape.tokens() * 2 * width);
  block.forward(kShape.tokens(), x_, gate_up, plan_.floats(kShape.tokens() * width), y_);
  const LinearWeight weight(*parameters_.find("model.layers.0.mlp.gate_proj.weight"),
                            parameters_.find("model.layers.0.mlp.up_proj.weight"));
  linears_.forward(kShape.tokens(), weight, {x_, hidden()}, Store::kOverwrite,
                   {unrounded, 2 * width});
  for (const int64_t half : {int64_t{0}, width}) {
    const std::vector<float> kept = copied(width, {gate_up + half, 2 * width});
    EXPECT_EQ(kept, rounded(RowFormat::kE4m3, width, {unrounded + half, 2 * width})) << half;
    EXPECT_NE(kept, copied(width, {unrounded + half, 2 * width})) << half;
  }
}

TEST_F(KeptFormatTest, TheInputOfTheOutputProjectionIsKeptInE5m6) {
  std::vector<float> cosine(16 * 16), sine(16 * 16);
  make_rope_tables(kShape.length, model_.qk_rope_head_dim, 10000.0, cosine.data(), sine.data());
  const AttentionBlock block(*kernels_, linears_, model_, parameters_, 0, cosine.data(),
                             sine.data(), {});
  const AttentionActivations kept = AttentionBlock::take_activations(plan_, model_, kShape, {});
  block.forward(kShape, x_, kept, AttentionBlock::take_scratch(plan_, *kernels_, model_, kShape),
                y_);
  const int64_t width = model_.num_attention_heads * model_.v_head_dim;
  const Matrix output = {kept.output, width};
  EXPECT_EQ(copied(width, output), rounded(RowFormat::kE5m6PowerOfTwo, width, output));
  EXPECT_NE(copied(width, output), rounded(RowFormat::kE4m3PowerOfTwo, width, output));
}

TEST_F(KeptFormatTest, TokensReachExpertsInE4m3WithPowerOfTwoScales) {
  StageOptions options{.model = model_, .sequences_max = 1, .sequence_length_max = 12};
  options.precision = Precision::kFp8;
  const auto exchange =
      ExpertExchange::create(nullptr, expert_exchange_config(options, {Rank{0}})).value();
  Stage stage(options, *kernels_, exchange.get());
  stage.initialize(3);
  const TokenBatch batch = random_batch(model_, 1, 12, 4);
  ASSERT_TRUE(stage.forward(0, {1, 12, batch.tokens, batch.targets, 1.0}).run().ok());
  const DispatchedRows dispatched = exchange->dispatched(0);
  ASSERT_EQ(dispatched.row_count, 12);
  std::vector<float> rows(dispatched.rows.begin(), dispatched.rows.end());
  const Matrix matrix = {rows.data(), hidden()};
  EXPECT_EQ(copied(hidden(), matrix), rounded(RowFormat::kE4m3PowerOfTwo, hidden(), matrix));
}

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
