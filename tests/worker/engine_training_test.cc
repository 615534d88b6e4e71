// Whole training runs on threads: what the engine computes must not depend on how the work is laid
// out.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/worker/engine_test_support.h"

namespace penstock {
namespace {

constexpr int64_t kSteps = 4;

class EngineTrainingTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    directory_ = new ScratchDirectory;
    write_tiny_corpus(directory_->path());
  }
  static void TearDownTestSuite() {
    delete directory_;
    directory_ = nullptr;
  }
  static StandaloneReport run(const TinyLayout& layout, int64_t steps = kSteps) {
    StandaloneOptions options = tiny_run(tiny_spec(directory_->path(), layout, steps));
    options.evaluate = true;
    return train_tiny(options);
  }
  static void expect_equal_training(const StandaloneReport& got, const StandaloneReport& want) {
    ASSERT_EQ(got.steps.size(), want.steps.size());
    for (size_t i = 0; i < want.steps.size(); ++i) {
      const StepResult& a = got.steps[i];
      const StepResult& b = want.steps[i];
      EXPECT_NEAR(a.loss, b.loss, 1e-5 * b.loss) << "step " << b.step;
      EXPECT_NEAR(a.grad_norm, b.grad_norm, 1e-5 * b.grad_norm + 1e-6) << "step " << b.step;
      EXPECT_EQ(a.tokens, b.tokens);
      EXPECT_EQ(a.learning_rate, b.learning_rate);
      EXPECT_NEAR(a.expert_load_max_ratio, b.expert_load_max_ratio, 1e-9);
    }
    ASSERT_EQ(got.evaluations.size(), want.evaluations.size());
    for (size_t i = 0; i < want.evaluations.size(); ++i) {
      EXPECT_NEAR(got.evaluations[i].loss, want.evaluations[i].loss,
                  1e-5 * want.evaluations[i].loss);
      EXPECT_EQ(got.evaluations[i].tokens, want.evaluations[i].tokens);
    }
  }
  static ScratchDirectory* directory_;
};
ScratchDirectory* EngineTrainingTest::directory_ = nullptr;

TEST_F(EngineTrainingTest, OneRankLearnsTheCorpus) {
  const StandaloneReport report = run({}, 30);
  ASSERT_EQ(report.steps.size(), 30u);
  EXPECT_NEAR(report.steps.front().loss, std::log(272.0), 0.1);  // uniform at first
  EXPECT_LT(report.steps.back().loss, 4.0);
  ASSERT_EQ(report.evaluations.size(), 2u);  // before the first step and after the last
  EXPECT_LT(report.evaluations[1].loss, report.evaluations[0].loss - 0.5);
  EXPECT_EQ(report.steps[0].tokens, 32 * 16);
  EXPECT_GE(report.steps[0].expert_load_max_ratio, 1.0);
}

class EngineLayoutTest : public EngineTrainingTest,
                         public ::testing::WithParamInterface<TinyLayout> {};

TEST_P(EngineLayoutTest, TrainsAsOneRankDoes) {
  static const StandaloneReport* const one_rank = new StandaloneReport(run({}));
  expect_equal_training(run(GetParam()), *one_rank);
}

std::vector<TinyLayout> layouts() {
  std::vector<TinyLayout> all;
  for (const Schedule schedule : kSchedules) {
    for (const int64_t pipeline : {1, 2, 4}) {
      // DualPipe on one rank is 1F1B; five layers make no eight stages.
      if (pipeline == 1 && schedule == Schedule::kDualPipe) continue;
      if (pipeline == 4 && schedule == Schedule::kDualPipeV) continue;
      for (const auto& [expert, data] : {std::pair(1, 1), std::pair(2, 1), std::pair(2, 2)}) {
        all.push_back({pipeline, expert, data, schedule});
      }
    }
  }
  return all;
}
INSTANTIATE_TEST_SUITE_P(AllLayouts, EngineLayoutTest, ::testing::ValuesIn(layouts()),
                         [](const auto& layout) {
                           std::string name = to_string(layout.param);
                           for (char& c : name) c = std::isalnum(c) ? c : '_';
                           return name;
                         });

TEST_F(EngineTrainingTest, EqualRunsGiveEqualBitsInEveryLayout) {
  for (const TinyLayout& layout : layouts()) {
    const StandaloneReport first = run(layout);
    const StandaloneReport second = run(layout);
    ASSERT_EQ(first.steps.size(), second.steps.size());
    for (size_t i = 0; i < first.steps.size(); ++i) {
      EXPECT_EQ(first.steps[i].loss, second.steps[i].loss) << to_string(layout);
      EXPECT_EQ(first.steps[i].grad_norm, second.steps[i].grad_norm) << to_string(layout);
    }
    EXPECT_EQ(first.weights_digest, second.weights_digest) << to_string(layout);
  }
}

