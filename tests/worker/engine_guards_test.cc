// Guards in real training: what is left out changes nothing, and a resumed run decides the same.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>

#include "checkpoint/store.h"
#include "comm/base/random.h"
#include "tests/worker/engine_test_support.h"
#include "worker/data/sampler.h"

namespace penstock {
namespace {

constexpr int64_t kSteps = 36;     // less than an epoch: no window is read twice
constexpr int64_t kPoisoned = 30;  // when the loss has left its first slope

// Spoils one element of the last gradient that a rank computes in one step.
class SpoiledStage final : public Stage {
 public:
  SpoiledStage(const StageOptions& options, Kernels& kernels, ExpertExchange* exchange,
               const bool& spoil)
      : Stage(options, kernels, exchange), spoil_(spoil) {}

 protected:
  Status run_sub_op(SubOp op, int32_t layer, int32_t slot, int32_t gradient_slot) override {
    PENSTOCK_TRY(Stage::run_sub_op(op, layer, slot, gradient_slot));
    if (spoil_) {
      parameters().gradients(ParameterKind::kDense)[3] = std::numeric_limits<float>::quiet_NaN();
    }
    return {};
  }

 private:
  const bool& spoil_;
};
class SpoilingProbe final : public RankProbe {
 public:
  SpoilingProbe(bool spoils, int64_t first_step, int64_t at_step)
      : at_step_(spoils ? at_step : -1), spoil_(first_step == at_step_) {}
  StageFactory stage_factory() override {
    return [this](const StageOptions& options, Kernels& kernels, ExpertExchange* exchange) {
      return std::make_unique<SpoiledStage>(options, kernels, exchange, spoil_);
    };
  }
  void on_step(const StepResult& step) override { spoil_ = step.step + 1 == at_step_; }

 private:
  const int64_t at_step_;
  bool spoil_;
};

class EngineGuardsTest : public ::testing::Test {
 protected:
  void SetUp() override { write_tiny_corpus(directory_.path()); }

  StandaloneOptions options_of(const TinyLayout& layout, const GuardsSpec& guards) {
    JobSpec spec = tiny_spec(directory_.path(), layout, kSteps);
    spec.checkpoint.interval = 4;
    spec.guards = guards;
    return tiny_run(spec);
  }
  static StandaloneOptions spoiled(StandaloneOptions options, int64_t step) {
    const int32_t last = static_cast<int32_t>(options.spec.parallelism.world_size()) - 1;
    const int64_t first = options.restore_step + 1;
    options.make_probe = [=](Rank rank) -> Result<std::unique_ptr<RankProbe>> {
      return std::unique_ptr<RankProbe>(
          std::make_unique<SpoilingProbe>(rank.value == last, first, step));
    };
    return options;
  }
  // What `step` reads becomes tokens that the rest of the corpus never has.
  void poison(const JobSpec& spec, int64_t step) {
    const Result<Sampler> sampler = open_training_sampler(spec);
    ASSERT_TRUE(sampler.ok()) << sampler.status().to_string();
    std::fstream tokens(directory_.path() / "train.bin",
                        std::ios::in | std::ios::out | std::ios::binary);
    Random random(5, 5);
    for (int64_t i = 0; i < sampler->sequences_per_step(); ++i) {
      const int64_t first = sampler->window(step, i).first_token;
      tokens.seekp((first + 1) * 2);  // the first is also another window's last
      for (int64_t t = 1; t < sampler->seq_length(); ++t) {
        const auto token = static_cast<uint16_t>(40 + random.below(232));
        tokens.write(reinterpret_cast<const char*>(&token), sizeof token);
      }
    }
    ASSERT_TRUE(tokens.good());
  }
  static std::vector<int64_t> skipped(const StandaloneReport& report) {
    std::vector<int64_t> steps;
    for (const StepResult& step : report.steps) {
      if (step.guard.action == GuardPolicy::kSkip) steps.push_back(step.step);
    }
    return steps;
  }
  Path checkpoints() const { return directory_.path() / "checkpoints"; }

