// The attention half of a decoder layer: norm, multi-head latent attention, residual (DeepSeek-V3
// report §2.1.1).
//
//   n = rms(x)                        [c_q | c_kv | k_r] = n [Wq_a ; Wkv_a]^T, one product
//   q = rms(c_q) Wq_b^T               or, without query compression, c_q is q itself
//   [k_n | v] = rms(c_kv) Wkv_b^T     per head; RoPE turns the last part of q and the shared k_r
//   y = x + attention(q, [k_n ; k_r], v) Wo^T
#pragma once

#include <cstdint>

#include "comm/run/job_spec.h"
#include "comm/run/model_config.h"
#include "kernels/kernels.h"
#include "worker/model/linear.h"
#include "worker/model/memory_plan.h"
#include "worker/model/parameter.h"

namespace penstock {

// What the forward keeps for the backward, of T tokens. C = query width + kv_lora_rank + rope.
struct AttentionActivations {
  float* normed = nullptr;  // [T, hidden]
  float* inverse_rms = nullptr;
  float* compressed = nullptr;  // [T, C]
  float* query_normed =
      nullptr;  // [T, q_lora_rank]; null without query compression, as the next two
  float* query_inverse_rms = nullptr;
  float* query = nullptr;          // [T, heads · qk_head_dim]
  float* latent_normed = nullptr;  // [T, kv_lora_rank]
  float* latent_inverse_rms = nullptr;
  float* key_value = nullptr;    // [T, heads · (nope + v)]
  float* output = nullptr;       // [T, heads · v]
  float* log_sum_exp = nullptr;  // [sequences, heads, length]
};

// Those that the backward computes again, in buffers that all layers and micro-batches share: each
// call that needs them fills them first. Null: kept.
struct AttentionRecomputed {
  float* normed = nullptr;  // with Recompute::norms, as the next two
  float* query_normed = nullptr;
  float* latent_normed = nullptr;
  float* query = nullptr;  // with Recompute::mla_up, as the next
  float* key_value = nullptr;
};

// What the backward keeps for the weight gradients: gradients of the tensors of the same names.
struct AttentionDeltas {
  float* compressed = nullptr;
  float* query = nullptr;  // null without query compression
  float* key_value = nullptr;
};

// Used inside one call only.
struct AttentionScratch {
  float* output = nullptr;     // [T, heads · v]
  float* normed = nullptr;     // [T, widest normed tensor]
  float* workspace = nullptr;  // of the attention kernels
};

// Stateless but for its borrowed weights and tables.
class AttentionBlock {
 public:
  // cosine and sine: [length, qk_rope_head_dim / 2], from worker/model/rope.h; borrowed, as all the
  // rest.
  AttentionBlock(Kernels& kernels, const Linears& linears, const ModelConfig& model,
                 const ParameterSet& parameters, int64_t layer, const float* cosine,
                 const float* sine, const AttentionRecomputed& shared);

  static AttentionRecomputed take_recomputed(MemoryPlan& plan, const ModelConfig& model,
                                             const TokenShape& shape, const Recompute& recompute);
  static AttentionActivations take_activations(MemoryPlan& plan, const ModelConfig& model,
                                               const TokenShape& shape,
                                               const AttentionRecomputed& shared);
  static AttentionDeltas take_deltas(MemoryPlan& plan, const ModelConfig& model,
                                     const TokenShape& shape);
  static AttentionScratch take_scratch(MemoryPlan& plan, const Kernels& kernels,
                                       const ModelConfig& model, const TokenShape& shape);

  // y[T, hidden] from x[T, hidden].
  void forward(const TokenShape& shape, const float* x, const AttentionActivations& kept,
               const AttentionScratch& scratch, float* y) const;
  // dx = gradient of x, from dy; norm weights get their gradients here, they cost nothing.
  void backward_input(const TokenShape& shape, const float* x, const AttentionActivations& kept,
                      const float* dy, const AttentionDeltas& deltas,
                      const AttentionScratch& scratch, float* dx) const;
  // Gradients of the matrices, added to what is there.
  void backward_weight(const TokenShape& shape, const float* x, const AttentionActivations& kept,
                       const float* dy, const AttentionDeltas& deltas) const;

 private:
  AttentionShape attention_shape(const TokenShape& shape) const;
  AttentionInputs inputs(const AttentionActivations& kept) const;
  // Parts of the forward, which the backward runs again: x to normed; compressed to query_normed
  // and latent_normed; these to query, rotated, and key_value.
  void normalise(int64_t tokens, const float* x, const AttentionActivations& kept) const;
  void normalise_compressed(int64_t tokens, const AttentionActivations& kept) const;
  void project_up(const TokenShape& shape, const AttentionActivations& kept) const;
  void rotate_heads(const TokenShape& shape, int64_t heads, bool inverse, Heads x) const;
  void rotate_query(const TokenShape& shape, bool inverse, Heads query) const;
  void rotate_key(const TokenShape& shape, bool inverse, float* compressed) const;

  Kernels& kernels_;
  const Linears& linears_;
  const ModelConfig& model_;
  const float* cosine_;
  const float* sine_;
  const AttentionRecomputed shared_;
  const Parameter* norm_;
  LinearWeight down_;  // [C, hidden]: q_a_proj or q_proj, with kv_a_proj_with_mqa behind it
  const Parameter* query_norm_;  // null without query compression
  LinearWeight query_up_;        // empty without
  const Parameter* latent_norm_;
  LinearWeight latent_up_;
  LinearWeight out_;
  int64_t query_width_;       // columns of `compressed` that are the query's
  int64_t compressed_width_;  // C
  int64_t query_full_width_;  // heads · qk_head_dim
  int64_t key_value_width_;   // heads · (nope + v)
  int64_t output_width_;      // heads · v
  float scale_;
};

}  // namespace penstock
