#include "worker/model/attention_block.h"

#include <cmath>

namespace penstock {
namespace {

// The norms of the compressed queries and latents do not read rms_norm_eps in Hugging Face's model:
// they are made with its default.
constexpr float kLatentNormEpsilon = 1e-6F;

const Parameter* required(const ParameterSet& parameters, const std::string& name) {
  const Parameter* parameter = parameters.find(name);
  PENSTOCK_CHECK(parameter != nullptr, name);
  return parameter;
}

int64_t query_width(const ModelConfig& model) {
  return model.q_lora_rank ? *model.q_lora_rank : model.num_attention_heads * model.qk_head_dim();
}
int64_t compressed_width(const ModelConfig& model) {
  return query_width(model) + model.kv_lora_rank + model.qk_rope_head_dim;
}
int64_t key_value_width(const ModelConfig& model) {
  return model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim);
}

}  // namespace

AttentionBlock::AttentionBlock(Kernels& kernels, const ModelConfig& model,
                               const ParameterSet& parameters, int64_t layer, const float* cosine,
                               const float* sine)
    : kernels_(kernels), model_(model), cosine_(cosine), sine_(sine) {
  const std::string stem = fmt::format("model.layers.{}.", layer);
  const std::string attention = stem + "self_attn.";
  const bool compressed = model.q_lora_rank.has_value();
  norm_ = required(parameters, stem + "input_layernorm.weight");
  down_ = required(parameters, attention + (compressed ? "q_a_proj.weight" : "q_proj.weight"));
  query_norm_ = compressed ? required(parameters, attention + "q_a_layernorm.weight") : nullptr;
  query_up_ = compressed ? required(parameters, attention + "q_b_proj.weight") : nullptr;
  latent_norm_ = required(parameters, attention + "kv_a_layernorm.weight");
  latent_up_ = required(parameters, attention + "kv_b_proj.weight");
  out_ = required(parameters, attention + "o_proj.weight");
  const Parameter* latent_down = required(parameters, attention + "kv_a_proj_with_mqa.weight");
  PENSTOCK_CHECK(latent_down->offset == down_->offset + down_->size, latent_down->offset);
  query_width_ = query_width(model);
  compressed_width_ = compressed_width(model);
  query_full_width_ = model.num_attention_heads * model.qk_head_dim();
  key_value_width_ = key_value_width(model);
  output_width_ = model.num_attention_heads * model.v_head_dim;
  scale_ = static_cast<float>(1.0 / std::sqrt(static_cast<double>(model.qk_head_dim())));
}

AttentionActivations AttentionBlock::take_activations(MemoryPlan& plan, const ModelConfig& model,
                                                      const TokenShape& shape) {
  const int64_t tokens = shape.tokens();
  AttentionActivations kept;
  kept.normed = plan.floats(tokens * model.hidden_size);
  kept.inverse_rms = plan.floats(tokens);
  kept.compressed = plan.floats(tokens * compressed_width(model));
  if (model.q_lora_rank) {
    kept.query_normed = plan.floats(tokens * *model.q_lora_rank);
    kept.query_inverse_rms = plan.floats(tokens);
    kept.query = plan.floats(tokens * model.num_attention_heads * model.qk_head_dim());
  }
  kept.latent_normed = plan.floats(tokens * model.kv_lora_rank);
  kept.latent_inverse_rms = plan.floats(tokens);
  kept.key_value = plan.floats(tokens * key_value_width(model));
  kept.output = plan.floats(tokens * model.num_attention_heads * model.v_head_dim);
  kept.log_sum_exp = plan.floats(tokens * model.num_attention_heads);
  return kept;
}

AttentionDeltas AttentionBlock::take_deltas(MemoryPlan& plan, const ModelConfig& model,
                                            const TokenShape& shape) {
  const int64_t tokens = shape.tokens();
  AttentionDeltas deltas;
  deltas.compressed = plan.floats(tokens * compressed_width(model));
  if (model.q_lora_rank) {
    deltas.query = plan.floats(tokens * model.num_attention_heads * model.qk_head_dim());
  }
  deltas.key_value = plan.floats(tokens * key_value_width(model));
  return deltas;
}

