// Rotary position embedding of a model: its tables, and what it adds to the attention's scale.
//
// YaRN (Peng et al., 2023, arXiv 2309.00071) stretches positions beyond those trained before, as
// DeepSeek-V3 was extended from 4K to 128K (DeepSeek-V3 report §4.2): of the frequencies
// theta^(-2i/d) the fast ones, which turn beta_fast times or more within the original length, stay;
// the slow ones, of beta_slow turns or fewer, are divided by `factor`; those between are mixed
// along a straight line in i. With m(x) = 0.1 x ln(factor) + 1, cosines and sines are multiplied by
// m(mscale) / m(mscale_all_dim), or by m(1) unless both are given, and scores by
// m(mscale_all_dim)^2 where that is given. All as Hugging Face's deepseek_v3.
#pragma once

#include <cstdint>

#include "comm/run/model_config.h"

namespace penstock {

// cosine, sine: [positions, qk_rope_head_dim / 2] each, in host memory.
void make_rope_tables(const ModelConfig& model, int64_t positions, float* cosine, float* sine);

// What scores are multiplied by before the softmax: 1 / sqrt(qk_head_dim), and YaRN's part.
double attention_scale(const ModelConfig& model);

}  // namespace penstock
