#include "kernels/reference/router_reference.h"

#include <gtest/gtest.h>
// After gtest, whose macros it uses.
#include <rapidcheck/gtest.h>

#include "tests/kernels/support.h"

namespace penstock {
namespace {

struct RouterResult {
  std::vector<float> scores, weights;
  std::vector<int32_t> ids;
  std::vector<int64_t> counts;
};

RouterResult route(Kernels& kernels, const RouterShape& shape, const std::vector<float>& logits,
                   const std::vector<float>& bias) {
  RouterResult r;
  r.scores.resize(static_cast<size_t>(shape.tokens * shape.experts));
  r.weights.resize(static_cast<size_t>(shape.tokens * shape.topk));
  r.ids.resize(r.weights.size(), -1);
  r.counts.resize(static_cast<size_t>(shape.experts), -1);
  kernels.router(shape, {logits.data(), shape.experts}, bias.data(), r.scores.data(), r.ids.data(),
                 r.weights.data(), r.counts.data());
  return r;
}

// Runs `check` with each backend's answer.
void with_each_backend(const RouterShape& shape, const std::vector<float>& logits,
                       const std::vector<float>& bias,
                       const std::function<void(const RouterResult&)>& check) {
  for (const bool fast : {false, true}) {
    SCOPED_TRACE(fast ? "cpu" : "reference");
    const auto kernels = fast ? make_cpu_kernels() : make_reference_kernels();
    check(route(*kernels, shape, logits, bias));
  }
}

float logit(float score) {
  return std::log(score / (1.0F - score));
}

RC_GTEST_PROP(RouterTest, CpuAgreesWithReferenceOnRandomShapes, ()) {
  static const auto reference = make_reference_kernels();
  static const auto cpu = make_cpu_kernels();
  const int64_t groups = *rc::gen::inRange<int64_t>(1, 6);
  const int64_t group_size = *rc::gen::inRange<int64_t>(2, 9);
  const int64_t topk_groups = *rc::gen::inRange<int64_t>(1, groups + 1);
  const int64_t topk = *rc::gen::inRange<int64_t>(1, topk_groups * group_size + 1);
  const RouterShape shape = {*rc::gen::inRange<int64_t>(0, 20),
                             groups * group_size,
                             groups,
                             topk_groups,
                             topk,
                             *rc::gen::arbitrary<bool>(),
                             2.5F};
  const uint64_t seed = *rc::gen::arbitrary<uint64_t>();
  const auto logits = random_values(shape.tokens * shape.experts, seed);
  const auto bias = random_values(shape.experts, seed + 1, 0.1);
  const RouterResult a = route(*cpu, shape, logits, bias);
  const RouterResult b = route(*reference, shape, logits, bias);
  RC_ASSERT(a.ids == b.ids);
  RC_ASSERT(a.counts == b.counts);
  expect_close(a.weights, b.weights, 1e-6);
  expect_close(a.scores, b.scores, 1e-6);
  const auto d_weights = random_values(static_cast<int64_t>(a.weights.size()), seed + 2);
  std::vector<float> d_a(logits.size(), 9.0F), d_b(logits.size(), 9.0F);
  cpu->router_backward(shape, a.scores.data(), a.ids.data(), d_weights.data(),
                       {d_a.data(), shape.experts});
  reference->router_backward(shape, a.scores.data(), a.ids.data(), d_weights.data(),
                             {d_b.data(), shape.experts});
  expect_close(d_a, d_b, 1e-5);
  RC_ASSERT(!::testing::Test::HasFatalFailure());
}

TEST(RouterTest, EqualExpertsAreChosenByLowestIndexAndShareTheWeight) {
  const RouterShape shape = {2, 8, 4, 2, 3, true, 1.0F};
  with_each_backend(shape, std::vector<float>(16, 0.0F), std::vector<float>(8, 0.0F),
                    [](const RouterResult& r) {
                      EXPECT_EQ(r.ids, (std::vector<int32_t>{0, 1, 2, 0, 1, 2}));
                      EXPECT_EQ(r.counts, (std::vector<int64_t>{2, 2, 2, 0, 0, 0, 0, 0}));
                      for (const float w : r.weights) EXPECT_FLOAT_EQ(w, 1.0F / 3.0F);
                    });
}

TEST(RouterTest, AGroupIsRankedByItsTwoBestNotByItsBest) {
  // Group 0 has the single best expert, group 1 the better pair.
  const RouterShape shape = {1, 6, 2, 1, 1, true, 1.0F};
  std::vector<float> logits;
  for (const float score : {0.9F, 0.1F, 0.1F, 0.6F, 0.5F, 0.1F}) logits.push_back(logit(score));
  with_each_backend(shape, logits, std::vector<float>(6, 0.0F),
                    [](const RouterResult& r) { EXPECT_EQ(r.ids[0], 3); });
}

TEST(RouterTest, TheGroupLimitKeepsOutABetterExpertElsewhere) {
  const RouterShape shape = {1, 8, 4, 2, 4, true, 1.0F};
  std::vector<float> logits;
  for (const float score : {0.9F, 0.8F, 0.2F, 0.1F, 0.7F, 0.6F, 0.75F, 0.3F}) {
    logits.push_back(logit(score));
  }
  with_each_backend(shape, logits, std::vector<float>(8, 0.0F), [](const RouterResult& r) {
    EXPECT_EQ(r.ids, (std::vector<int32_t>{0, 1, 4, 5}));  // 6 scores 0.75 in a dropped group
  });
}

TEST(RouterTest, TheBiasChoosesButDoesNotWeigh) {
  const RouterShape shape = {1, 4, 1, 1, 2, true, 2.5F};
  std::vector<float> logits;
  for (const float score : {0.8F, 0.6F, 0.2F, 0.1F}) logits.push_back(logit(score));
  const std::vector<float> bias = {0.0F, 0.0F, 0.0F, 5.0F};
  with_each_backend(shape, logits, bias, [](const RouterResult& r) {
    EXPECT_EQ(r.ids, (std::vector<int32_t>{3, 0}));
    EXPECT_NEAR(r.weights[0], 2.5F * 0.1F / 0.9F, 1e-6F);
    EXPECT_NEAR(r.weights[1], 2.5F * 0.8F / 0.9F, 1e-6F);
  });
}

TEST(RouterTest, NoExpertOfADroppedGroupIsChosenHoweverLowTheKeptOnesAre) {
  const RouterShape shape = {1, 4, 2, 1, 2, true, 1.0F};
  std::vector<float> logits;
  for (const float score : {0.9F, 0.5F, 0.4F, 0.3F}) logits.push_back(logit(score));
  const std::vector<float> bias = {0.0F, -0.55F, -0.5F, -0.5F};  // choices 0.9 -0.05 -0.1 -0.2
  with_each_backend(shape, logits, bias, [](const RouterResult& r) {
    EXPECT_EQ(r.ids, (std::vector<int32_t>{0, 1}));
  });
}

TEST(RouterTest, WithoutNormalisingTheWeightsAreTheScaledScores) {
  const RouterShape shape = {1, 2, 1, 1, 2, false, 3.0F};
  with_each_backend(shape, {logit(0.8F), logit(0.3F)}, {0.0F, 0.0F}, [](const RouterResult& r) {
    EXPECT_NEAR(r.weights[0], 2.4F, 1e-6F);
    EXPECT_NEAR(r.weights[1], 0.9F, 1e-6F);
  });
}

TEST(RouterTest, ANanLogitShowsInTheWeights) {
  const RouterShape shape = {1, 4, 2, 1, 2, true, 1.0F};
  with_each_backend(shape, {0.0F, 0.0F, std::nanf(""), 0.0F}, std::vector<float>(4, 0.0F),
                    [](const RouterResult& r) {
                      EXPECT_EQ(r.ids[0], 2);
                      EXPECT_TRUE(std::isnan(r.weights[0]));
                    });
}

TEST(RouterTest, CountsAddUpToTokensTimesTopk) {
  const RouterShape shape = {33, 12, 3, 2, 4, true, 1.0F};
  with_each_backend(shape, random_values(33 * 12, 1), random_values(12, 2, 0.1),
                    [](const RouterResult& r) {
                      int64_t total = 0;
                      for (const int64_t count : r.counts) total += count;
                      EXPECT_EQ(total, 33 * 4);
                    });
}

TEST(RouterTest, GradientsAreTheFiniteDifferences) {
  using Doubles = std::vector<double>;
  for (const bool normalise : {true, false}) {
    const RouterShape shape = {4, 8, 4, 2, 3, normalise, 2.5F};
    const Doubles logits = random_values<double>(shape.tokens * shape.experts, 1);
    const Doubles bias = random_values<double>(shape.experts, 2, 0.1);
    const Doubles d_weights = random_values<double>(shape.tokens * shape.topk, 3);
    Doubles scores(logits.size()), weights(d_weights.size()), d_logits(logits.size());
    std::vector<int32_t> ids(weights.size());
    std::vector<int64_t> counts(8);
    const auto loss = [&](const Doubles& at) {
      reference::router<double>(shape, {at.data(), shape.experts}, bias.data(), scores.data(),
                                ids.data(), weights.data(), counts.data());
      return dot(weights, d_weights);
    };
    loss(logits);
    reference::router_backward<double>(shape, scores.data(), ids.data(), d_weights.data(),
                                       {d_logits.data(), shape.experts});
    expect_gradient(logits, d_logits, loss, normalise ? "normalised" : "plain");
  }
}

TEST(RouterDeathTest, MoreExpertsThanTheKeptGroupsHoldIsRefused) {
  const auto cpu = make_cpu_kernels();
  EXPECT_DEATH(
      route(*cpu, {1, 8, 4, 1, 3, true, 1.0F}, std::vector<float>(8), std::vector<float>(8)),
      "topk");
}

TEST(RouterDeathTest, AnExpertIdOutOfRangeIsRefusedBeforeItIsWrittenThrough) {
  const auto cpu = make_cpu_kernels();
  const RouterShape shape = {1, 4, 1, 1, 1, true, 1.0F};
  const float scores[4] = {};
  const float d_weights[1] = {};
  const int32_t ids[1] = {4};
  float d_logits[4];
  EXPECT_DEATH(cpu->router_backward(shape, scores, ids, d_weights, {d_logits, 4}), "expert id");
}

}  // namespace
}  // namespace penstock
