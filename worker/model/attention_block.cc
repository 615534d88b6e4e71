#include "worker/model/attention_block.h"

#include "worker/model/rope.h"

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
int64_t query_full_width(const ModelConfig& model) {
  return model.num_attention_heads * model.qk_head_dim();
}
int64_t key_value_width(const ModelConfig& model) {
  return model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim);
}

}  // namespace

AttentionBlock::AttentionBlock(Kernels& kernels, const Linears& linears, const ModelConfig& model,
                               const ParameterSet& parameters, int64_t layer, const float* cosine,
                               const float* sine, const AttentionRecomputed& shared)
    : kernels_(kernels),
      linears_(linears),
      model_(model),
      cosine_(cosine),
      sine_(sine),
      shared_(shared) {
  const std::string stem = fmt::format("model.layers.{}.", layer);
  const std::string attention = stem + "self_attn.";
  const bool compressed = model.q_lora_rank.has_value();
  norm_ = required(parameters, stem + "input_layernorm.weight");
  down_ = LinearWeight(
      *required(parameters, attention + (compressed ? "q_a_proj.weight" : "q_proj.weight")),
      required(parameters, attention + "kv_a_proj_with_mqa.weight"));
  query_norm_ = compressed ? required(parameters, attention + "q_a_layernorm.weight") : nullptr;
  if (compressed) query_up_ = LinearWeight(*required(parameters, attention + "q_b_proj.weight"));
  latent_norm_ = required(parameters, attention + "kv_a_layernorm.weight");
  latent_up_ = LinearWeight(*required(parameters, attention + "kv_b_proj.weight"));
  out_ = LinearWeight(*required(parameters, attention + "o_proj.weight"));
  query_width_ = query_width(model);
  compressed_width_ = compressed_width(model);
  query_full_width_ = query_full_width(model);
  key_value_width_ = key_value_width(model);
  output_width_ = model.num_attention_heads * model.v_head_dim;
  scale_ = static_cast<float>(attention_scale(model));
}

AttentionRecomputed AttentionBlock::take_recomputed(MemoryPlan& plan, const ModelConfig& model,
                                                    const TokenShape& shape,
                                                    const Recompute& recompute) {
  const int64_t tokens = shape.tokens();
  const int64_t query_rank = model.q_lora_rank.value_or(0);
  AttentionRecomputed shared;
  if (recompute.norms) {
    shared.normed = plan.floats(tokens * model.hidden_size);
    shared.query_normed = plan.floats(tokens * query_rank);
    shared.latent_normed = plan.floats(tokens * model.kv_lora_rank);
  }
  if (recompute.mla_up) {
    shared.query = plan.floats(query_rank > 0 ? tokens * query_full_width(model) : 0);
    shared.key_value = plan.floats(tokens * key_value_width(model));
  }
  return shared;
}