AttentionScratch AttentionBlock::take_scratch(MemoryPlan& plan, const Kernels& kernels,
                                              const ModelConfig& model, const TokenShape& shape) {
  const int64_t tokens = shape.tokens();
  const int64_t widest =
      std::max({model.hidden_size, model.kv_lora_rank, model.q_lora_rank.value_or(0)});
  AttentionScratch scratch;
  scratch.output = plan.floats(tokens * model.num_attention_heads * model.v_head_dim);
  scratch.normed = plan.floats(tokens * widest);
  scratch.workspace = plan.floats(kernels.attention_workspace_floats(
      {shape.sequences, shape.length, model.num_attention_heads, model.qk_nope_head_dim,
       model.qk_rope_head_dim, model.v_head_dim}));
  return scratch;
}

AttentionShape AttentionBlock::attention_shape(const TokenShape& shape) const {
  return {shape.sequences,
          shape.length,
          model_.num_attention_heads,
          model_.qk_nope_head_dim,
          model_.qk_rope_head_dim,
          model_.v_head_dim};
}

AttentionInputs AttentionBlock::inputs(const AttentionActivations& kept) const {
  const int64_t head_width = model_.qk_nope_head_dim + model_.v_head_dim;
  AttentionInputs in;
  in.query = query_norm_ ? ConstHeads{kept.query, query_full_width_, model_.qk_head_dim()}
                         : ConstHeads{kept.compressed, compressed_width_, model_.qk_head_dim()};
  in.key_nope = {kept.key_value, key_value_width_, head_width};
  in.key_rope = {kept.compressed + query_width_ + model_.kv_lora_rank, compressed_width_};
  in.value = {kept.key_value + model_.qk_nope_head_dim, key_value_width_, head_width};
  return in;
}

// Turns the rope part of every query head and of the one shared key.
void AttentionBlock::rotate(const TokenShape& shape, bool inverse, Heads query,
                            float* compressed) const {
  query.data += model_.qk_nope_head_dim;
  kernels_.rope(shape.tokens(), shape.length, model_.num_attention_heads, model_.qk_rope_head_dim,
                cosine_, sine_, inverse, query);
  const Heads key = {compressed + query_width_ + model_.kv_lora_rank, compressed_width_,
                     model_.qk_rope_head_dim};
  kernels_.rope(shape.tokens(), shape.length, 1, model_.qk_rope_head_dim, cosine_, sine_, inverse,
                key);
}

void AttentionBlock::forward(const TokenShape& shape, const float* x,
                             const AttentionActivations& kept, const AttentionScratch& scratch,
                             float* y) const {
  const int64_t tokens = shape.tokens();
  const int64_t hidden = model_.hidden_size;
  kernels_.rms_norm(tokens, hidden, {x, hidden}, norm_->value,
                    static_cast<float>(model_.rms_norm_eps), {kept.normed, hidden},
                    kept.inverse_rms);
  kernels_.matmul(tokens, compressed_width_, hidden, {kept.normed, hidden}, Transpose::kNo,
                  {down_->value, hidden}, Transpose::kYes, Store::kOverwrite,
                  {kept.compressed, compressed_width_});
  Heads query = {kept.compressed, compressed_width_, model_.qk_head_dim()};
  if (query_norm_) {
    kernels_.rms_norm(tokens, query_width_, {kept.compressed, compressed_width_},
                      query_norm_->value, kLatentNormEpsilon, {kept.query_normed, query_width_},
                      kept.query_inverse_rms);
    kernels_.matmul(tokens, query_full_width_, query_width_, {kept.query_normed, query_width_},
                    Transpose::kNo, {query_up_->value, query_width_}, Transpose::kYes,
                    Store::kOverwrite, {kept.query, query_full_width_});
    query = {kept.query, query_full_width_, model_.qk_head_dim()};
  }
  const int64_t rank = model_.kv_lora_rank;
  kernels_.rms_norm(tokens, rank, {kept.compressed + query_width_, compressed_width_},
                    latent_norm_->value, kLatentNormEpsilon, {kept.latent_normed, rank},
                    kept.latent_inverse_rms);
  kernels_.matmul(tokens, key_value_width_, rank, {kept.latent_normed, rank}, Transpose::kNo,
                  {latent_up_->value, rank}, Transpose::kYes, Store::kOverwrite,
                  {kept.key_value, key_value_width_});
  rotate(shape, false, query, kept.compressed);
  kernels_.attention(attention_shape(shape), scale_, inputs(kept),
                     {kept.output, output_width_, model_.v_head_dim}, kept.log_sum_exp,
                     scratch.workspace);
  kernels_.copy_rows(tokens, hidden, {x, hidden}, {y, hidden});
  kernels_.matmul(tokens, hidden, output_width_, {kept.output, output_width_}, Transpose::kNo,
                  {out_->value, output_width_}, Transpose::kYes, Store::kAccumulate, {y, hidden});
}

