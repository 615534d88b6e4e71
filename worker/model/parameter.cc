#include "worker/model/parameter.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "comm/base/hash.h"
#include "comm/base/random.h"

namespace penstock {
namespace {

int64_t rounded_up(int64_t size) {
  return (size + kParameterAlignment - 1) / kParameterAlignment * kParameterAlignment;
}

// Uniform in [0, 1) from two of Philox's words.
double uniform_of(uint32_t low, uint32_t high) {
  return static_cast<double>((uint64_t{high} << 32 | low) >> 11) * 0x1.0p-53;
}

// Two draws per Philox block (Box-Muller): element i is half of block i / 2.
void fill_normal(uint64_t seed, uint64_t stream, double deviation, std::span<float> values) {
  for (size_t i = 0; i < values.size(); i += 2) {
    const auto words = philox(seed, stream, i / 2);
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform_of(words[0], words[1])));
    const double angle = 2.0 * std::numbers::pi * uniform_of(words[2], words[3]);
    values[i] = static_cast<float>(deviation * radius * std::cos(angle));
    if (i + 1 < values.size()) {
      values[i + 1] = static_cast<float>(deviation * radius * std::sin(angle));
    }
  }
}

}  // namespace

ParameterSet::Buffer ParameterSet::allocate(std::string name, int64_t size) {
  if (size == 0) return {};
  Buffer buffer;
  buffer.memory =
      std::make_unique<Arena>(std::move(name), Arena::rounded_bytes(size, sizeof(float)));
  buffer.floats = {buffer.memory->floats(size), static_cast<size_t>(size)};
  return buffer;
}

ParameterSet::ParameterSet(const ModelConfig& model, const ParameterSetOptions& options) {
  const int64_t hidden = model.hidden_size;
  if (options.embedding) {
    add("model.embed_tokens.weight", {model.vocab_size, hidden},
        model.num_nextn_predict_layers > 0 ? Place::kShared : Place::kAligned);
  }
  for (int64_t layer = options.layers.begin; layer < options.layers.end; ++layer) {
    add_attention(model, layer);
    add_feed_forward(model, options, layer);
  }
  if (options.head) {
    add("model.norm.weight", {hidden});
    add("lm_head.weight", {model.vocab_size, hidden});
  }
  if (options.prediction) add_prediction(model, options);
  if (!options.memory) return;
  for (const ParameterKind kind : kParameterKinds) {
    const int64_t size = rounded_up(ends_[static_cast<int>(kind)]);
    values_[static_cast<int>(kind)] = allocate("parameters", size);
    if (options.gradients) gradients_[static_cast<int>(kind)] = allocate("gradients", size);
  }
  for (Parameter& parameter : parameters_) {
    parameter.value = values(parameter.kind).data() + parameter.offset;
    if (options.gradients) {
      parameter.gradient = gradients(parameter.kind).data() + parameter.offset;
    }
  }
}

void ParameterSet::add(std::string name, std::vector<int64_t> shape, Place place, int64_t expert) {
  Parameter parameter;
  parameter.name = std::move(name);
  parameter.size = 1;
  for (const int64_t extent : shape) parameter.size *= extent;
  parameter.shape = std::move(shape);
  parameter.kind = expert >= 0               ? ParameterKind::kExpert
                   : place == Place::kShared ? ParameterKind::kShared
                                             : ParameterKind::kDense;
  parameter.expert = expert;
  int64_t& end = ends_[static_cast<int>(parameter.kind)];
  parameter.offset = place == Place::kAdjacent ? end : rounded_up(end);
  end = parameter.offset + parameter.size;
  parameters_.push_back(std::move(parameter));
}

