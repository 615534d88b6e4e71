#include "worker/model/balance_loss.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "comm/base/random.h"
#include "kernels/cpu/cpu_kernels.h"
#include "tests/worker/model_test_support.h"

namespace penstock {
namespace {

std::vector<float> sigmoids(const std::vector<double>& logits) {
  std::vector<float> scores;
  for (const double x : logits) scores.push_back(static_cast<float>(1.0 / (1.0 + std::exp(-x))));
  return scores;
}

TEST(BalanceLossTest, ChoicesSpreadEvenlyGiveOnePerToken) {
  // Each token prefers another one of four experts: f = 1 everywhere, and Σ P = 1.
  const BalanceShape shape{{1, 4}, 4, 1};
  std::vector<double> logits(16, -1.0);
  for (size_t t = 0; t < 4; ++t) logits[t * 4 + t] = 1.0;
  std::vector<float> fractions(4);
  EXPECT_NEAR(sequence_balance(shape, sigmoids(logits).data(), fractions.data()), 4.0, 1e-6);
  EXPECT_EQ(fractions, std::vector<float>(4, 1.0F));
}

TEST(BalanceLossTest, EverybodysFavouriteCostsMoreInItsOwnSequenceOnly) {
  const BalanceShape shape{{2, 2}, 4, 2};
  // The first sequence always takes experts 0 and 1, the second each expert once.
  const std::vector<double> logits = {3, 2, 0, 0, 3, 2, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1};
  std::vector<float> fractions(8);
  const double both = sequence_balance(shape, sigmoids(logits).data(), fractions.data());
  EXPECT_EQ(fractions, (std::vector<float>{2, 2, 0, 0, 1, 1, 1, 1}));
  const double s3 = 1 / (1 + std::exp(-3.0)), s2 = 1 / (1 + std::exp(-2.0));
  EXPECT_NEAR(both, 2 * 2 * (s3 + s2) / (s3 + s2 + 1.0) + 2.0, 1e-6);
}

TEST(BalanceLossTest, TiesGoToTheLowerExpert) {
  const BalanceShape shape{{1, 1}, 3, 2};
  std::vector<float> fractions(3);
  sequence_balance(shape, std::vector<float>(3, 0.5F).data(), fractions.data());
  EXPECT_EQ(fractions, (std::vector<float>{1.5F, 1.5F, 0.0F}));
}

TEST(BalanceLossTest, GradientEqualsFiniteDifferences) {
  const BalanceShape shape{{2, 5}, 6, 2};
  Random random(3, 1);
  std::vector<double> logits;
  for (int i = 0; i < 60; ++i) logits.push_back(random.normal());
  std::vector<float> fractions(12), gradient(60, 0.25F);
  sequence_balance(shape, sigmoids(logits).data(), fractions.data());
  sequence_balance_backward(shape, 0.7, sigmoids(logits).data(), fractions.data(), gradient.data());
  const auto loss_at = [&](size_t i, double distance) {
    std::vector<double> moved = logits;
    moved[i] += distance;
    std::vector<float> other(12);
    return sequence_balance(shape, sigmoids(moved).data(), other.data());
  };
  double largest = 0.0;
  for (size_t i = 0; i < logits.size(); ++i) {
    constexpr double kStep = 1e-3;  // too short to change a choice here
    const double slope = (loss_at(i, kStep) - loss_at(i, -kStep)) / (2 * kStep);
    EXPECT_NEAR(gradient[i], 0.25 + 0.7 * slope, 2e-4) << i;
    largest = std::max(largest, std::abs(slope));
  }
  EXPECT_GT(largest, 0.05);
}

TEST(BalanceLossTest, OfAModelItIsSummedOverLayersAndIgnoredInEvaluation) {
  ModelConfig model = tiny_model();
  const auto kernels = make_cpu_kernels();
  const TokenBatch batch = random_batch(model, 3, 8, 3);
  Pipeline without({.model = model}, *kernels);
  model.aux_loss_alpha = 0.01;
  Pipeline with({.model = model}, *kernels), cut({.model = model, .stage_count = 2}, *kernels);
  for (Pipeline* pipeline : {&without, &with, &cut}) pipeline->initialize(5);
  EXPECT_EQ(with.train(batch, 0.1), without.train(batch, 0.1));
  EXPECT_EQ(with.evaluate(batch), without.evaluate(batch));
  cut.train(batch, 0.1);
  EXPECT_EQ(without.stage(0).balance_loss_sum(0), 0.0);
  const double sum = with.stage(0).balance_loss_sum(0);
  EXPECT_GT(sum, 0.9 * 0.01 * 24 * 3);  // near one per token and MoE layer
  EXPECT_DOUBLE_EQ(sum, cut.stage(0).balance_loss_sum(0) + cut.stage(1).balance_loss_sum(0));
  const auto name = "model.layers.3.mlp.gate.weight";
  EXPECT_GT(relative_difference(with.gradients().at(name), without.gradients().at(name)), 1e-4);
  EXPECT_EQ(with.gradients().at("lm_head.weight"), without.gradients().at("lm_head.weight"));
}

}  // namespace
}  // namespace penstock
