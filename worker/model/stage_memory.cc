// Construction of a stage: which buffers there are and where they lie.

#include "worker/model/rope.h"
#include "worker/model/stage_impl.h"

namespace penstock {
namespace {

TokenShape largest(const StageOptions& options) {
  return {options.sequences_max, options.sequence_length_max};
}

ParameterSetOptions parameter_options(const StageOptions& options, Range layers) {
  ParameterSetOptions result;
  result.layers = layers;
  result.experts =
      local_experts(options.model.n_routed_experts, options.expert_count, options.expert_index);
  result.seats = options.seats;
  result.gradients = options.gradient_slot_count > 0;
  result.head = options.stage_index == options.stage_count - 1;
  result.prediction = result.head && result.gradients && options.model.num_nextn_predict_layers > 0;
  result.embedding =
      options.stage_index == 0 || (result.prediction && !options.embedding_elsewhere);
  return result;
}

}  // namespace

Stage::Impl::Impl(const StageOptions& stage_options, Kernels& backend,
                  ExpertExchange* expert_exchange)
    : options(stage_options),
      layer_range(stage_layers(stage_options.model.num_hidden_layers, stage_options.stage_count,
                               stage_options.stage_index)),
      kernels(backend),
      exchange(expert_exchange),
      linears(backend, stage_options.precision) {
  PENSTOCK_CHECK(layer_range.size() > 0, "a stage needs a layer");
  PENSTOCK_CHECK(options.slot_count > 0 && options.gradient_slot_count >= 0, options.slot_count);
  PENSTOCK_CHECK(options.sequences_max > 0 && options.sequence_length_max > 0);
  PENSTOCK_CHECK(exchange != nullptr || !has_moe_layer(options), "a MoE layer needs an exchange");
  parameters =
      std::make_unique<ParameterSet>(options.model, parameter_options(options, layer_range));
  embedding = parameters->find("model.embed_tokens.weight");
  final_norm = parameters->find("model.norm.weight");
  head_weight = parameters->find("lm_head.weight");
  find_prediction_parameters();
  const int64_t pairs = options.model.qk_rope_head_dim / 2;
  cosine_.resize(static_cast<size_t>(options.sequence_length_max * pairs));
  sine_.resize(cosine_.size());
  make_rope_tables(options.model, options.sequence_length_max, cosine_.data(), sine_.data());
  make_recompute_buffers();
  make_layers();
  for (const PassKind kind :
       {PassKind::kForward, PassKind::kBackward, PassKind::kBackwardInput, PassKind::kWeight}) {
    training_ops[static_cast<size_t>(kind)] =
        penstock::pass_ops(kind, layer_count_of_pass(true), is_first(), is_last());
  }
  evaluation_ops =
      penstock::pass_ops(PassKind::kForward, layer_count_of_pass(false), is_first(), is_last());
  make_routers();
  make_slots();
  make_shared_buffers();
  weight_queue.reserve(static_cast<size_t>(options.gradient_slot_count));
}

void Stage::Impl::make_layers() {
  const ModelConfig& model = options.model;
  const Range seats =
      local_experts(model.n_routed_experts, options.expert_count, options.expert_index);
  int32_t moe_count = 0;
  layers.resize(static_cast<size_t>(layer_range.size() + (predicts_ahead() ? 1 : 0)));
  for (size_t i = 0; i < layers.size(); ++i) {
    StageLayer& layer = layers[i];
    layer.number = layer_range.begin + static_cast<int64_t>(i);
    const bool moe = model.is_moe(layer.number);
    if (moe) layer.moe_index = moe_count++;
    const std::string stem = fmt::format("model.layers.{}.", layer.number);
    layer.middle_norm = parameters->find(stem + "post_attention_layernorm.weight");
    layer.attention.emplace(kernels, linears, model, *parameters, layer.number, cosine_.data(),
                            sine_.data(), attention_recomputed_);
    layer.feed_forward.emplace(kernels, linears, *parameters,
                               stem + (moe ? "mlp.shared_experts." : "mlp."),
                               feed_forward_width(layer), model.hidden_size);
    if (!moe) continue;
    const std::vector<int32_t> seated =
        experts_by_seat(options.seats, layer.number, model.n_routed_experts);
    layer.experts.emplace(kernels, linears, model, *parameters, layer.number,
                          std::span(seated).subspan(static_cast<size_t>(seats.begin),
                                                    static_cast<size_t>(seats.size())));
    if (options.seats.layers.contains(layer.number)) {
      layer.seat_of = seats_by_expert(options.seats, layer.number, model.n_routed_experts);
    }
  }
}

void Stage::Impl::make_routers() {
  const auto experts = static_cast<size_t>(options.model.n_routed_experts);
  size_t moe_count = 0;
  for (const StageLayer& layer : layers) moe_count += layer.moe_index >= 0;
  biases.assign(moe_count * experts, 0.0F);
  loads.assign(moe_count * experts, 0);
  for (const StageLayer& layer : layers) {
    if (layer.moe_index < 0) continue;
    const size_t begin = static_cast<size_t>(layer.moe_index) * experts;
    routers.push_back(
        {layer.number,
         fmt::format("model.layers.{}.mlp.gate.e_score_correction_bias", layer.number),
         std::span(biases).subspan(begin, experts), std::span(loads).subspan(begin, experts)});
  }
}

int64_t Stage::Impl::feed_forward_width(const StageLayer& layer) const {
  const ModelConfig& model = options.model;
  return model.is_moe(layer.number) ? model.n_shared_experts * model.moe_intermediate_size
                                    : model.intermediate_size;
}

LayerActivations Stage::Impl::take_layer(MemoryPlan& plan, const StageLayer& layer) const {
  const TokenShape shape = largest(options);
  const int64_t tokens = shape.tokens();
  LayerActivations kept;
  kept.attention =
      AttentionBlock::take_activations(plan, options.model, shape, attention_recomputed_);
  kept.middle = plan.floats(tokens * options.model.hidden_size);
  kept.normed = forward_normed_ != nullptr ? forward_normed_
                                           : plan.floats(tokens * options.model.hidden_size);
  kept.inverse_rms = plan.floats(tokens);
  kept.gate_up = plan.floats(tokens * 2 * feed_forward_width(layer));
  if (layer.experts) {
    kept.experts = ExpertBlock::take_activations(plan, options.model, shape, options.expert_count);
  }
  return kept;
}

LayerDeltas Stage::Impl::take_layer_deltas(MemoryPlan& plan, const StageLayer& layer) const {
  const TokenShape shape = largest(options);
  const int64_t tokens = shape.tokens();
  LayerDeltas deltas;
  deltas.attention = AttentionBlock::take_deltas(plan, options.model, shape);
  deltas.middle = plan.floats(tokens * options.model.hidden_size);
  deltas.feed_forward = FeedForwardBlock::take_deltas(plan, tokens, feed_forward_width(layer));
  if (layer.experts) {
    deltas.experts = ExpertBlock::take_deltas(plan, options.model, tokens, options.expert_count);
  }
  return deltas;
}

// A stage that never runs backward keeps nothing: layers take turns on two sets of buffers, two
// because a layer reads its own input while the next one's is filled.
StageSlot Stage::Impl::take_slot(MemoryPlan& plan) const {
  const int64_t tokens = largest(options).tokens();
  const int64_t floats = tokens * options.model.hidden_size;
  StageSlot slot;
  for (size_t i = 0; i < layers.size(); ++i) {
    const bool own = trains() || i < 2;
    slot.x.push_back(own ? plan.floats(floats) : slot.x[i - 2]);
    // Layers that take turns may differ in kind, so only equal kinds share.
    const bool same = !own && layers[i].experts.has_value() == layers[i - 2].experts.has_value();
    slot.layers.push_back(same ? slot.layers[i - 2] : take_layer(plan, layers[i]));
  }
  slot.x.push_back(plan.floats(floats));
  if (trains() && !is_first()) slot.input_gradient = plan.floats(floats);
  if (trains() && !is_last()) slot.output_gradient = plan.floats(floats);
  if (is_last()) {
    slot.head = take_head(plan, tokens);
  }
  if (predicts_ahead()) slot.prediction = take_prediction(plan, tokens);
  return slot;
}

HeadActivations Stage::Impl::take_head(MemoryPlan& plan, int64_t tokens) const {
  HeadActivations kept;
  kept.normed = plan.floats(tokens * options.model.hidden_size);
  kept.inverse_rms = plan.floats(tokens);
  kept.logits = plan.floats(tokens * options.model.vocab_size);
  kept.losses = plan.floats(tokens);
  return kept;
}

GradientSlot Stage::Impl::take_gradient_slot(MemoryPlan& plan) const {
  const int64_t floats = largest(options).tokens() * options.model.hidden_size;
  GradientSlot gradient;
  for (int32_t i = 0; i <= layer_count(); ++i) {
    const bool exchanged = (i == 0 && !is_first()) || (i == layer_count() && !is_last());
    gradient.x.push_back(exchanged ? nullptr : plan.floats(floats));
  }
  for (const StageLayer& layer : layers) gradient.layers.push_back(take_layer_deltas(plan, layer));
  if (predicts_ahead()) {
    gradient.prediction_input = plan.floats(floats);
    gradient.embedded = plan.floats(floats);
  }
  return gradient;
}

Arena& Stage::Impl::make_arena(const char* name, int64_t bytes) {
  buffer_bytes += static_cast<uint64_t>(bytes);
  return *arenas_.emplace_back(std::make_unique<Arena>(name, bytes));
}

// Stages that never run backward keep nothing anyway.
void Stage::Impl::make_recompute_buffers() {
  const TokenShape shape = largest(options);
  const Recompute recompute = trains() ? options.recompute : Recompute{};
  const auto take = [&](MemoryPlan& plan) {
    attention_recomputed_ = AttentionBlock::take_recomputed(plan, options.model, shape, recompute);
    if (!recompute.norms) return;
    forward_normed_ = plan.floats(shape.tokens() * options.model.hidden_size);
    backward_normed_ = plan.floats(shape.tokens() * options.model.hidden_size);
  };
  MemoryPlan size;
  take(size);
  if (size.bytes() == 0) return;
  MemoryPlan plan(make_arena("recomputed activations", size.bytes()));
  take(plan);
}

void Stage::Impl::make_slots() {
  MemoryPlan slot_size;
  take_slot(slot_size);
  MemoryPlan slot_plan(make_arena("activations", slot_size.bytes() * options.slot_count));
  for (int32_t i = 0; i < options.slot_count; ++i) slots.push_back(take_slot(slot_plan));

  MemoryPlan gradient_size;
  take_gradient_slot(gradient_size);
  if (!trains()) return;
  MemoryPlan gradient_plan(
      make_arena("gradients of activations", gradient_size.bytes() * options.gradient_slot_count));
  for (int32_t i = 0; i < options.gradient_slot_count; ++i) {
    gradient_slots.push_back(take_gradient_slot(gradient_plan));
  }
}

// Scratch members share memory: each is placed from the arena's start again.
void Stage::Impl::make_shared_buffers() {
  const ModelConfig& model = options.model;
  const TokenShape shape = largest(options);
  const int64_t tokens = shape.tokens();
  const bool moe = !routers.empty();
  int64_t width = 0;
  for (const StageLayer& layer : layers) width = std::max(width, feed_forward_width(layer));

  MemoryPlan attention, experts, feed_forward, hidden;
  AttentionBlock::take_scratch(attention, kernels, model, shape);
  if (moe) ExpertBlock::take_scratch(experts, model, tokens, options.expert_count);
  feed_forward.floats(tokens * width);
  hidden.floats(tokens * model.hidden_size);
  if (predicts_ahead()) hidden.floats(tokens * 2 * model.hidden_size);
  Arena& arena = make_arena("scratch", std::max({attention.bytes(), experts.bytes(),
                                                 feed_forward.bytes(), hidden.bytes()}));
  const Arena::Mark start = arena.mark();
  MemoryPlan plan(arena);
  scratch_.attention = AttentionBlock::take_scratch(plan, kernels, model, shape);
  arena.rewind(start);
  if (moe) scratch_.experts = ExpertBlock::take_scratch(plan, model, tokens, options.expert_count);
  arena.rewind(start);
  scratch_.feed_forward = plan.floats(tokens * width);
  arena.rewind(start);
  scratch_.hidden = plan.floats(tokens * model.hidden_size);
  if (predicts_ahead()) scratch_.pair = plan.floats(tokens * 2 * model.hidden_size);

  const ExpertCapacity capacity =
      moe ? expert_capacity(model, tokens, options.expert_count) : ExpertCapacity{};
  const int64_t payload = moe && linears.fp8() ? tokens * model.hidden_size : 0;
  const auto take = [&](MemoryPlan& pass) {
    linears.take_workspace(pass, parameters->all());
    partial_rows_ = pass.floats(capacity.rows * model.hidden_size);
    payload_ = pass.floats(payload);
    if (!trains()) return;
    gradient_payload_ = pass.floats(payload);
    normed_gradient_ = pass.floats(tokens * model.hidden_size);
    row_gradients_ = pass.floats(capacity.rows * model.hidden_size);
    weight_gradients_ = pass.floats(capacity.assignments);
    gate_gradients_ = pass.floats(tokens * model.num_experts_per_tok);
  };
  MemoryPlan pass_size;
  take(pass_size);
  MemoryPlan pass_plan(make_arena("buffers of a pass", pass_size.bytes()));
  take(pass_plan);
}

}  // namespace penstock
