#include "worker/model/stage.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/cpu/cpu_kernels.h"
#include "tests/worker/model_test_support.h"

namespace penstock {
namespace {

class StageTest : public testing::Test {
 protected:
  Pipeline make(int64_t stage_count, const ModelConfig& model = tiny_model()) {
    return Pipeline({.model = model, .stage_count = stage_count}, *kernels_);
  }
  std::unique_ptr<Kernels> kernels_ = make_cpu_kernels();
};

TEST_F(StageTest, LossOfFreshWeightsIsTheLogarithmOfTheVocabulary) {
  ModelConfig model = tiny_model();
  model.vocab_size = 512;
  Pipeline pipeline = make(1, model);
  pipeline.initialize(3);
  const TokenBatch batch = random_batch(model, 4, 16, 9);
  EXPECT_NEAR(pipeline.evaluate(batch) / static_cast<double>(batch.count()), std::log(512.0), 0.1);
}

TEST_F(StageTest, ForwardOnlyComputesTheLossOfTheTrainingForward) {
  Pipeline pipeline = make(2);
  pipeline.initialize(3);
  const TokenBatch batch = random_batch(tiny_model(), 2, 11, 9);
  EXPECT_EQ(pipeline.evaluate(batch), pipeline.train(batch, 1.0));
}

TEST_F(StageTest, InputThenWeightBackwardEqualsFullBackwardBitForBit) {
  Pipeline full = make(2), split = make(2);
  full.initialize(4);
  split.initialize(4);
  for (uint64_t step = 0; step < 2; ++step) {
    const TokenBatch batch = random_batch(tiny_model(), 3, 12, step);
    EXPECT_EQ(full.train(batch, 0.01), split.train(batch, 0.01, BackwardMode::kInputThenWeight));
  }
  EXPECT_EQ(full.gradients(), split.gradients());
}

TEST_F(StageTest, DeferredWeightPartsRunOldestFirst) {
  Pipeline full = make(1), deferred = make(1);
  full.initialize(4);
  deferred.initialize(4);
  Stage& stage = deferred.stage(0);
  std::vector<TokenBatch> batches;
  for (uint64_t i = 0; i < 2; ++i) batches.push_back(random_batch(tiny_model(), 3, 12, i));
  for (int32_t slot = 0; slot < 2; ++slot) {
    const TokenBatch& batch = batches[static_cast<size_t>(slot)];
    full.train(batch, 0.01);
    const MicroBatch micro_batch{batch.sequences, batch.length, batch.tokens, batch.targets, 0.01};
    ASSERT_TRUE(stage.forward(slot, micro_batch).run().ok());
    ASSERT_TRUE(stage.backward_input(slot).run().ok());
    EXPECT_EQ(stage.weight_queue_depth(), slot + 1);
  }
  ASSERT_TRUE(stage.weight().run().ok());
  ASSERT_TRUE(stage.weight().run().ok());
  EXPECT_EQ(stage.weight_queue_depth(), 0);
  EXPECT_EQ(full.gradients(), deferred.gradients());
}

TEST_F(StageTest, CuttingIntoStagesChangesNeitherLossNorGradients) {
  Pipeline whole = make(1);
  whole.initialize(5);
  const TokenBatch batch = random_batch(tiny_model(), 4, 16, 1);
  const double loss = whole.train(batch, 1.0 / 64);
  const auto gradients = whole.gradients();
  for (const int64_t stage_count : {2, 4}) {
    Pipeline cut = make(stage_count);
    cut.initialize(5);
    EXPECT_EQ(cut.train(batch, 1.0 / 64), loss) << stage_count;
    const auto cut_gradients = cut.gradients();
    ASSERT_EQ(cut_gradients.size(), gradients.size());
    for (const auto& [name, gradient] : gradients) {
      EXPECT_LT(relative_difference(cut_gradients.at(name), gradient), 1e-6)
          << name << " in " << stage_count << " stages";
    }
  }
}

TEST_F(StageTest, MicroBatchesAddUpToTheGradientOfTheirUnion) {
  Pipeline once = make(1), parts = make(1);
  once.initialize(5);
  parts.initialize(5);
  const TokenBatch batch = random_batch(tiny_model(), 4, 16, 1);
  const double loss = once.train(batch, 1.0 / 64);
  double sum = 0.0;
  for (int64_t s = 0; s < 4; ++s) sum += parts.train(batch.part(s, 1), 1.0 / 64);
  EXPECT_NEAR(sum, loss, 1e-4);
  const auto part_gradients = parts.gradients();
  for (const auto& [name, gradient] : once.gradients()) {
    EXPECT_LT(relative_difference(part_gradients.at(name), gradient), 1e-5) << name;
  }
}

TEST_F(StageTest, ForwardOfOneMicroBatchInterleavesWithBackwardOfAnother) {
  Pipeline one_by_one = make(1), woven = make(1);
  one_by_one.initialize(6);
  woven.initialize(6);
  const TokenBatch a = random_batch(tiny_model(), 2, 10, 1),
                   b = random_batch(tiny_model(), 2, 10, 2);
  one_by_one.train(a, 0.05);
  const double loss_b = one_by_one.train(b, 0.05);

  Stage& stage = woven.stage(0);
  const MicroBatch micro_a{2, 10, a.tokens, a.targets, 0.05};
  const MicroBatch micro_b{2, 10, b.tokens, b.targets, 0.05};
  ASSERT_TRUE(stage.forward(0, micro_a).run().ok());
  Pass backward = stage.backward(0);
  Pass forward = stage.forward(1, micro_b);
  while (!backward.finished() || !forward.finished()) {
    for (Pass* pass : {&backward, &forward}) {
      if (pass->finished()) continue;
      ASSERT_TRUE(pass->run_next().ok());
    }
  }
  ASSERT_TRUE(stage.backward(1).run().ok());
  EXPECT_EQ(stage.loss_sum(1), loss_b);
  EXPECT_EQ(woven.gradients(), one_by_one.gradients());
}

TEST_F(StageTest, SubOperationsComeInTheOrderOfThePublishedTrace) {
  Pipeline pipeline = make(4);
  pipeline.initialize(1);
  const TokenBatch batch = random_batch(tiny_model(), 1, 4, 1);
  const MicroBatch micro_batch{1, 4, batch.tokens, batch.targets, 1.0};
  const auto names = [](Pass pass) {
    std::string text;
    while (!pass.finished()) {
      text += std::string(sub_op_name(pass.next())) + "@" + std::to_string(pass.next_layer()) + " ";
      EXPECT_TRUE(pass.run_next().ok());
    }
    return text;
  };
  EXPECT_EQ(names(pipeline.stage(0).forward(0, micro_batch)),
            "embed(F)@-1 attn(F)@0 dispatch(F)@0 mlp(F)@0 combine(F)@0 output(F)@-1 ");
  Stage& last = pipeline.stage(3);
  EXPECT_EQ(names(last.forward(0, micro_batch)),
            "attn(F)@3 dispatch(F)@3 mlp(F)@3 combine(F)@3 output(F)@-1 ");
  EXPECT_EQ(names(last.backward(0)),
            "output(B)@-1 output(W)@-1 combine(B)@3 mlp(B)@3 dispatch(B)@3 mlp(W)@3 attn(B)@3 "
            "attn(W)@3 ");
  EXPECT_EQ(names(last.forward(0, micro_batch)),
            "attn(F)@3 dispatch(F)@3 mlp(F)@3 combine(F)@3 output(F)@-1 ");
  EXPECT_EQ(names(last.backward_input(0)),
            "output(B)@-1 combine(B)@3 mlp(B)@3 dispatch(B)@3 attn(B)@3 ");
  EXPECT_EQ(names(last.weight()), "output(W)@-1 mlp(W)@3 attn(W)@3 ");
}

TEST_F(StageTest, AResultIsFinalWhenOnlyWeightPartsAreLeft) {
  Pipeline pipeline = make(2);
  pipeline.initialize(1);
  const TokenBatch batch = random_batch(tiny_model(), 1, 4, 1);
  const MicroBatch micro_batch{1, 4, batch.tokens, batch.targets, 1.0};
  const auto left_when_final = [](Pass pass) {
    std::string text;
    while (!pass.finished()) {
      if (pass.result_final()) text += std::string(sub_op_name(pass.next())) + " ";
      EXPECT_TRUE(pass.run_next().ok());
    }
    EXPECT_TRUE(pass.result_final());
    return text;
  };
  for (const int stage : {0, 1}) {
    EXPECT_EQ(left_when_final(pipeline.stage(stage).forward(0, micro_batch)), "");
  }
  EXPECT_EQ(left_when_final(pipeline.stage(1).backward(0)), "attn(W) ");
  EXPECT_EQ(left_when_final(pipeline.stage(0).backward(0)), "attn(W) embed(W) ");
}

TEST_F(StageTest, LearningOneBatchByHeartDrivesItsLossToZero) {
  Pipeline pipeline = make(2);
  pipeline.initialize(8);
  const TokenBatch batch = random_batch(tiny_model(), 2, 8, 3);
  const double first = pipeline.evaluate(batch) / 16;
  // Sign descent needs no tuning and no optimizer.
  for (int step = 0; step < 300; ++step) {
    pipeline.zero_gradients();
    pipeline.train(batch, 1.0 / 16);
    const float rate = 0.005F * (1.0F - static_cast<float>(step) / 300);
    pipeline.for_each([&](const Parameter& p) {
      for (int64_t i = 0; i < p.size; ++i) {
        p.value[i] -= rate * static_cast<float>((p.gradient[i] > 0) - (p.gradient[i] < 0));
      }
    });
  }
  EXPECT_GT(first, 3.0);
  EXPECT_LT(pipeline.evaluate(batch) / 16, 0.05);
}

TEST_F(StageTest, ExpertLoadsCountEveryChoiceOfTrainingTokensOnly) {
  Pipeline pipeline = make(1);
  pipeline.initialize(8);
  Stage& stage = pipeline.stage(0);
  const TokenBatch batch = random_batch(tiny_model(), 3, 8, 3);
  pipeline.evaluate(batch);
  for (const int64_t load : stage.expert_loads()) EXPECT_EQ(load, 0);
  pipeline.train(batch, 1.0);
  pipeline.train(batch, 1.0);
  ASSERT_EQ(stage.routers().size(), 3u);
  for (const Router& router : stage.routers()) {
    int64_t total = 0;
    for (const int64_t load : router.load) total += load;
    EXPECT_EQ(total, 2 * 24 * 3) << router.bias_name;
  }
  stage.clear_expert_loads();
  for (const int64_t load : stage.expert_loads()) EXPECT_EQ(load, 0);
}

TEST_F(StageTest, RouterBiasRisesForIdleExpertsFallsForBusyOnesAndRestsAtTheMean) {
  Pipeline pipeline = make(1);
  pipeline.initialize(8);
  Stage& stage = pipeline.stage(0);
  std::vector<int64_t> loads(24, 5);
  loads[0] = 8;
  loads[1] = 2;
  loads[8] = 6;  // the second layer's mean becomes 5.125: its other experts are below
  stage.update_router_bias(loads, 0.001);
  const auto routers = stage.routers();
  EXPECT_EQ(routers[0].bias_name, "model.layers.1.mlp.gate.e_score_correction_bias");
  EXPECT_FLOAT_EQ(routers[0].bias[0], -0.001F);
  EXPECT_FLOAT_EQ(routers[0].bias[1], 0.001F);
  EXPECT_EQ(routers[0].bias[2], 0.0F);
  EXPECT_FLOAT_EQ(routers[1].bias[0], -0.001F);
  EXPECT_FLOAT_EQ(routers[1].bias[1], 0.001F);
  EXPECT_EQ(routers[2].bias[0], 0.0F);
}

TEST_F(StageTest, BiasSteersTheChoiceAwayFromAnExpert) {
  Pipeline pipeline = make(1);
  pipeline.initialize(8);
  Stage& stage = pipeline.stage(0);
  const TokenBatch batch = random_batch(tiny_model(), 3, 8, 3);
  stage.routers()[1].bias[3] = -0.4F;
  stage.routers()[1].bias[5] = 5.0F;
  pipeline.train(batch, 1.0);
  EXPECT_EQ(stage.routers()[1].load[3], 0);
  EXPECT_EQ(stage.routers()[1].load[5], 24);
}

TEST_F(StageTest, LoadImbalanceIsTheWorstLayersMaximumOverItsMean) {
  const std::vector<int64_t> loads = {1, 1, 1, 1, 0, 0, 6, 2, 0, 0, 0, 0};
  EXPECT_DOUBLE_EQ(Stage::load_imbalance(loads, 4), 3.0);
  EXPECT_DOUBLE_EQ(Stage::load_imbalance({}, 4), 0.0);
}

TEST_F(StageTest, DirectionalDerivativeOfEveryTensorEqualsItsGradient) {
  // Every token chooses every expert: a step that changed a choice would make the loss jump.
  ModelConfig model = tiny_model();
  model.n_group = model.topk_group = 1;
  model.num_experts_per_tok = model.n_routed_experts;
  Pipeline pipeline = make(1, model);
  pipeline.initialize(11);
  // Larger weights than at the start of training, so that no part's derivative drowns in rounding.
  pipeline.for_each([](const Parameter& p) {
    for (int64_t i = 0; p.decays() && i < p.size; ++i) p.value[i] *= 10;
  });
  const TokenBatch batch = random_batch(model, 2, 9, 4);
  pipeline.train(batch, 1.0);
  const auto gradients = pipeline.gradients();
  pipeline.for_each([&](const Parameter& p) {
    const std::vector<float>& gradient = gradients.at(p.name);
    double norm = 0.0;
    for (const float g : gradient) norm += static_cast<double>(g) * g;
    norm = std::sqrt(norm);
    ASSERT_GT(norm, 0.0) << p.name;
    const std::vector<float> saved(p.value, p.value + p.size);
    const auto loss_at = [&](double distance) {
      for (size_t i = 0; i < saved.size(); ++i) {
        p.value[i] = static_cast<float>(saved[i] + distance * gradient[i] / norm);
      }
      const double loss = pipeline.evaluate(batch);
      std::copy(saved.begin(), saved.end(), p.value);
      return loss;
    };
    constexpr double kStep = 2e-3;
    EXPECT_NEAR((loss_at(kStep) - loss_at(-kStep)) / (2 * kStep) / norm, 1.0, 0.03) << p.name;
  });
}

TEST_F(StageTest, AModelWithoutSharedExpertsTrains) {
  ModelConfig model = tiny_model();
  model.n_shared_experts = 0;
  Pipeline pipeline = make(2, model);
  pipeline.initialize(2);
  const TokenBatch batch = random_batch(model, 2, 8, 3);
  EXPECT_EQ(pipeline.evaluate(batch), pipeline.train(batch, 1.0));
  EXPECT_GT(relative_difference(pipeline.gradients().at("lm_head.weight"),
                                std::vector<float>(37 * 32, 1e-9F)),
            1.0);
}

TEST_F(StageTest, MemoryIsCountedAndGrowsWithTheSlots) {
  StageOptions options;
  options.model = tiny_model();
  options.model.first_k_dense_replace = 4;
  options.sequence_length_max = 8;
  Stage small(options, *kernels_, nullptr);
  options.slot_count = 3;
  Stage large(options, *kernels_, nullptr);
  EXPECT_GT(small.memory_bytes(), 0u);
  EXPECT_GT(large.memory_bytes(), small.memory_bytes());
}

using StageDeathTest = StageTest;

TEST_F(StageDeathTest, BackwardBeforeForwardIsABug) {
  Pipeline pipeline = make(1);
  EXPECT_DEATH(pipeline.stage(0).backward(0), "backward without forward");
}

TEST_F(StageDeathTest, WeightPartWithoutAQueueIsABug) {
  Pipeline pipeline = make(1);
  EXPECT_DEATH(pipeline.stage(0).weight(), "weight queue is empty");
}

TEST_F(StageDeathTest, AMicroBatchLargerThanTheBuffersIsABug) {
  Pipeline pipeline = make(1);
  const TokenBatch batch = random_batch(tiny_model(), 1, 17, 3);
  const MicroBatch micro_batch{1, 17, batch.tokens, batch.targets, 1.0};
  EXPECT_DEATH(pipeline.stage(0).forward(0, micro_batch), "sequence_length");
}

}  // namespace
}  // namespace penstock