void AttentionBlock::backward_input(const TokenShape& shape, const float* x,
                                    const AttentionActivations& kept, const float* dy,
                                    const AttentionDeltas& deltas, const AttentionScratch& scratch,
                                    float* dx) const {
  const int64_t tokens = shape.tokens();
  const int64_t hidden = model_.hidden_size;
  const int64_t rank = model_.kv_lora_rank;
  const int64_t head_width = model_.qk_nope_head_dim + model_.v_head_dim;
  kernels_.matmul(tokens, output_width_, hidden, {dy, hidden}, Transpose::kNo,
                  {out_->value, output_width_}, Transpose::kNo, Store::kOverwrite,
                  {scratch.output, output_width_});
  float* const d_latent = deltas.compressed + query_width_;
  const Heads d_query = query_norm_
                            ? Heads{deltas.query, query_full_width_, model_.qk_head_dim()}
                            : Heads{deltas.compressed, compressed_width_, model_.qk_head_dim()};
  const AttentionGradients gradients = {
      d_query,
      {deltas.key_value, key_value_width_, head_width},
      {d_latent + rank, compressed_width_},
      {deltas.key_value + model_.qk_nope_head_dim, key_value_width_, head_width}};
  kernels_.attention_backward(attention_shape(shape), scale_, inputs(kept),
                              {kept.output, output_width_, model_.v_head_dim}, kept.log_sum_exp,
                              {scratch.output, output_width_, model_.v_head_dim}, gradients,
                              scratch.workspace);
  rotate(shape, true, d_query, deltas.compressed);
  kernels_.matmul(tokens, rank, key_value_width_, {deltas.key_value, key_value_width_},
                  Transpose::kNo, {latent_up_->value, rank}, Transpose::kNo, Store::kOverwrite,
                  {scratch.normed, rank});
  kernels_.rms_norm_backward(tokens, rank, {kept.compressed + query_width_, compressed_width_},
                             latent_norm_->value, kept.latent_inverse_rms, {scratch.normed, rank},
                             Store::kOverwrite, {d_latent, compressed_width_},
                             latent_norm_->gradient);
  if (query_norm_) {
    kernels_.matmul(tokens, query_width_, query_full_width_, {deltas.query, query_full_width_},
                    Transpose::kNo, {query_up_->value, query_width_}, Transpose::kNo,
                    Store::kOverwrite, {scratch.normed, query_width_});
    kernels_.rms_norm_backward(tokens, query_width_, {kept.compressed, compressed_width_},
                               query_norm_->value, kept.query_inverse_rms,
                               {scratch.normed, query_width_}, Store::kOverwrite,
                               {deltas.compressed, compressed_width_}, query_norm_->gradient);
  }
  kernels_.matmul(tokens, hidden, compressed_width_, {deltas.compressed, compressed_width_},
                  Transpose::kNo, {down_->value, hidden}, Transpose::kNo, Store::kOverwrite,
                  {scratch.normed, hidden});
  kernels_.copy_rows(tokens, hidden, {dy, hidden}, {dx, hidden});
  kernels_.rms_norm_backward(tokens, hidden, {x, hidden}, norm_->value, kept.inverse_rms,
                             {scratch.normed, hidden}, Store::kAccumulate, {dx, hidden},
                             norm_->gradient);
}

void AttentionBlock::backward_weight(const TokenShape& shape, const AttentionActivations& kept,
                                     const float* dy, const AttentionDeltas& deltas) const {
  const auto add_gradient = [&](int64_t out, int64_t in, const float* d_out, const float* input,
                                const Parameter* weight) {
    kernels_.matmul(out, in, shape.tokens(), {d_out, out}, Transpose::kYes, {input, in},
                    Transpose::kNo, Store::kAccumulate, {weight->gradient, in});
  };
  add_gradient(model_.hidden_size, output_width_, dy, kept.output, out_);
  add_gradient(key_value_width_, model_.kv_lora_rank, deltas.key_value, kept.latent_normed,
               latent_up_);
  if (query_norm_) {
    add_gradient(query_full_width_, query_width_, deltas.query, kept.query_normed, query_up_);
  }
  add_gradient(compressed_width_, model_.hidden_size, deltas.compressed, kept.normed, down_);
}

}  // namespace penstock
