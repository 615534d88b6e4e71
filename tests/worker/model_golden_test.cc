// The whole model against transformers' DeepseekV3ForCausalLM: see
// tests/fixtures/make_deepseek_v3_golden.py.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <set>

#include "comm/base/file.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/reference/reference_kernels.h"
#include "tests/worker/model_test_support.h"

namespace penstock {
namespace {

// A safetensors file: u64 header length, JSON header, data.
class Fixture {
 public:
  explicit Fixture(const std::string& name)
      : bytes_(
            read_file(Path(PENSTOCK_FIXTURES) / ("deepseek_v3_" + name + ".safetensors"), 1 << 20)
                .value()) {
    uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, bytes_.data(), sizeof(header_bytes));
    header_ = nlohmann::json::parse(bytes_.substr(8, header_bytes));
    data_ = 8 + header_bytes;
  }

  template <typename T>
  std::vector<T> tensor(const std::string& name) const {
    const auto& offsets = header_.at(name).at("data_offsets");
    const size_t begin = offsets[0], end = offsets[1];
    std::vector<T> values((end - begin) / sizeof(T));
    std::memcpy(values.data(), bytes_.data() + data_ + begin, end - begin);
    return values;
  }
  std::vector<int64_t> shape(const std::string& name) const {
    return header_.at(name).at("shape").get<std::vector<int64_t>>();
  }
  // Names that start with `prefix`, without it.
  std::vector<std::string> names(const std::string& prefix) const {
    std::vector<std::string> found;
    for (const auto& [name, entry] : header_.items()) {
      if (name.starts_with(prefix)) found.push_back(name.substr(prefix.size()));
    }
    return found;
  }

  ModelConfig config() const {
    const auto keys =
        nlohmann::json::parse(header_.at("__metadata__").at("config").get<std::string>());
    ModelConfig model;
    model.vocab_size = keys.at("vocab_size");
    model.hidden_size = keys.at("hidden_size");
    model.num_hidden_layers = keys.at("num_hidden_layers");
    model.num_attention_heads = keys.at("num_attention_heads");
    if (!keys.at("q_lora_rank").is_null()) model.q_lora_rank = keys.at("q_lora_rank");
    model.kv_lora_rank = keys.at("kv_lora_rank");
    model.qk_nope_head_dim = keys.at("qk_nope_head_dim");
    model.qk_rope_head_dim = keys.at("qk_rope_head_dim");
    model.v_head_dim = keys.at("v_head_dim");
    model.intermediate_size = keys.at("intermediate_size");
    model.first_k_dense_replace = keys.at("first_k_dense_replace");
    model.moe_intermediate_size = keys.at("moe_intermediate_size");
    model.n_routed_experts = keys.at("n_routed_experts");
    model.n_shared_experts = keys.at("n_shared_experts");
    model.num_experts_per_tok = keys.at("num_experts_per_tok");
    model.n_group = keys.at("n_group");
    model.topk_group = keys.at("topk_group");
    model.routed_scaling_factor = keys.at("routed_scaling_factor");
    model.norm_topk_prob = keys.at("norm_topk_prob");
    model.rms_norm_eps = keys.at("rms_norm_eps");
    model.rope_theta = keys.at("rope_theta");
    model.max_position_embeddings = keys.at("max_position_embeddings");
    model.aux_loss_alpha = keys.value("aux_loss_alpha", 0.0);
    model.num_nextn_predict_layers = keys.value("num_nextn_predict_layers", 0);
    if (keys.contains("rope_scaling")) {
      const auto& yarn = keys.at("rope_scaling");
      model.rope_scaling = {
          .factor = yarn.at("factor"),
          .original_max_position_embeddings = yarn.at("original_max_position_embeddings"),
          .beta_fast = yarn.at("beta_fast"),
          .beta_slow = yarn.at("beta_slow"),
          .mscale = yarn.at("mscale"),
          .mscale_all_dim = yarn.at("mscale_all_dim")};
    }
    return model;
  }

  TokenBatch batch() const {
    const std::vector<int64_t> extents = shape("tokens");
    return {extents[0], extents[1], tensor<int32_t>("tokens"), tensor<int32_t>("targets")};
  }

