// Training with every part of DeepSeek-V3's recipe at once: what comes out must not depend on how
// the work is laid out, nor on an interruption.
#include <gtest/gtest.h>

#include "checkpoint/store.h"
#include "tests/worker/engine_test_support.h"

namespace penstock {
namespace {

constexpr int64_t kSteps = 6;

class EngineRecipeTest : public ::testing::Test {
 protected:
  void SetUp() override { write_tiny_corpus(directory_.path()); }

  StandaloneOptions options_of(const TinyLayout& layout) const {
    JobSpec spec = tiny_spec(directory_.path(), layout, kSteps);
    spec.model.num_nextn_predict_layers = 1;
    spec.model.aux_loss_alpha = 0.01;
    const int64_t replicas = layout.expert * layout.data;
    spec.parallelism.microbatch_levels = {{3, 16 / replicas}, {6, 48 / replicas}};  // from 32
    spec.optimizer.hold_steps = 2;
    spec.optimizer.lr_levels = {{6, 0.05}};
    spec.optimizer.mtp_loss_levels = {{4, 0.1}};
    spec.optimizer.bias_update_levels = {{5, 0.0}};
    spec.optimizer.no_decay.embedding = true;
    spec.optimizer.moments = MomentType::kBf16;
    spec.optimizer.ema_decay = 0.8;
    spec.optimizer.ema_evaluation = true;
    spec.training.recompute = {.norms = true, .mla_up = true};
    spec.training.evaluation_interval = 2;
    spec.checkpoint.interval = 2;
    StandaloneOptions options = tiny_run(spec);
    options.evaluate = true;
    return options;
  }
  static std::vector<TinyLayout> layouts() {
    return {{2, 1, 1, Schedule::kOneForwardOneBackward},
            {4, 2, 1, Schedule::kOneForwardOneBackward},
            {2, 1, 2, Schedule::kZeroBubble},
            {2, 1, 1, Schedule::kDualPipe},
            {4, 2, 1, Schedule::kDualPipe},
            {2, 1, 1, Schedule::kDualPipeV},
            {2, 2, 1, Schedule::kDualPipeV},
            {1, 2, 2, Schedule::kOneForwardOneBackward}};
  }