// The down-projections of queries and of keys and values lie behind each other, so that one matrix
// product serves both.
void ParameterSet::add_attention(const ModelConfig& model, int64_t layer) {
  const std::string stem = fmt::format("model.layers.{}.", layer);
  const std::string attention = stem + "self_attn.";
  const int64_t hidden = model.hidden_size;
  const int64_t heads = model.num_attention_heads;
  add(stem + "input_layernorm.weight", {hidden});
  if (model.q_lora_rank) {
    add(attention + "q_a_proj.weight", {*model.q_lora_rank, hidden});
  } else {
    add(attention + "q_proj.weight", {heads * model.qk_head_dim(), hidden});
  }
  add(attention + "kv_a_proj_with_mqa.weight",
      {model.kv_lora_rank + model.qk_rope_head_dim, hidden}, Place::kAdjacent);
  if (model.q_lora_rank) {
    add(attention + "q_a_layernorm.weight", {*model.q_lora_rank});
    add(attention + "q_b_proj.weight", {heads * model.qk_head_dim(), *model.q_lora_rank});
  }
  add(attention + "kv_a_layernorm.weight", {model.kv_lora_rank});
  add(attention + "kv_b_proj.weight",
      {heads * (model.qk_nope_head_dim + model.v_head_dim), model.kv_lora_rank});
  add(attention + "o_proj.weight", {hidden, heads * model.v_head_dim});
  add(stem + "post_attention_layernorm.weight", {hidden});
}

// Gate and up projections lie behind each other for the same reason, and every expert takes the
// same room, so that a stride leads from one to the next.
void ParameterSet::add_gated(const std::string& stem, int64_t width, int64_t hidden,
                             int64_t expert) {
  add(stem + "gate_proj.weight", {width, hidden}, Place::kAligned, expert);
  add(stem + "up_proj.weight", {width, hidden}, Place::kAdjacent, expert);
  add(stem + "down_proj.weight", {hidden, width}, Place::kAligned, expert);
}

void ParameterSet::add_feed_forward(const ModelConfig& model, const ParameterSetOptions& options,
                                    int64_t layer) {
  const std::string stem = fmt::format("model.layers.{}.mlp.", layer);
  const int64_t hidden = model.hidden_size;
  if (!model.is_moe(layer)) {
    add_gated(stem, model.intermediate_size, hidden, -1);
    return;
  }
  add(stem + "gate.weight", {model.n_routed_experts, hidden});
  if (model.n_shared_experts > 0) {
    add_gated(stem + "shared_experts.", model.n_shared_experts * model.moe_intermediate_size,
              hidden, -1);
  }
  const std::vector<int32_t> seated = experts_by_seat(options.seats, layer, model.n_routed_experts);
  for (int64_t seat = options.experts.begin; seat < options.experts.end; ++seat) {
    const int32_t expert = seated[static_cast<size_t>(seat)];
    add_gated(fmt::format("{}experts.{}.", stem, expert), model.moe_intermediate_size, hidden,
              expert);
  }
}

void ParameterSet::add_prediction(const ModelConfig& model, const ParameterSetOptions& options) {
  const int64_t layer = model.num_hidden_layers;
  const std::string stem = fmt::format("model.layers.{}.", layer);
  const int64_t hidden = model.hidden_size;
  add(stem + "enorm.weight", {hidden});
  add(stem + "hnorm.weight", {hidden});
  add(stem + "eh_proj.weight", {hidden, 2 * hidden});
  add_attention(model, layer);
  add_feed_forward(model, options, layer);
  add(stem + "shared_head.norm.weight", {hidden});
}

const Parameter* ParameterSet::find(std::string_view name) const {
  const auto found = std::find_if(parameters_.begin(), parameters_.end(),
                                  [&](const Parameter& p) { return p.name == name; });
  return found == parameters_.end() ? nullptr : &*found;
}

std::span<float> ParameterSet::values(ParameterKind kind) {
  return values_[static_cast<int>(kind)].floats;
}

std::span<const float> ParameterSet::values(ParameterKind kind) const {
  return values_[static_cast<int>(kind)].floats;
}

std::span<float> ParameterSet::gradients(ParameterKind kind) {
  return gradients_[static_cast<int>(kind)].floats;
}

void ParameterSet::initialize(uint64_t seed, double initializer_range) {
  for (const Parameter& parameter : parameters_) {
    const std::span<float> value(parameter.value, static_cast<size_t>(parameter.size));
    if (parameter.shape.size() == 1) {
      std::fill(value.begin(), value.end(), 1.0F);
    } else {
      fill_normal(seed, digest_of(as_bytes(parameter.name)).low, initializer_range, value);
    }
  }
}

void ParameterSet::zero_gradients() {
  for (const ParameterKind kind : kParameterKinds) {
    const std::span<float> gradient = gradients(kind);
    std::fill(gradient.begin(), gradient.end(), 0.0F);
  }
}

}  // namespace penstock
