// The shape of one model, under the keys of Hugging Face's `deepseek_v3` configuration. Plain data.
#pragma once

#include <cstdint>
#include <optional>

namespace penstock {

// YaRN's stretching of positions: worker/model/rope.h has the formula.
struct YarnScaling {
  double factor = 1.0;  // >= 1
  int64_t original_max_position_embeddings = 0;
  double beta_fast = 32.0;  // turns within the original length; above beta_slow
  double beta_slow = 1.0;
  double mscale = 0.0;          // 0: not given
  double mscale_all_dim = 0.0;  // the same
  bool operator==(const YarnScaling&) const = default;
};

struct ModelConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  std::optional<int64_t>
      q_lora_rank;  // absent: queries are not compressed (q_proj instead of q_a, q_b)
  int64_t kv_lora_rank = 0;
  int64_t qk_nope_head_dim = 0;
  int64_t qk_rope_head_dim = 0;  // even
  int64_t v_head_dim = 0;
  int64_t intermediate_size = 0;      // feed-forward width of the first, dense layers
  int64_t first_k_dense_replace = 0;  // layers [0, this) are dense, the rest mixture-of-experts
  int64_t moe_intermediate_size = 0;
  int64_t n_routed_experts = 0;
  int64_t n_shared_experts = 0;  // one FFN of width n_shared_experts · moe_intermediate_size
  int64_t num_experts_per_tok = 0;
  int64_t n_group = 1;
  int64_t topk_group = 1;
  double routed_scaling_factor = 1.0;
  bool norm_topk_prob = true;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  std::optional<YarnScaling> rope_scaling = {};  // absent: positions as they are
  int64_t max_position_embeddings = 0;
  double initializer_range = 0.02;
  int64_t num_nextn_predict_layers = 0;  // 0 or 1: blocks of multi-token prediction
  double aux_loss_alpha = 0.0;           // of the sequence-wise balance loss; 0: none

  int64_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  bool is_moe(int64_t layer) const { return layer >= first_k_dense_replace; }
  bool operator==(const ModelConfig&) const = default;
};

}  // namespace penstock