  ScratchDirectory directory_;
};

TEST_F(EngineRecipeTest, EveryLayoutTrainsAsOneRankDoes) {
  const StandaloneReport one = train_tiny(options_of({}));
  ASSERT_EQ(one.steps.size(), static_cast<size_t>(kSteps));
  for (const TinyLayout& layout : layouts()) {
    const StandaloneReport report = train_tiny(options_of(layout));
    ASSERT_EQ(report.steps.size(), one.steps.size()) << to_string(layout);
    for (size_t i = 0; i < one.steps.size(); ++i) {
      const StepResult& a = report.steps[i];
      const StepResult& b = one.steps[i];
      const auto near = [&](double x, double y, const char* what) {
        EXPECT_NEAR(x, y, 2e-5 * y) << what << " of step " << b.step << ", " << to_string(layout);
      };
      near(a.loss, b.loss, "loss");
      near(a.prediction_loss, b.prediction_loss, "prediction loss");
      near(a.balance_loss, b.balance_loss, "balance loss");
      near(a.grad_norm, b.grad_norm, "gradient norm");
      EXPECT_EQ(a.learning_rate, b.learning_rate);
      EXPECT_EQ(a.tokens, 16 * (b.step < 3 ? 32 : b.step < 6 ? 16 : 48));
    }
    ASSERT_EQ(report.evaluations.size(), one.evaluations.size());
    for (size_t i = 0; i < one.evaluations.size(); ++i) {
      EXPECT_NEAR(report.evaluations[i].loss, one.evaluations[i].loss, 1e-4) << to_string(layout);
    }
  }
}

TEST_F(EngineRecipeTest, ItsLossesAreReportedApartAndLearnt) {
  JobSpec spec = options_of({}).spec;
  spec.training.steps = 40;
  spec.parallelism.microbatch_levels.clear();
  spec.optimizer.lr_levels.clear();
  spec.optimizer.mtp_loss_levels.clear();
  const StandaloneReport report = train_tiny(tiny_run(spec));
  ASSERT_EQ(report.steps.size(), 40u);
  const StepResult& first = report.steps.front();
  EXPECT_NEAR(first.prediction_loss, 15.0 / 16 * std::log(272.0), 0.1);  // the last place has none
  EXPECT_NEAR(first.balance_loss, 0.01 * 5, 0.01);  // one per layer of experts, when even
  EXPECT_LT(report.steps.back().prediction_loss, first.prediction_loss - 0.5);
  EXPECT_LT(report.steps.back().loss, first.loss - 0.5);
}

TEST_F(EngineRecipeTest, EqualRunsGiveEqualBits) {
  for (const TinyLayout& layout : layouts()) {
    const StandaloneReport first = train_tiny(options_of(layout));
    const StandaloneReport second = train_tiny(options_of(layout));
    EXPECT_EQ(first.weights_digest, second.weights_digest) << to_string(layout);
  }
}

TEST_F(EngineRecipeTest, AProgramWithoutAStepOfTheRampIsRefused) {
  StandaloneOptions options = options_of({2, 1, 1, Schedule::kDualPipe});
  options.programs[0].resized.pop_back();
  options.programs[1].resized.pop_back();
  const Result<StandaloneReport> report = run_standalone_threads(options);
  EXPECT_EQ(report.status().code(), Code::kInvalidArgument);
  EXPECT_NE(report.status().message().find("no step of 48 micro-batches"), std::string::npos)
      << report.status().to_string();
}

TEST_F(EngineRecipeTest, AProgramWithAStepThatTheSpecDoesNotAskForIsRefused) {
  StandaloneOptions options = options_of({2, 1, 1, Schedule::kDualPipe});
  options.spec.parallelism.microbatch_levels.pop_back();
  const Result<StandaloneReport> report = run_standalone_threads(options);
  EXPECT_EQ(report.status().code(), Code::kInvalidArgument);
  EXPECT_NE(report.status().message().find("a step of 48 micro-batches, which the spec never"),
            std::string::npos)
      << report.status().to_string();
}

// Data, loss normalisation, balancing and clipping go by the size of the step, not of the first.
TEST_F(EngineRecipeTest, AStepOfARampEqualsAStepOfAJobThatAlwaysHasItsSize) {
  for (const TinyLayout& layout : layouts()) {
    for (const Precision precision : {Precision::kFp32, Precision::kFp8}) {
      const int64_t replicas = layout.expert * layout.data;
      const auto train = [&](int64_t first, std::vector<StepLevel<int64_t>> ramp) {
        JobSpec spec = options_of(layout).spec;
        spec.training.precision = precision;
        spec.parallelism.microbatches = first / replicas;
        spec.parallelism.microbatch_levels = std::move(ramp);
        return train_tiny(tiny_run(spec));
      };
      const StandaloneReport ramp = train(32, {{1, 48 / replicas}});
      const StandaloneReport always = train(48, {});
      EXPECT_EQ(ramp.weights_digest, always.weights_digest) << to_string(layout);
      ASSERT_EQ(ramp.steps.size(), always.steps.size());
      for (size_t i = 0; i < ramp.steps.size(); ++i) {
        EXPECT_EQ(ramp.steps[i].loss, always.steps[i].loss);
        EXPECT_EQ(ramp.steps[i].balance_loss, always.steps[i].balance_loss);
        EXPECT_EQ(ramp.steps[i].grad_norm, always.steps[i].grad_norm);
        EXPECT_EQ(ramp.steps[i].tokens, always.steps[i].tokens);
        EXPECT_EQ(ramp.steps[i].expert_load_max_ratio, always.steps[i].expert_load_max_ratio);
      }
    }
  }
}

TEST_F(EngineRecipeTest, WhatIsRecomputedChangesNoBit) {
  for (const TinyLayout& layout : layouts()) {
    for (const Precision precision : {Precision::kFp32, Precision::kFp8}) {
      const auto train = [&](const Recompute& recompute) {
        StandaloneOptions options = options_of(layout);
        options.spec.training.precision = precision;
        options.spec.training.recompute = recompute;
        return train_tiny(options);
      };
      const StandaloneReport kept = train({});
      const StandaloneReport again = train({.norms = true, .mla_up = true});
      EXPECT_EQ(again.weights_digest, kept.weights_digest) << to_string(layout);
      ASSERT_EQ(again.steps.size(), kept.steps.size());
      EXPECT_EQ(again.steps.back().loss, kept.steps.back().loss);
      EXPECT_EQ(again.steps.back().grad_norm, kept.steps.back().grad_norm);
    }
  }
}

// The copies of the embedding are loaded from one tensor, so a resumed run would also differ if
// they had drifted apart.
TEST_F(EngineRecipeTest, ResumedRunsAreBitIdentical) {
  for (const TinyLayout& layout : layouts()) {
    const Path checkpoints = directory_.path() / to_string(layout);
    StandaloneOptions options = options_of(layout);
    options.checkpoint_dir = checkpoints;
    const StandaloneReport whole = train_tiny(options);
    options = options_of(layout);
    options.restore_step = 4;
    for (const CheckpointInfo& info : list_checkpoints(checkpoints, JobId{1}).checkpoints) {
      if (info.step == 4) options.restore_manifest = checkpoints / info.manifest_file;
    }
    const StandaloneReport rest = train_tiny(options);
    EXPECT_EQ(rest.weights_digest, whole.weights_digest) << to_string(layout);
    ASSERT_EQ(rest.steps.size(), 2u) << to_string(layout);
    EXPECT_EQ(rest.steps[1].prediction_loss, whole.steps[5].prediction_loss);
    EXPECT_EQ(rest.steps[1].grad_norm, whole.steps[5].grad_norm);
    EXPECT_EQ(rest.evaluations.back().loss, whole.evaluations.back().loss);
  }
}

}  // namespace
}  // namespace penstock