  ScratchDirectory directory_;
};

constexpr SpikeSpec kSkipSpikes = {GuardPolicy::kSkip, 8.0, 8};

TEST_F(EngineGuardsTest, AStepThatIsLeftOutChangesNoWeight) {
  GuardsSpec guards;
  guards.not_finite = GuardPolicy::kSkip;
  for (const TinyLayout& layout :
       {TinyLayout{}, TinyLayout{2, 2, 1, Schedule::kDualPipe}, TinyLayout{1, 2, 2}}) {
    StandaloneOptions options = options_of(layout, guards);
    options.stop_after = 3;
    const std::string before = train_tiny(options).weights_digest;
    options.stop_after = 4;
    const StandaloneReport after = train_tiny(spoiled(options, 4));
    EXPECT_EQ(after.weights_digest, before) << to_string(layout);
    EXPECT_EQ(skipped(after), std::vector<int64_t>{4}) << to_string(layout);
    const StepResult& step = after.steps.back();
    EXPECT_EQ(step.guard.signal, GuardSignal::kNotFinite);
    EXPECT_TRUE(std::isnan(step.grad_norm));
    EXPECT_EQ(step.tokens, 0) << "none were trained";
    options.stop_after = 6;
    const StandaloneReport on = train_tiny(spoiled(options, 4));
    EXPECT_NE(on.weights_digest, before) << "training goes on";
    EXPECT_TRUE(std::isfinite(on.steps.back().loss));
    EXPECT_EQ(skipped(on), std::vector<int64_t>{4});
  }
}

TEST_F(EngineGuardsTest, WithoutGuardsWhatIsNoNumberStopsTheRun) {
  const auto report =
      run_standalone_threads(spoiled(options_of({2, 1, 1, Schedule::kDualPipe}, {}), 4));
  ASSERT_FALSE(report.ok());
  EXPECT_NE(report.status().message().find("step 4: loss "), std::string::npos)
      << report.status().message();
  EXPECT_NE(report.status().message().find("gradient norm nan; lower the learning rate"),
            std::string::npos)
      << report.status().message();
}

TEST_F(EngineGuardsTest, OneStepTooManyLeftOutStopsTheRun) {
  GuardsSpec guards;
  guards.not_finite = GuardPolicy::kSkip;
  guards.max_skips = 0;
  const auto report = run_standalone_threads(spoiled(options_of({}, guards), 2));
  EXPECT_FALSE(report.ok());
}

TEST_F(EngineGuardsTest, ABatchOfGarbageIsASpikeAndNothingElseIs) {
  const TinyLayout layout{2, 2, 1, Schedule::kDualPipe};
  StandaloneOptions options = options_of(layout, {});
  const StandaloneReport clean = train_tiny(options);
  poison(options.spec, kPoisoned);
  const StandaloneReport unguarded = train_tiny(options);
  EXPECT_EQ(clean.steps[kPoisoned - 2].loss, unguarded.steps[kPoisoned - 2].loss);
  EXPECT_GT(unguarded.steps[kPoisoned - 1].loss, clean.steps[kPoisoned - 1].loss + 1.0);
  for (const bool by_norm : {false, true}) {
    GuardsSpec guards;
    (by_norm ? guards.grad_norm_spike : guards.loss_spike) = kSkipSpikes;
    options.spec.guards = guards;
    const StandaloneReport guarded = train_tiny(options);
    EXPECT_EQ(skipped(guarded), std::vector<int64_t>{kPoisoned}) << by_norm;
    const GuardFinding& found = guarded.steps[kPoisoned - 1].guard;
    EXPECT_EQ(found.signal, by_norm ? GuardSignal::kGradNormSpike : GuardSignal::kLossSpike);
    EXPECT_EQ(found.value,
              by_norm ? guarded.steps[kPoisoned - 1].grad_norm : guarded.steps[kPoisoned - 1].loss);
    EXPECT_GT(found.value, found.limit);
    EXPECT_GT(found.limit, found.median);
  }
}

TEST_F(EngineGuardsTest, PolicyStopEndsTheRunBeforeTheSpikeCountsAndSaysWhatIsUsual) {
  GuardsSpec guards;
  guards.loss_spike = kSkipSpikes;
  guards.loss_spike.policy = GuardPolicy::kStop;
  const StandaloneOptions options = options_of({}, guards);
  poison(options.spec, kPoisoned);
  const auto report = run_standalone_threads(options);
  ASSERT_FALSE(report.ok());
  const std::string message = report.status().message();
  EXPECT_NE(message.find("step 30: loss "), std::string::npos) << message;
  EXPECT_NE(message.find("is above "), std::string::npos) << message;
  EXPECT_NE(message.find("whose median is "), std::string::npos) << message;
}

TEST_F(EngineGuardsTest, PolicyWarnChangesNothing) {
  GuardsSpec guards;
  guards.loss_spike = kSkipSpikes;
  guards.loss_spike.policy = GuardPolicy::kWarn;
  StandaloneOptions options = options_of({}, {});
  poison(options.spec, kPoisoned);
  const StandaloneReport silent = train_tiny(options);
  options.spec.guards = guards;
  const StandaloneReport warned = train_tiny(options);
  EXPECT_EQ(warned.weights_digest, silent.weights_digest);
  EXPECT_EQ(warned.steps[kPoisoned - 1].guard.action, GuardPolicy::kWarn);
  EXPECT_EQ(warned.steps[kPoisoned - 1].tokens, silent.steps[kPoisoned - 1].tokens);
}

TEST_F(EngineGuardsTest, AResumedRunDecidesAsOneThatWasNeverInterrupted) {
  GuardsSpec guards;
  guards.loss_spike = kSkipSpikes;
  guards.grad_norm_spike = {GuardPolicy::kWarn, 1.0, 8};  // trips often
  const TinyLayout layouts[] = {{}, {2, 2, 1, Schedule::kDualPipe}};
  StandaloneOptions options = options_of({}, guards);
  poison(options.spec, kPoisoned);
  for (const TinyLayout& layout : layouts) {
    options = options_of(layout, guards);
    options.checkpoint_dir = directory_.path() / to_string(layout);
    const StandaloneReport whole = train_tiny(options);
    ASSERT_EQ(skipped(whole), std::vector<int64_t>{kPoisoned}) << to_string(layout);
    // Before the first window is full, inside the one that matters, and after what was left out.
    for (const int64_t from : {4, 28, 32}) {
      StandaloneOptions rest = options_of(layout, guards);
      rest.restore_manifest = manifest_of_step(options.checkpoint_dir, from);
      rest.restore_step = from;
      const StandaloneReport resumed = train_tiny(rest);
      EXPECT_EQ(resumed.weights_digest, whole.weights_digest) << to_string(layout) << from;
      ASSERT_EQ(std::ssize(resumed.steps), kSteps - from);
      for (const StepResult& step : resumed.steps) {
        EXPECT_EQ(step.guard, whole.steps[static_cast<size_t>(step.step) - 1].guard) << step.step;
      }
    }
  }
}

TEST_F(EngineGuardsTest, StepsThatARollbackLeavesOutAreAsIfTheyHadNoNumber) {
  for (const TinyLayout& layout : {TinyLayout{}, TinyLayout{2, 2, 1, Schedule::kDualPipe}}) {
    StandaloneOptions options = options_of(layout, {});
    options.stop_after = 6;
    const std::string before = train_tiny(options).weights_digest;
    options.left_out = {{7, 9}, {9, 10}};
    options.stop_after = 10;
    const StandaloneReport after = train_tiny(options);
    EXPECT_EQ(after.weights_digest, before) << to_string(layout);
    EXPECT_EQ(skipped(after), (std::vector<int64_t>{7, 8, 9, 10}));
    EXPECT_TRUE(std::isnan(after.steps.back().loss));
    options.stop_after = 0;
    options.checkpoint_dir = directory_.path() / to_string(layout);
    const StandaloneReport whole = train_tiny(options);
    EXPECT_NE(whole.weights_digest, before);
    options.restore_manifest = manifest_of_step(options.checkpoint_dir, 4);
    options.restore_step = 4;
    options.checkpoint_dir.clear();
    EXPECT_EQ(train_tiny(options).weights_digest, whole.weights_digest) << to_string(layout);
  }
}

TEST_F(EngineGuardsTest, ARollbackThatNobodyCanMakeEndsTheRun) {
  GuardsSpec guards;
  guards.not_finite = GuardPolicy::kRollback;
  const auto report =
      run_standalone_threads(spoiled(options_of({2, 1, 1, Schedule::kDualPipe}, guards), 4));
  EXPECT_FALSE(report.ok());
}

TEST_F(EngineGuardsTest, ACheckpointFromBeforeGuardsWereAskedForGoesOnWithThem) {
  GuardsSpec guards;
  guards.loss_spike = kSkipSpikes;
  StandaloneOptions options = options_of({}, {});
  options.checkpoint_dir = checkpoints();
  const StandaloneReport whole = train_tiny(options);
  for (const bool guarded : {true, false}) {
    StandaloneOptions rest = options_of({}, guarded ? guards : GuardsSpec());
    rest.restore_manifest = manifest_of_step(checkpoints(), 8);
    rest.restore_step = 8;
    EXPECT_EQ(train_tiny(rest).weights_digest, whole.weights_digest);
  }
}

}  // namespace
}  // namespace penstock