 private:
  std::string bytes_;
  nlohmann::json header_;
  size_t data_ = 0;
};

struct Case {
  std::string fixture;
  std::string backend;
  int64_t stage_count;
};

std::string name_of(const Case& c) {
  return c.fixture + "_" + c.backend + "_" + std::to_string(c.stage_count) + "stages";
}
// CTest names the test after this.
void PrintTo(const Case& c, std::ostream* out) {
  *out << name_of(c);
}

class GoldenTest : public testing::TestWithParam<Case> {
 protected:
  GoldenTest()
      : fixture_(GetParam().fixture),
        kernels_(GetParam().backend == "cpu" ? make_cpu_kernels() : make_reference_kernels()),
        pipeline_({.model = fixture_.config(), .stage_count = GetParam().stage_count}, *kernels_) {
    std::set<std::string> loaded;  // stages may hold copies
    pipeline_.for_each([&](const Parameter& parameter) {
      const auto values = fixture_.tensor<float>("weight:" + parameter.name);
      EXPECT_EQ(fixture_.shape("weight:" + parameter.name), parameter.shape) << parameter.name;
      std::copy(values.begin(), values.end(), parameter.value);
      loaded.insert(parameter.name);
    });
    for (int64_t s = 0; s < pipeline_.stage_count(); ++s) {
      for (const Router& router : pipeline_.stage(s).routers()) {
        const auto values = fixture_.tensor<float>("weight:" + router.bias_name);
        std::copy(values.begin(), values.end(), router.bias.begin());
        loaded.insert(router.bias_name);
      }
    }
    EXPECT_EQ(loaded.size(), fixture_.names("weight:").size())
        << "a tensor of the fixture has no place";
  }

  Fixture fixture_;
  std::unique_ptr<Kernels> kernels_;
  Pipeline pipeline_;
};

TEST_P(GoldenTest, LogitsAndLossEqualTransformers) {
  const TokenBatch batch = fixture_.batch();
  const double loss = pipeline_.evaluate(batch) / static_cast<double>(batch.count());
  EXPECT_NEAR(loss, fixture_.tensor<float>("loss")[0], 1e-5);
  const std::span<const float> logits = pipeline_.stage(pipeline_.stage_count() - 1).logits(1);
  const auto expected = fixture_.tensor<float>("logits");
  ASSERT_EQ(logits.size(), expected.size());
  double worst = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    worst = std::max(worst, std::abs(static_cast<double>(logits[i]) - expected[i]));
  }
  EXPECT_LT(worst, 1e-4);
  RecordProperty("largest_difference", std::to_string(worst));
}

TEST_P(GoldenTest, EveryGradientEqualsAutograd) {
  const TokenBatch batch = fixture_.batch();
  pipeline_.train(batch, 1.0 / static_cast<double>(batch.count()));
  double balance = 0.0;
  for (int64_t s = 0; s < pipeline_.stage_count(); ++s) {
    balance += pipeline_.stage(s).balance_loss_sum(0) / static_cast<double>(batch.count());
  }
  EXPECT_NEAR(balance, fixture_.tensor<float>("balance_loss")[0], 1e-5);
  const double predicted = pipeline_.stage(pipeline_.stage_count() - 1).prediction_loss_sum(0);
  EXPECT_NEAR(predicted / static_cast<double>(batch.count()), fixture_.tensor<float>("mtp_loss")[0],
              1e-5);
  const auto gradients = pipeline_.gradients();
  ASSERT_EQ(gradients.size(), fixture_.names("gradient:").size());
  for (const auto& [name, gradient] : gradients) {
    EXPECT_LT(relative_difference(gradient, fixture_.tensor<float>("gradient:" + name)), 1e-4)
        << name;
  }
}

INSTANTIATE_TEST_SUITE_P(All, GoldenTest,
                         testing::Values(Case{"grouped", "reference", 1}, Case{"grouped", "cpu", 1},
                                         Case{"grouped", "cpu", 2}, Case{"plain", "reference", 1},
                                         Case{"plain", "cpu", 1}, Case{"plain", "cpu", 3},
                                         Case{"dense", "cpu", 2}, Case{"yarn", "reference", 1},
                                         Case{"yarn", "cpu", 2}, Case{"balance", "reference", 1},
                                         Case{"balance", "cpu", 2}, Case{"mtp", "reference", 1},
                                         Case{"mtp", "cpu", 1}, Case{"mtp", "cpu", 2}),
                         [](const auto& info) { return name_of(info.param); });

}  // namespace
}  // namespace penstock
