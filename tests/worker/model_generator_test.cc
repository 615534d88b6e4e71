#include "worker/model/generator.h"

#include <gtest/gtest.h>

#include <set>

#include "kernels/cpu/cpu_kernels.h"
#include "tests/worker/model_test_support.h"

namespace penstock {
namespace {

// A generator with the weights of a freshly initialised model, made louder so that choices differ.
class GeneratorTest : public testing::Test {
 protected:
  GeneratorTest() : kernels_(make_cpu_kernels()), generator_(tiny_model(), 10) {
    Pipeline pipeline({.model = tiny_model()}, *kernels_);
    pipeline.initialize(13);
    for (const Generator::Weight& weight : generator_.weights()) {
      const Parameter* from = pipeline.stage(0).parameters().find(weight.name);
      if (from == nullptr) continue;  // router bias
      for (size_t i = 0; i < weight.values.size(); ++i) {
        weight.values[i] = from->value[i] * (from->decays() ? 10.0F : 1.0F);
      }
    }
  }

  std::vector<int32_t> generate(const SamplingOptions& options,
                                std::vector<int32_t> prompt = {1, 2, 3}) {
    return generator_.generate(prompt, options).value();
  }

  std::unique_ptr<Kernels> kernels_;
  Generator generator_;
};

TEST_F(GeneratorTest, NamesEveryWeightAndRouterBiasOnce) {
  std::map<std::string, size_t> seen;
  for (const Generator::Weight& weight : generator_.weights()) {
    ++seen[weight.name];
    int64_t count = 1;
    for (const int64_t extent : weight.shape) count *= extent;
    EXPECT_EQ(count, std::ssize(weight.values)) << weight.name;
  }
  EXPECT_EQ(seen.size(), generator_.weights().size());
  EXPECT_EQ(seen.count("model.layers.3.mlp.gate.e_score_correction_bias"), 1u);
  EXPECT_EQ(seen.count("model.layers.3.mlp.experts.7.up_proj.weight"), 1u);
}

TEST_F(GeneratorTest, EqualSeedsGiveEqualTokensAndOthersDoNot) {
  const auto once = generate({.token_count = 40, .temperature = 1.0, .seed = 5});
  EXPECT_EQ(once.size(), 40u);
  EXPECT_EQ(once, generate({.token_count = 40, .temperature = 1.0, .seed = 5}));
  EXPECT_NE(once, generate({.token_count = 40, .temperature = 1.0, .seed = 6}));
  for (const int32_t token : once) EXPECT_TRUE(token >= 0 && token < 37) << token;
}

TEST_F(GeneratorTest, TemperatureZeroAndTopOneAreTheLikeliestToken) {
  const auto greedy = generate({.token_count = 12, .temperature = 0.0, .seed = 1});
  EXPECT_EQ(greedy, generate({.token_count = 12, .temperature = 0.0, .seed = 2}));
  EXPECT_EQ(greedy, generate({.token_count = 12, .temperature = 1.0, .top_k = 1, .seed = 3}));
}

TEST_F(GeneratorTest, GreedyTokenIsTheArgumentOfTheLargestLogitOfTheWholeModel) {
  Pipeline pipeline({.model = tiny_model()}, *kernels_);
  Stage& stage = pipeline.stage(0);
  for (const Generator::Weight& weight : generator_.weights()) {
    const Parameter* to = stage.parameters().find(weight.name);
    if (to != nullptr) std::copy(weight.values.begin(), weight.values.end(), to->value);
  }
  const std::vector<int32_t> prompt = {4, 8, 15, 16};
  const auto token = generate({.token_count = 1, .temperature = 0.0}, prompt).at(0);
  ASSERT_TRUE(stage.forward_only(0, {1, 4, prompt, {}, 0.0}).run().ok());
  const auto logits = stage.logits(0).last(37);
  EXPECT_EQ(token, std::max_element(logits.begin(), logits.end()) - logits.begin());
}

TEST_F(GeneratorTest, TopKNeverDrawsOutsideTheKLikeliest) {
  const std::vector<int32_t> prompt = {9, 9, 4};
  std::set<int32_t> drawn;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    drawn.insert(
        generate({.token_count = 1, .temperature = 3.0, .top_k = 3, .seed = seed}, prompt).at(0));
  }
  EXPECT_EQ(drawn.size(), 3u);
  EXPECT_EQ(drawn.count(generate({.token_count = 1, .temperature = 0.0}, prompt).at(0)), 1u);
}

TEST_F(GeneratorTest, OnlyTheNewestTokensOfALongPromptMatter) {
  std::vector<int32_t> prompt(30, 1), tail(10, 1);
  for (size_t i = 0; i < 10; ++i) prompt[20 + i] = tail[i] = static_cast<int32_t>(i);
  prompt[3] = 20;
  const SamplingOptions options{.token_count = 5, .temperature = 0.0};
  EXPECT_EQ(generate(options, prompt), generate(options, tail));
}

TEST_F(GeneratorTest, TokensAreAnnouncedAsTheyAreDrawn) {
  std::vector<int32_t> announced;
  const std::vector<int32_t> prompt = {1};
  const auto tokens = generator_
                          .generate(prompt, {.token_count = 6, .seed = 2},
                                    [&](int32_t token) { announced.push_back(token); })
                          .value();
  EXPECT_EQ(announced, tokens);
}

TEST_F(GeneratorTest, AnEmptyOrForeignPromptIsRefused) {
  EXPECT_EQ(generator_.generate({}, {.token_count = 1}).status().code(), Code::kInvalidArgument);
  const std::vector<int32_t> foreign = {36, 37};
  const Status status = generator_.generate(foreign, {.token_count = 1}).status();
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_NE(status.message().find("37"), std::string::npos) << status.message();
}

}  // namespace
}  // namespace penstock
