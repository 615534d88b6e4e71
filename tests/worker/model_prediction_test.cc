// Multi-token prediction inside a model. Its numbers are checked by model_golden_test.
#include <gtest/gtest.h>

#include "kernels/cpu/cpu_kernels.h"
#include "tests/worker/model_test_support.h"

namespace penstock {
namespace {

class PredictionTest : public testing::Test {
 protected:
  static ModelConfig model() {
    ModelConfig model = tiny_model();
    model.num_nextn_predict_layers = 1;
    return model;
  }
  Pipeline make(int64_t stage_count, const ModelConfig& model, double weight = 0.3) {
    Pipeline pipeline({.model = model, .stage_count = stage_count, .prediction_weight = weight},
                      *kernels_);
    pipeline.initialize(5);
    return pipeline;
  }
  static std::string operations(Pass pass) {
    std::string text;
    while (!pass.finished()) {
      text += std::string(sub_op_name(pass.next())) + "@" + std::to_string(pass.next_layer()) + " ";
      EXPECT_TRUE(pass.run_next().ok());
    }
    return text;
  }
  std::unique_ptr<Kernels> kernels_ = make_cpu_kernels();
  TokenBatch batch_ = random_batch(tiny_model(), 3, 8, 3);
};

TEST_F(PredictionTest, AddsTheBlockOfThePublishedLayoutToTheLastStage) {
  Pipeline pipeline = make(2, model());
  const ParameterSet& last = pipeline.stage(1).parameters();
  for (const char* name :
       {"enorm.weight", "hnorm.weight", "shared_head.norm.weight", "input_layernorm.weight",
        "self_attn.q_a_proj.weight", "mlp.gate.weight", "mlp.experts.7.down_proj.weight"}) {
    EXPECT_NE(last.find("model.layers.4." + std::string(name)), nullptr) << name;
  }
  ASSERT_NE(last.find("model.layers.4.eh_proj.weight"), nullptr);
  EXPECT_EQ(last.find("model.layers.4.eh_proj.weight")->shape, (std::vector<int64_t>{32, 64}));
  EXPECT_EQ(pipeline.stage(1).routers().back().bias_name,
            "model.layers.4.mlp.gate.e_score_correction_bias");
  EXPECT_EQ(pipeline.stage(0).parameters().find("model.layers.4.enorm.weight"), nullptr);
}

TEST_F(PredictionTest, IsOneMoreLayerOfATrainingPassAndNoneOfAnEvaluation) {
  Pipeline pipeline = make(4, model());
  Stage& last = pipeline.stage(3);
  const MicroBatch micro_batch{3, 8, batch_.tokens, batch_.targets, 1.0, 0.3};
  EXPECT_EQ(operations(last.forward(0, micro_batch)),
            "attn(F)@3 dispatch(F)@3 mlp(F)@3 combine(F)@3 attn(F)@4 dispatch(F)@4 mlp(F)@4 "
            "combine(F)@4 output(F)@-1 ");
  EXPECT_EQ(operations(last.backward_input(0)),
            "output(B)@-1 combine(B)@4 mlp(B)@4 dispatch(B)@4 attn(B)@4 combine(B)@3 mlp(B)@3 "
            "dispatch(B)@3 attn(B)@3 ");
  EXPECT_EQ(operations(last.weight()), "output(W)@-1 mlp(W)@4 attn(W)@4 mlp(W)@3 attn(W)@3 ");
  EXPECT_EQ(operations(last.forward_only(1, micro_batch)),
            "attn(F)@3 dispatch(F)@3 mlp(F)@3 combine(F)@3 output(F)@-1 ");
}

TEST_F(PredictionTest, ChangesNeitherTheMainLossNorTheHeldOutOne) {
  Pipeline with = make(1, model()), without = make(1, tiny_model());
  EXPECT_EQ(with.train(batch_, 0.1), without.train(batch_, 0.1));
  EXPECT_EQ(with.evaluate(batch_), without.evaluate(batch_));
  EXPECT_GT(with.stage(0).prediction_loss_sum(0), 21 * 3.0);  // 21 predictions, each near ln 37
  EXPECT_LT(with.stage(0).prediction_loss_sum(0), 21 * 4.2);
  EXPECT_EQ(without.stage(0).prediction_loss_sum(0), 0.0);
}

TEST_F(PredictionTest, OfWeightZeroLeavesTheModelsGradientsAsTheyAre) {
  Pipeline with = make(1, model(), 0.0), without = make(1, tiny_model());
  with.train(batch_, 0.1);
  without.train(batch_, 0.1);
  const auto gradients = with.gradients();
  for (const auto& [name, gradient] : without.gradients()) {
    EXPECT_LT(relative_difference(gradients.at(name), gradient), 1e-6) << name;
  }
}

TEST_F(PredictionTest, CuttingIntoStagesChangesNeitherLossNorGradients) {
  Pipeline whole = make(1, model());
  whole.train(batch_, 0.1);
  const auto gradients = whole.gradients();
  for (const int64_t stage_count : {2, 4}) {
    Pipeline cut = make(stage_count, model());
    cut.train(batch_, 0.1);
    EXPECT_EQ(cut.stage(stage_count - 1).prediction_loss_sum(0),
              whole.stage(0).prediction_loss_sum(0));
    const auto cut_gradients = cut.gradients();
    ASSERT_EQ(cut_gradients.size(), gradients.size());
    for (const auto& [name, gradient] : gradients) {
      EXPECT_LT(relative_difference(cut_gradients.at(name), gradient), 1e-6)
          << name << " in " << stage_count << " stages";
    }
  }
}

TEST_F(PredictionTest, DeferredWeightGradientsEqualThoseOfOnePass) {
  Pipeline full = make(2, model()), deferred = make(2, model());
  full.train(batch_, 0.1);
  deferred.train(batch_, 0.1, BackwardMode::kInputThenWeight);
  EXPECT_EQ(full.gradients(), deferred.gradients());
}

TEST_F(PredictionTest, AStageUsesTheEmbeddingOfAnotherOnItsRankAndAddsToItsGradient) {
  const auto options = [&](int64_t index) {
    StageOptions stage;
    stage.model = model();
    stage.model.first_k_dense_replace = 4;  // so that only the block needs an exchange
    stage.stage_index = index;
    stage.stage_count = 2;
    stage.sequences_max = 3;
    stage.sequence_length_max = 8;
    stage.embedding_elsewhere = index == 1;
    return stage;
  };
  const auto exchange =
      ExpertExchange::create(nullptr, expert_exchange_config(options(1), {Rank{0}})).value();
  Stage first(options(0), *kernels_, nullptr), last(options(1), *kernels_, exchange.get());
  first.initialize(5);
  last.initialize(5);
  last.use_embedding_of(first);
  EXPECT_EQ(last.parameters().find("model.embed_tokens.weight"), nullptr);
  EXPECT_TRUE(last.parameters().values(ParameterKind::kShared).empty());
  const Parameter* embedding = first.parameters().find("model.embed_tokens.weight");
  EXPECT_EQ(embedding->kind, ParameterKind::kShared);
  const MicroBatch micro_batch{3, 8, batch_.tokens, batch_.targets, 1.0, 0.3};
  ASSERT_TRUE(first.forward(0, micro_batch).run().ok());
  std::copy(first.output(0).begin(), first.output(0).end(), last.input(0).begin());
  ASSERT_TRUE(last.forward(0, micro_batch).run().ok());
  ASSERT_TRUE(last.backward(0).run().ok());
  double sum = 0.0;
  for (const float g : first.parameters().gradients(ParameterKind::kShared)) sum += std::abs(g);
  EXPECT_GT(sum, 0.0);
}

}  // namespace
}  // namespace penstock
