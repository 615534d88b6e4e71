// The same model and the same global batch over expert groups of 1, 2 and 4 ranks.
#include <gtest/gtest.h>

#include <mutex>

#include "kernels/cpu/cpu_kernels.h"
#include "tests/data/rank_harness.h"
#include "tests/worker/model_test_support.h"

namespace penstock {
namespace {

struct Outcome {
  double loss_sum = 0.0;
  std::map<std::string, std::vector<float>> gradients;  // dense ones summed over the ranks
  std::vector<int64_t> loads;
};

using Prepare = std::function<void(Stage&)>;

// Every rank trains its share of the batch, in two micro-batches; both modes of backward are used.
Outcome train_on_group(int32_t ranks, const TokenBatch& batch, const Prepare& prepare,
                       Precision precision = Precision::kFp32) {
  std::mutex mutex;
  Outcome outcome;
  run_ranks(TransportKind::kLoopback, {.world_size = ranks}, [&](RankContext& context) {
    const auto kernels = make_cpu_kernels();
    const int32_t rank = context.transport.rank().value;
    Pipeline pipeline({.model = tiny_model(),
                       .stage_count = 2,
                       .expert_count = ranks,
                       .expert_index = rank,
                       .transport = &context.transport,
                       .precision = precision},
                      *kernels);
    pipeline.initialize(7);
    for (int64_t s = 0; s < pipeline.stage_count(); ++s) prepare(pipeline.stage(s));
    const int64_t share = batch.sequences / ranks;
    double loss = 0.0;
    for (int64_t half = 0; half < 2; ++half) {
      const TokenBatch part = batch.part(rank * share + half * (share / 2), share / 2);
      loss += pipeline.train(part, 1.0 / static_cast<double>(batch.count()),
                             half == 0 ? BackwardMode::kFull : BackwardMode::kInputThenWeight);
    }
    const std::lock_guard lock(mutex);
    outcome.loss_sum += loss;
    for (const auto& [name, gradient] : pipeline.gradients()) {
      std::vector<float>& sum = outcome.gradients[name];
      sum.resize(gradient.size(), 0.0F);
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += gradient[i];
    }
    const auto loads = pipeline.stage(1).expert_loads();
    outcome.loads.resize(loads.size(), 0);
    for (size_t i = 0; i < loads.size(); ++i) outcome.loads[i] += loads[i];
  });
  return outcome;
}

void expect_equal(const Outcome& actual, const Outcome& expected) {
  EXPECT_NEAR(actual.loss_sum, expected.loss_sum, 1e-5 * expected.loss_sum);
  EXPECT_EQ(actual.loads, expected.loads);
  ASSERT_EQ(actual.gradients.size(), expected.gradients.size());
  for (const auto& [name, gradient] : expected.gradients) {
    EXPECT_LT(relative_difference(actual.gradients.at(name), gradient), 1e-5) << name;
  }
}

TEST(ExpertParallelTest, GroupsOfOneTwoAndFourComputeTheSame) {
  const TokenBatch batch = random_batch(tiny_model(), 8, 12, 21);
  const Prepare nothing = [](Stage&) {};
  const Outcome alone = train_on_group(1, batch, nothing);
  EXPECT_EQ(alone.gradients.size(), 24u * 3 + 4 * 9 + 3 + 3 + 3 * 4);
  expect_equal(train_on_group(2, batch, nothing), alone);
  expect_equal(train_on_group(4, batch, nothing), alone);
}

// The first expert group's biases are so high that every token chooses experts of the first rank
// alone.
TEST(ExpertParallelTest, RoutingThatFavoursOneRankComputesTheSame) {
  const TokenBatch batch = random_batch(tiny_model(), 8, 12, 22);
  const Prepare skew = [](Stage& stage) {
    for (const Router& router : stage.routers()) {
      for (size_t e = 0; e < 4; ++e) router.bias[e] = 10.0F;
    }
  };
  const Outcome alone = train_on_group(1, batch, skew);
  for (size_t e = 4; e < 8; ++e) EXPECT_EQ(alone.loads[e], 0);
  expect_equal(train_on_group(2, batch, skew), alone);
  expect_equal(train_on_group(4, batch, skew), alone);
}

TEST(ExpertParallelTest, TheSameGroupComputesTheSameBitsTwice) {
  const TokenBatch batch = random_batch(tiny_model(), 4, 12, 23);
  const Prepare nothing = [](Stage&) {};
  const Outcome once = train_on_group(2, batch, nothing), twice = train_on_group(2, batch, nothing);
  for (const auto& [name, gradient] : once.gradients) {
    // Dense gradients of two ranks are added here in the order the threads end; a + b is b + a.
    EXPECT_EQ(gradient, twice.gradients.at(name)) << name;
  }
}

// Each rank's share of a combine is rounded to bf16, and a tile of an expert's weight gradient
// spans the tokens of every rank: with FP8 the group's size shows, as far as those roundings go.
TEST(ExpertParallelTest, InFp8GroupsDifferByTheRoundingOfTheirCombinesOnly) {
  const TokenBatch batch = random_batch(tiny_model(), 8, 12, 21);
  const Prepare nothing = [](Stage&) {};
  const Outcome alone = train_on_group(1, batch, nothing, Precision::kFp8);
  const Outcome group = train_on_group(2, batch, nothing, Precision::kFp8);
  EXPECT_NEAR(group.loss_sum, alone.loss_sum, 1e-4 * alone.loss_sum);
  for (const auto& [name, gradient] : alone.gradients) {
    if (name.find("experts.") != std::string::npos) continue;
    EXPECT_LT(relative_difference(group.gradients.at(name), gradient), 0.05) << name;
  }
}

// A rank whose peer died gets an error from its pass, not a hang.
TEST(ExpertParallelTest, ALostPeerEndsThePassWithUnavailable) {
  run_ranks(TransportKind::kLoopback, {.world_size = 2, .killed = {1}}, [](RankContext& context) {
    const auto kernels = make_cpu_kernels();
    const int32_t rank = context.transport.rank().value;
    if (rank == 1) {
      context.die();
      return;
    }
    StageOptions options;
    options.model = tiny_model();
    options.expert_count = 2;
    options.sequence_length_max = 8;
    auto exchange = ExpertExchange::create(&context.transport,
                                           expert_exchange_config(options, {Rank{0}, Rank{1}}))
                        .value();
    Stage stage(options, *kernels, exchange.get());
    stage.initialize(1);
    const TokenBatch batch = random_batch(options.model, 1, 8, 1);
    const Status status = stage.forward(0, {1, 8, batch.tokens, batch.targets, 1.0}).run();
    EXPECT_EQ(status.code(), Code::kUnavailable) << status.to_string();
  });
}

}  // namespace
}  // namespace penstock
