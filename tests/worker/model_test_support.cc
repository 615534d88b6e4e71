#include "tests/worker/model_test_support.h"

#include <gtest/gtest.h>

#include <cmath>

#include "comm/base/random.h"

namespace penstock {

ModelConfig tiny_model() {
  ModelConfig model;
  model.vocab_size = 37;
  model.hidden_size = 32;
  model.num_hidden_layers = 4;
  model.num_attention_heads = 2;
  model.q_lora_rank = 16;
  model.kv_lora_rank = 12;
  model.qk_nope_head_dim = 8;
  model.qk_rope_head_dim = 4;
  model.v_head_dim = 6;
  model.intermediate_size = 40;
  model.first_k_dense_replace = 1;
  model.moe_intermediate_size = 12;
  model.n_routed_experts = 8;
  model.n_shared_experts = 1;
  model.num_experts_per_tok = 3;
  model.n_group = 4;
  model.topk_group = 2;
  model.routed_scaling_factor = 2.5;
  model.max_position_embeddings = 64;
  return model;
}

TokenBatch TokenBatch::part(int64_t first_sequence, int64_t sequence_count) const {
  const auto cut = [&](const std::vector<int32_t>& all) {
    const auto begin = all.begin() + first_sequence * length;
    return std::vector<int32_t>(begin, begin + sequence_count * length);
  };
  return {sequence_count, length, cut(tokens), cut(targets)};
}

TokenBatch random_batch(const ModelConfig& model, int64_t sequences, int64_t length,
                        uint64_t seed) {
  Random random(seed, 1);
  TokenBatch batch{sequences, length, {}, {}};
  for (int64_t i = 0; i < batch.count(); ++i) {
    const auto vocab = static_cast<uint64_t>(model.vocab_size);
    batch.tokens.push_back(static_cast<int32_t>(random.below(vocab)));
    batch.targets.push_back(static_cast<int32_t>(random.below(vocab)));
  }
  return batch;
}

Pipeline::Pipeline(const Options& options, Kernels& kernels)
    : prediction_weight_(options.prediction_weight) {
  uint64_t tag_base = 0;
  for (int64_t i = 0; i < options.stage_count; ++i) {
    StageOptions stage;
    stage.model = options.model;
    stage.stage_index = i;
    stage.stage_count = options.stage_count;
    stage.expert_count = options.expert_count;
    stage.expert_index = options.expert_index;
    stage.sequences_max = options.sequences_max;
    stage.sequence_length_max = options.length_max;
    stage.slot_count = 2;
    stage.gradient_slot_count = 2;
    stage.tag_base = tag_base;
    stage.precision = options.precision;
    stage.recompute = options.recompute;
    tag_base += expert_tag_count(stage);
    std::vector<Rank> group;
    for (int32_t r = 0; r < options.expert_count; ++r) group.push_back(Rank{r});
    exchanges_.push_back(nullptr);
    if (has_moe_layer(stage)) {
      exchanges_.back() =
          ExpertExchange::create(options.transport, expert_exchange_config(stage, group)).value();
    }
    stages_.push_back(std::make_unique<Stage>(stage, kernels, exchanges_.back().get()));
  }
}

void Pipeline::initialize(uint64_t seed) {
  for (const auto& stage : stages_) stage->initialize(seed);
}

void Pipeline::zero_gradients() {
  for (const auto& stage : stages_) stage->parameters().zero_gradients();
}

namespace {

MicroBatch micro_batch_of(const TokenBatch& batch, double loss_scale) {
  MicroBatch micro_batch;
  micro_batch.sequence_count = batch.sequences;
  micro_batch.sequence_length = batch.length;
  micro_batch.tokens = batch.tokens;
  micro_batch.targets = batch.targets;
  micro_batch.loss_scale = loss_scale;
  return micro_batch;
}

void expect_ok(const Status& status) {
  PENSTOCK_CHECK(status.ok(), status.to_string());
}

void hand_over(std::span<const float> from, std::span<float> to) {
  std::copy(from.begin(), from.end(), to.begin());
}

}  // namespace

double Pipeline::train(const TokenBatch& batch, double loss_scale, BackwardMode mode) {
  MicroBatch micro_batch = micro_batch_of(batch, loss_scale);
  micro_batch.prediction_weight = prediction_weight_;
  for (size_t s = 0; s < stages_.size(); ++s) {
    if (s > 0) hand_over(stages_[s - 1]->output(0), stages_[s]->input(0));
    expect_ok(stages_[s]->forward(0, micro_batch).run());
  }
  for (size_t s = stages_.size(); s-- > 0;) {
    if (s + 1 < stages_.size()) {
      hand_over(stages_[s + 1]->input_gradient(0), stages_[s]->output_gradient(0));
    }
    if (mode == BackwardMode::kFull) {
      expect_ok(stages_[s]->backward(0).run());
    } else {
      expect_ok(stages_[s]->backward_input(0).run());
    }
  }
  for (const auto& stage : stages_) {
    while (stage->weight_queue_depth() > 0) expect_ok(stage->weight().run());
  }
  return stages_.back()->loss_sum(0);
}

double Pipeline::evaluate(const TokenBatch& batch) {
  const MicroBatch micro_batch = micro_batch_of(batch, 0.0);
  for (size_t s = 0; s < stages_.size(); ++s) {
    if (s > 0) hand_over(stages_[s - 1]->output(1), stages_[s]->input(1));
    expect_ok(stages_[s]->forward_only(1, micro_batch).run());
  }
  return stages_.back()->loss_sum(1);
}

void Pipeline::for_each(const std::function<void(const Parameter&)>& visit) const {
  for (const auto& stage : stages_) {
    for (const Parameter& parameter : stage->parameters().all()) visit(parameter);
  }
}

std::map<std::string, std::vector<float>> Pipeline::gradients() const {
  std::map<std::string, std::vector<float>> all;
  for_each([&](const Parameter& parameter) {
    std::vector<float>& sum = all[parameter.name];
    sum.resize(static_cast<size_t>(parameter.size), 0.0F);
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += parameter.gradient[i];
  });
  return all;
}

double relative_difference(std::span<const float> a, std::span<const float> b) {
  PENSTOCK_CHECK(a.size() == b.size(), a.size(), b.size());
  double difference = 0.0, size = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
    size += std::pow(static_cast<double>(b[i]), 2);
  }
  return size == 0.0 ? std::sqrt(difference) : std::sqrt(difference / size);
}

}  // namespace penstock
