// A valid spec to break in one place.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <string_view>

namespace penstock {

inline constexpr std::string_view kValidSpec = R"(apiVersion: penstock/v1
kind: TrainingRun
metadata: {name: tiny}
model:
  vocab_size: 257
  hidden_size: 64
  num_hidden_layers: 4
  num_attention_heads: 4
  q_lora_rank: 32
  kv_lora_rank: 16
  qk_nope_head_dim: 16
  qk_rope_head_dim: 8
  v_head_dim: 16
  intermediate_size: 128
  first_k_dense_replace: 1
  moe_intermediate_size: 32
  n_routed_experts: 8
  n_shared_experts: 1
  num_experts_per_tok: 2
  n_group: 4
  topk_group: 2
data:
  train: [{path: /data/corpus_train, weight: 1.0}]
  validation: [{path: /data/corpus_heldout}]
  tokenizer: bytes
  seq_length: 128
parallelism: {pipeline: 2, expert: 2, schedule: dualpipe, microbatches: 4}
optimizer: {name: adamw, lr: 3.0e-4, betas: [0.9, 0.95]}
schedule: {warmup_steps: 10, decay: cosine, min_lr_ratio: 0.1}
training: {steps: 100, seed: 42, evaluation_interval: 50}
checkpoint: {interval: 20}
)";

// The valid spec with the first `from` replaced by `to`.
inline std::string edited(std::string_view from, std::string_view to) {
  std::string text(kValidSpec);
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << "the valid spec has no " << from;
  if (at != std::string::npos) text.replace(at, from.size(), to);
  return text;
}

}  // namespace penstock
