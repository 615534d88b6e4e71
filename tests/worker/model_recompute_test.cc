// Computing activations again instead of keeping them changes no bit and takes less memory.
#include <gtest/gtest.h>

#include "kernels/cpu/cpu_kernels.h"
#include "tests/worker/model_test_support.h"

namespace penstock {
namespace {

constexpr Recompute kNothing{};
constexpr Recompute kChoices[] = {{true, false}, {false, true}, {true, true}};

class RecomputeTest : public testing::Test {
 protected:
  Pipeline make(const ModelConfig& model, Precision precision, const Recompute& recompute) {
    Pipeline pipeline(
        {.model = model, .stage_count = 2, .precision = precision, .recompute = recompute},
        *kernels_);
    pipeline.initialize(5);
    return pipeline;
  }
  static uint64_t memory_of(Pipeline& pipeline) {
    return pipeline.stage(0).memory_bytes() + pipeline.stage(1).memory_bytes();
  }
  std::unique_ptr<Kernels> kernels_ = make_cpu_kernels();
  TokenBatch a_ = random_batch(tiny_model(), 2, 8, 3), b_ = random_batch(tiny_model(), 2, 8, 4);
};

TEST_F(RecomputeTest, GivesTheSameBitsInEveryKindOfModel) {
  ModelConfig plain_queries = tiny_model();
  plain_queries.q_lora_rank.reset();
  ModelConfig ahead = tiny_model();
  ahead.num_nextn_predict_layers = 1;
  for (const ModelConfig& model : {tiny_model(), plain_queries, ahead}) {
    for (const Precision precision : {Precision::kFp32, Precision::kFp8}) {
      for (const BackwardMode mode : {BackwardMode::kFull, BackwardMode::kInputThenWeight}) {
        Pipeline keeps = make(model, precision, kNothing);
        const double loss = keeps.train(a_, 0.1, mode);
        const auto gradients = keeps.gradients();
        for (const Recompute& recompute : kChoices) {
          Pipeline again = make(model, precision, recompute);
          EXPECT_EQ(again.train(a_, 0.1, mode), loss);
          EXPECT_EQ(again.gradients(), gradients);
        }
      }
    }
  }
}

// The backward fills the shared buffers while a forward of another micro-batch is under way.
TEST_F(RecomputeTest, GivesTheSameBitsWhenPassesAreInterleaved) {
  const auto run = [&](const Recompute& recompute) {
    Pipeline pipeline({.model = tiny_model(), .recompute = recompute}, *kernels_);
    pipeline.initialize(5);
    Stage& stage = pipeline.stage(0);
    const MicroBatch micro_a{2, 8, a_.tokens, a_.targets, 0.05};
    const MicroBatch micro_b{2, 8, b_.tokens, b_.targets, 0.05};
    EXPECT_TRUE(stage.forward(0, micro_a).run().ok());
    Pass backward = stage.backward_input(0);
    Pass forward = stage.forward(1, micro_b);
    while (!backward.finished() || !forward.finished()) {
      for (Pass* pass : {&forward, &backward}) {
        if (pass->finished()) continue;
        EXPECT_TRUE(pass->run_next().ok());
      }
    }
    EXPECT_TRUE(stage.backward(1).run().ok());
    EXPECT_TRUE(stage.weight().run().ok());
    return pipeline.gradients();
  };
  const auto gradients = run(kNothing);
  for (const Recompute& recompute : kChoices) EXPECT_EQ(run(recompute), gradients);
}

TEST_F(RecomputeTest, SavesItsTensorsInEveryLayerAndSlotButForTheSharedBuffers) {
  const ModelConfig model = tiny_model();
  const auto saved = [&](const Recompute& recompute) {
    Pipeline keeps = make(model, Precision::kFp32, kNothing);
    Pipeline again = make(model, Precision::kFp32, recompute);
    return static_cast<int64_t>(memory_of(keeps) - memory_of(again));
  };
  const int64_t bytes = 4 * 16 * static_cast<int64_t>(sizeof(float));  // a column of all tokens
  const int64_t copies = 2 * 2;  // two slots of two layers in a stage, of which there are two
  const int64_t attention_norms = model.hidden_size + *model.q_lora_rank + model.kv_lora_rank;
  // Of the norm before the experts the forward shares one buffer and the backward another.
  const int64_t norms =
      2 * bytes * ((copies - 1) * attention_norms + (copies - 2) * model.hidden_size);
  const int64_t up = 2 * bytes * (copies - 1) * model.num_attention_heads *
                     (model.qk_head_dim() + model.qk_nope_head_dim + model.v_head_dim);
  EXPECT_EQ(saved({.norms = true}), norms);
  EXPECT_EQ(saved({.mla_up = true}), up);
  EXPECT_EQ(saved({.norms = true, .mla_up = true}), norms + up);
}

}  // namespace
}  // namespace penstock