AttentionActivations AttentionBlock::take_activations(MemoryPlan& plan, const ModelConfig& model,
                                                      const TokenShape& shape,
                                                      const AttentionRecomputed& shared) {
  const int64_t tokens = shape.tokens();
  const auto keep = [&](float* again, int64_t width) {
    return again != nullptr ? again : plan.floats(tokens * width);
  };
  AttentionActivations kept;
  kept.normed = keep(shared.normed, model.hidden_size);
  kept.inverse_rms = plan.floats(tokens);
  kept.compressed = plan.floats(tokens * compressed_width(model));
  if (model.q_lora_rank) {
    kept.query_normed = keep(shared.query_normed, *model.q_lora_rank);
    kept.query_inverse_rms = plan.floats(tokens);
    kept.query = keep(shared.query, query_full_width(model));
  }
  kept.latent_normed = keep(shared.latent_normed, model.kv_lora_rank);
  kept.latent_inverse_rms = plan.floats(tokens);
  kept.key_value = keep(shared.key_value, key_value_width(model));
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

void AttentionBlock::rotate_heads(const TokenShape& shape, int64_t heads, bool inverse,
                                  Heads x) const {
  kernels_.rope(shape.tokens(), shape.length, heads, model_.qk_rope_head_dim, cosine_, sine_,
                inverse, x);
}

void AttentionBlock::rotate_query(const TokenShape& shape, bool inverse, Heads query) const {
  query.data += model_.qk_nope_head_dim;
  rotate_heads(shape, model_.num_attention_heads, inverse, query);
}

// The one key that all heads share.
void AttentionBlock::rotate_key(const TokenShape& shape, bool inverse, float* compressed) const {
  rotate_heads(shape, 1, inverse,
               {compressed + query_width_ + model_.kv_lora_rank, compressed_width_,
                model_.qk_rope_head_dim});
}

void AttentionBlock::normalise(int64_t tokens, const float* x,
                               const AttentionActivations& kept) const {
  const int64_t hidden = model_.hidden_size;
  kernels_.rms_norm(tokens, hidden, {x, hidden}, norm_->value,
                    static_cast<float>(model_.rms_norm_eps), {kept.normed, hidden},
                    kept.inverse_rms);
}

void AttentionBlock::normalise_compressed(int64_t tokens, const AttentionActivations& kept) const {
  if (query_norm_) {
    kernels_.rms_norm(tokens, query_width_, {kept.compressed, compressed_width_},
                      query_norm_->value, kLatentNormEpsilon, {kept.query_normed, query_width_},
                      kept.query_inverse_rms);
  }
  const int64_t rank = model_.kv_lora_rank;
  kernels_.rms_norm(tokens, rank, {kept.compressed + query_width_, compressed_width_},
                    latent_norm_->value, kLatentNormEpsilon, {kept.latent_normed, rank},
                    kept.latent_inverse_rms);
}

void AttentionBlock::project_up(const TokenShape& shape, const AttentionActivations& kept) const {
  const int64_t tokens = shape.tokens();
  if (query_norm_) {
    linears_.forward(tokens, query_up_, {kept.query_normed, query_width_}, Store::kOverwrite,
                     {kept.query, query_full_width_});
    rotate_query(shape, false, {kept.query, query_full_width_, model_.qk_head_dim()});
  }
  linears_.forward(tokens, latent_up_, {kept.latent_normed, model_.kv_lora_rank}, Store::kOverwrite,
                   {kept.key_value, key_value_width_});
}

void AttentionBlock::forward(const TokenShape& shape, const float* x,
                             const AttentionActivations& kept, const AttentionScratch& scratch,
                             float* y) const {
  const int64_t tokens = shape.tokens();
  const int64_t hidden = model_.hidden_size;
  normalise(tokens, x, kept);
  linears_.forward(tokens, down_, {kept.normed, hidden}, Store::kOverwrite,
                   {kept.compressed, compressed_width_});
  normalise_compressed(tokens, kept);
  project_up(shape, kept);
  if (!query_norm_) {
    rotate_query(shape, false, {kept.compressed, compressed_width_, model_.qk_head_dim()});
  }
  rotate_key(shape, false, kept.compressed);
  kernels_.attention(attention_shape(shape), scale_, inputs(kept),
                     {kept.output, output_width_, model_.v_head_dim}, kept.log_sum_exp,
                     scratch.workspace);
  kernels_.copy_rows(tokens, hidden, {x, hidden}, {y, hidden});
  const Matrix output = {kept.output, output_width_};
  linears_.forward(tokens, out_, output, Store::kAccumulate, {y, hidden},
                   RowFormat::kE4m3PowerOfTwo);
  linears_.round(RowFormat::kE5m6PowerOfTwo, tokens, output_width_, output, output);
}

void AttentionBlock::backward_input(const TokenShape& shape, const float* x,
                                    const AttentionActivations& kept, const float* dy,
                                    const AttentionDeltas& deltas, const AttentionScratch& scratch,
                                    float* dx) const {
  const int64_t tokens = shape.tokens();
  const int64_t hidden = model_.hidden_size;
  const int64_t rank = model_.kv_lora_rank;
  const int64_t head_width = model_.qk_nope_head_dim + model_.v_head_dim;
  if (shared_.key_value != nullptr) {
    if (shared_.normed != nullptr) normalise_compressed(tokens, kept);
    project_up(shape, kept);
  }
  linears_.input_gradient(tokens, out_, {dy, hidden}, {scratch.output, output_width_});
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
  rotate_query(shape, true, d_query);
  rotate_key(shape, true, deltas.compressed);
  linears_.input_gradient(tokens, latent_up_, {deltas.key_value, key_value_width_},
                          {scratch.normed, rank});
  kernels_.rms_norm_backward(tokens, rank, {kept.compressed + query_width_, compressed_width_},
                             latent_norm_->value, kept.latent_inverse_rms, {scratch.normed, rank},
                             Store::kOverwrite, {d_latent, compressed_width_},
                             latent_norm_->gradient);
  if (query_norm_) {
    linears_.input_gradient(tokens, query_up_, {deltas.query, query_full_width_},
                            {scratch.normed, query_width_});
    kernels_.rms_norm_backward(tokens, query_width_, {kept.compressed, compressed_width_},
                               query_norm_->value, kept.query_inverse_rms,
                               {scratch.normed, query_width_}, Store::kOverwrite,
                               {deltas.compressed, compressed_width_}, query_norm_->gradient);
  }
  linears_.input_gradient(tokens, down_, {deltas.compressed, compressed_width_},
                          {scratch.normed, hidden});
  kernels_.copy_rows(tokens, hidden, {dy, hidden}, {dx, hidden});
  kernels_.rms_norm_backward(tokens, hidden, {x, hidden}, norm_->value, kept.inverse_rms,
                             {scratch.normed, hidden}, Store::kAccumulate, {dx, hidden},
                             norm_->gradient);
}

void AttentionBlock::backward_weight(const TokenShape& shape, const float* x,
                                     const AttentionActivations& kept, const float* dy,
                                     const AttentionDeltas& deltas) const {
  const int64_t tokens = shape.tokens();
  const int64_t hidden = model_.hidden_size;
  const int64_t rank = model_.kv_lora_rank;
  if (shared_.normed != nullptr) {
    normalise(tokens, x, kept);
    normalise_compressed(tokens, kept);
  }
  linears_.weight_gradient(tokens, out_, {dy, hidden}, {kept.output, output_width_},
                           RowFormat::kE5m6PowerOfTwo);
  linears_.weight_gradient(tokens, latent_up_, {deltas.key_value, key_value_width_},
                           {kept.latent_normed, rank});
  if (query_norm_) {
    linears_.weight_gradient(tokens, query_up_, {deltas.query, query_full_width_},
                             {kept.query_normed, query_width_});
  }
  linears_.weight_gradient(tokens, down_, {deltas.compressed, compressed_width_},
                           {kept.normed, hidden});
}

}  // namespace penstock