// The first step sees no sum of gradients yet: it must not depend on how the model is cut. Later
// ones differ by what the order of those sums tips over a rounding boundary of E4M3.
TEST_F(EngineTrainingTest, Fp8TrainsAlikeInLayoutsThatKeepExpertsTogether) {
  const auto run_fp8 = [](const TinyLayout& layout) {
    JobSpec spec = tiny_spec(directory_->path(), layout, kSteps);
    spec.training.precision = Precision::kFp8;
    return train_tiny(tiny_run(spec));
  };
  const StandaloneReport one_rank = run_fp8({});
  const StandaloneReport fp32 = run({});
  ASSERT_EQ(one_rank.steps.size(), static_cast<size_t>(kSteps));
  for (const TinyLayout& layout : {TinyLayout{2, 1, 1, Schedule::kOneForwardOneBackward},
                                   TinyLayout{1, 1, 2, Schedule::kOneForwardOneBackward},
                                   TinyLayout{4, 1, 1, Schedule::kDualPipe}}) {
    const StandaloneReport report = run_fp8(layout);
    ASSERT_EQ(report.steps.size(), one_rank.steps.size());
    const StepResult& first = report.steps.front();
    EXPECT_NEAR(first.loss, one_rank.steps[0].loss, 1e-9 * first.loss) << to_string(layout);
    EXPECT_NEAR(first.grad_norm, one_rank.steps[0].grad_norm, 1e-5) << to_string(layout);
    for (size_t i = 0; i < report.steps.size(); ++i) {
      EXPECT_NEAR(report.steps[i].loss, one_rank.steps[i].loss, 1e-3) << to_string(layout);
    }
    EXPECT_EQ(report.weights_digest, run_fp8(layout).weights_digest) << to_string(layout);
  }
  EXPECT_NE(one_rank.steps[0].loss, fp32.steps[0].loss);
}

TEST_F(EngineTrainingTest, SeedChangesTheRun) {
  JobSpec spec = tiny_spec(directory_->path(), {}, 1);
  const StandaloneReport first = train_tiny(tiny_run(spec));
  spec.training.seed += 1;
  const StandaloneReport second = train_tiny(tiny_run(spec));
  EXPECT_NE(first.weights_digest, second.weights_digest);
}

TEST_F(EngineTrainingTest, LargerMicrobatchesTrainTheSame) {
  JobSpec spec = tiny_spec(directory_->path(), {2, 1, 1, Schedule::kDualPipe}, kSteps);
  spec.parallelism.micro_batch_size = 4;
  spec.parallelism.microbatches = 8;
  StandaloneOptions options = tiny_run(spec);
  options.evaluate = true;
  expect_equal_training(train_tiny(options), run({}));
}

// DualPipeV hands over on its last rank, here the only one, in slots that both its stages share.
TEST_F(EngineTrainingTest, AnOddNumberOfMicrobatchesOnOneRankOfTwoStagesTrainsTheSame) {
  const auto train = [&](Schedule schedule) {
    JobSpec spec = tiny_spec(directory_->path(), {1, 1, 1, schedule, 7}, kSteps);
    StandaloneOptions options = tiny_run(spec);
    options.evaluate = true;
    return train_tiny(options);
  };
  expect_equal_training(train(Schedule::kDualPipeV), train(Schedule::kOneForwardOneBackward));
}

TEST_F(EngineTrainingTest, EveryPartOfAStepIsAccountedFor) {
  const StandaloneReport report = run({2, 2, 1, Schedule::kDualPipe});
  for (const StepResult& step : report.steps) {
    const StepTimes& t = step.times;
    EXPECT_GT(t.compute_seconds, 0.0);
    EXPECT_GT(t.expert_wait_seconds, 0.0);
    EXPECT_GT(t.pipeline_wait_seconds, 0.0);
    EXPECT_GT(t.reduce_seconds, 0.0);
    EXPECT_GT(t.optimizer_seconds, 0.0);
    const double parts = t.compute_seconds + t.expert_wait_seconds + t.pipeline_wait_seconds +
                         t.reduce_seconds + t.optimizer_seconds;
    EXPECT_LE(parts, t.total_seconds * 1.0001);
  }
}

TEST_F(EngineTrainingTest, AnExplodingRunStopsAndSaysAtWhichStep) {
  JobSpec spec = tiny_spec(directory_->path(), {2, 1, 1, Schedule::kDualPipe}, 50);
  spec.optimizer.lr = 1e30;
  spec.optimizer.warmup_steps = 0;
  const Result<StandaloneReport> report = run_standalone_threads(tiny_run(spec));
  ASSERT_FALSE(report.ok());
  EXPECT_NE(report.status().message().find("step "), std::string::npos)
      << report.status().to_string();
  EXPECT_NE(report.status().message().find("lower the learning rate"), std::string::npos);
}

TEST_F(EngineTrainingTest, AProgramOfAnotherPlaceIsRefused) {
  StandaloneOptions options =
      tiny_run(tiny_spec(directory_->path(), {2, 1, 1, Schedule::kDualPipe}, 1));
  std::swap(options.programs[0], options.programs[1]);
  const Result<StandaloneReport> report = run_standalone_threads(options);
  EXPECT_EQ(report.status().code(), Code::kInvalidArgument) << report.status().to_string();
}

TEST_F(EngineTrainingTest, AnInstructionOutsideTheLayoutIsRefused) {
  const JobSpec spec = tiny_spec(directory_->path(), {2, 1, 1, Schedule::kDualPipe}, 1);
  for (Instruction bad :
       {Instruction{.op = Op::kForward, .direction = 2, .microbatch = 0},
        Instruction{.op = Op::kForward, .direction = 0, .microbatch = 99},
        Instruction{.op = Op::kSendForward, .direction = 0, .microbatch = 0, .peer = 0},
        Instruction{.op = Op::kSendForward, .direction = 0, .microbatch = 0, .peer = 5},
        Instruction{.op = Op::kReceiveForward, .direction = 0, .microbatch = 0, .peer = 1},
        Instruction{.op = Op::kBackwardWeight, .direction = 2},
        Instruction{.op = Op::kOverlapped, .microbatch = 0, .backward_microbatch = 0}}) {
    StandaloneOptions options = tiny_run(spec);
    options.programs[0].training[0] = bad;
    const Result<StandaloneReport> report = run_standalone_threads(options);
    EXPECT_EQ(report.status().code(), Code::kInvalidArgument) << to_string(bad);
  }
}

}  // namespace
}  // namespace penstock
