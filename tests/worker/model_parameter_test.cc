#include "worker/model/parameter.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "tests/worker/model_test_support.h"

namespace penstock {
namespace {

ParameterSetOptions whole(const ModelConfig& model) {
  return {{0, model.num_hidden_layers}, {0, model.n_routed_experts}, true, true, true};
}

TEST(ParameterTest, TensorsLieInTheFlatBufferOfTheirKindWithoutOverlap) {
  const ModelConfig model = tiny_model();
  ParameterSet set(model, whole(model));
  int64_t ends[2] = {0, 0};
  for (const Parameter& parameter : set.all()) {
    int64_t& end = ends[static_cast<int>(parameter.kind)];
    EXPECT_GE(parameter.offset, end) << parameter.name;
    EXPECT_LT(parameter.offset - end, kParameterAlignment) << parameter.name;
    EXPECT_EQ(parameter.value, set.values(parameter.kind).data() + parameter.offset);
    EXPECT_EQ(parameter.gradient, set.gradients(parameter.kind).data() + parameter.offset);
    EXPECT_EQ(parameter.kind == ParameterKind::kExpert, parameter.expert >= 0) << parameter.name;
    end = parameter.offset + parameter.size;
  }
  for (const ParameterKind kind : {ParameterKind::kDense, ParameterKind::kExpert}) {
    const auto size = static_cast<int64_t>(set.values(kind).size());
    EXPECT_EQ(size % kParameterAlignment, 0);
    EXPECT_LT(size - ends[static_cast<int>(kind)], kParameterAlignment);
  }
}

TEST(ParameterTest, ExpertsOfOneLayerAreEquallyFarApart) {
  const ModelConfig model = tiny_model();
  ParameterSet set(model, whole(model));
  for (const char* tensor : {"gate_proj", "up_proj", "down_proj"}) {
    const auto offset = [&](int64_t expert) {
      return set.find(fmt::format("model.layers.2.mlp.experts.{}.{}.weight", expert, tensor))
          ->offset;
    };
    const int64_t stride = offset(1) - offset(0);
    for (int64_t e = 2; e < model.n_routed_experts; ++e) {
      EXPECT_EQ(offset(e) - offset(e - 1), stride) << tensor << e;
    }
  }
}

TEST(ParameterTest, ASetHasTheExpertsOfItsSeatsUnderTheirOwnNames) {
  const ModelConfig model = tiny_model();
  ASSERT_EQ(model.n_routed_experts, 8);
  const ParameterSet set(
      model, {.layers = {2, 4}, .experts = {2, 4}, .seats = {{{2, {7, 6, 5, 4, 3, 2, 1, 0}}}}});
  std::vector<std::string> names;
  for (const Parameter& parameter : set.all()) {
    if (parameter.expert >= 0 && parameter.name.ends_with("up_proj.weight")) {
      names.push_back(parameter.name);
      EXPECT_NE(parameter.name.find(fmt::format("experts.{}.", parameter.expert)),
                std::string::npos);
    }
  }
  EXPECT_EQ(names, (std::vector<std::string>{"model.layers.2.mlp.experts.5.up_proj.weight",
                                             "model.layers.2.mlp.experts.4.up_proj.weight",
                                             "model.layers.3.mlp.experts.2.up_proj.weight",
                                             "model.layers.3.mlp.experts.3.up_proj.weight"}));
}

TEST(ParameterTest, NamesAndShapesAreThePublishedOnes) {
  const ModelConfig model = tiny_model();
  const ParameterSet set(model, whole(model));
  const auto shape = [&](const std::string& name) {
    const Parameter* parameter = set.find(name);
    return parameter ? parameter->shape : std::vector<int64_t>{};
  };
  using Shape = std::vector<int64_t>;
  EXPECT_EQ(shape("model.embed_tokens.weight"), (Shape{37, 32}));
  EXPECT_EQ(shape("model.layers.0.self_attn.q_a_proj.weight"), (Shape{16, 32}));
  EXPECT_EQ(shape("model.layers.0.self_attn.q_b_proj.weight"), (Shape{24, 16}));
  EXPECT_EQ(shape("model.layers.0.self_attn.kv_a_proj_with_mqa.weight"), (Shape{16, 32}));
  EXPECT_EQ(shape("model.layers.0.self_attn.kv_b_proj.weight"), (Shape{28, 12}));
  EXPECT_EQ(shape("model.layers.0.self_attn.o_proj.weight"), (Shape{32, 12}));
  EXPECT_EQ(shape("model.layers.0.mlp.down_proj.weight"), (Shape{32, 40}));
  EXPECT_EQ(shape("model.layers.1.mlp.gate.weight"), (Shape{8, 32}));
  EXPECT_EQ(shape("model.layers.1.mlp.experts.7.down_proj.weight"), (Shape{32, 12}));
  EXPECT_EQ(shape("model.layers.1.mlp.shared_experts.up_proj.weight"), (Shape{12, 32}));
  EXPECT_EQ(shape("model.norm.weight"), (Shape{32}));
  EXPECT_EQ(shape("model.layers.4.input_layernorm.weight"), Shape{}) << "there is no layer 4";
}

TEST(ParameterTest, InitialValuesDependOnSeedAndNameAloneAndNotOnTheLayout) {
  const ModelConfig model = tiny_model();
  ParameterSet all(model, whole(model));
  ParameterSet part(model, {{2, 3}, {4, 6}, false, false, false});
  all.initialize(5, 0.02);
  part.initialize(5, 0.02);
  ASSERT_GT(part.all().size(), 10u);
  for (const Parameter& parameter : part.all()) {
    const Parameter* twin = all.find(parameter.name);
    ASSERT_NE(twin, nullptr) << parameter.name;
    EXPECT_TRUE(std::equal(parameter.value, parameter.value + parameter.size, twin->value))
        << parameter.name;
    EXPECT_EQ(parameter.gradient, nullptr);
  }
  ParameterSet other(model, whole(model));
  other.initialize(6, 0.02);
  const std::string name = "lm_head.weight";
  EXPECT_NE(other.find(name)->value[0], all.find(name)->value[0]);
}

TEST(ParameterTest, InitialMatricesAreNormalWithTheGivenDeviationAndNormsAreOne) {
  ModelConfig model = tiny_model();
  model.vocab_size = 4096;
  ParameterSet set(model, whole(model));
  set.initialize(1, 0.05);
  const Parameter* matrix = set.find("lm_head.weight");
  double sum = 0.0, squares = 0.0;
  int64_t beyond_two = 0;
  for (int64_t i = 0; i < matrix->size; ++i) {
    sum += matrix->value[i];
    squares += static_cast<double>(matrix->value[i]) * matrix->value[i];
    beyond_two += std::abs(matrix->value[i]) > 0.1;
  }
  const auto count = static_cast<double>(matrix->size);
  EXPECT_NEAR(sum / count, 0.0, 5 * 0.05 / std::sqrt(count));
  EXPECT_NEAR(std::sqrt(squares / count), 0.05, 0.001);
  EXPECT_NEAR(static_cast<double>(beyond_two) / count, 0.0455, 0.005);  // 2 sigma
  const Parameter* norm = set.find("model.norm.weight");
  EXPECT_TRUE(std::all_of(norm->value, norm->value + norm->size, [](float v) { return v == 1; }));
}

TEST(ParameterTest, WeightDecayIsForMatricesOnly) {
  const ModelConfig model = tiny_model();
  const ParameterSet set(model, whole(model));
  for (const Parameter& parameter : set.all()) {
    const bool is_norm = parameter.name.find("norm") != std::string::npos;
    EXPECT_EQ(parameter.decays(), !is_norm) << parameter.name;
  }
}

TEST(ParameterTest, WithoutQueryCompressionThereIsOneQueryMatrix) {
  ModelConfig model = tiny_model();
  model.q_lora_rank.reset();
  const ParameterSet set(model, whole(model));
  EXPECT_NE(set.find("model.layers.0.self_attn.q_proj.weight"), nullptr);
  EXPECT_EQ(set.find("model.layers.0.self_attn.q_a_proj.weight"), nullptr);
  EXPECT_EQ(set.find("model.layers.0.self_attn.q_a_layernorm.weight"), nullptr);
}

}  // namespace
}  // namespace penstock
