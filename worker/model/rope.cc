#include "worker/model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "kernels/kernels.h"

namespace penstock {
namespace {

double magnitude(const YarnScaling& yarn, double mscale) {
  return yarn.factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(yarn.factor) + 1.0;
}

// Index of the frequency that turns `turns` times within the original length.
double index_of_turns(const ModelConfig& model, double turns) {
  const auto length = static_cast<double>(model.rope_scaling->original_max_position_embeddings);
  return static_cast<double>(model.qk_rope_head_dim) *
         std::log(length / (turns * 2.0 * std::numbers::pi)) / (2.0 * std::log(model.rope_theta));
}

std::vector<double> yarn_frequencies(const ModelConfig& model) {
  const YarnScaling& yarn = *model.rope_scaling;
  const int64_t dim = model.qk_rope_head_dim;
  const double low = std::max(std::floor(index_of_turns(model, yarn.beta_fast)), 0.0);
  double high =
      std::min(std::ceil(index_of_turns(model, yarn.beta_slow)), static_cast<double>(dim - 1));
  if (low == high) high += 0.001;
  std::vector<double> frequencies;
  for (int64_t i = 0; i < dim / 2; ++i) {
    const double plain =
        std::pow(model.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
    const double slow = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    frequencies.push_back(plain / yarn.factor * slow + plain * (1.0 - slow));
  }
  return frequencies;
}

}  // namespace

void make_rope_tables(const ModelConfig& model, int64_t positions, float* cosine, float* sine) {
  if (!model.rope_scaling) {
    make_rope_tables(positions, model.qk_rope_head_dim, model.rope_theta, cosine, sine);
    return;
  }
  const YarnScaling& yarn = *model.rope_scaling;
  const double scale = yarn.mscale > 0.0 && yarn.mscale_all_dim > 0.0
                           ? magnitude(yarn, yarn.mscale) / magnitude(yarn, yarn.mscale_all_dim)
                           : magnitude(yarn, 1.0);
  const std::vector<double> frequencies = yarn_frequencies(model);
  for (int64_t p = 0; p < positions; ++p) {
    for (const double frequency : frequencies) {
      const double angle = static_cast<double>(p) * frequency;
      *cosine++ = static_cast<float>(scale * std::cos(angle));
      *sine++ = static_cast<float>(scale * std::sin(angle));
    }
  }
}

double attention_scale(const ModelConfig& model) {
  const double plain = 1.0 / std::sqrt(static_cast<double>(model.qk_head_dim()));
  if (!model.rope_scaling || model.rope_scaling->mscale_all_dim == 0.0) return plain;
  const double stretched = magnitude(*model.rope_scaling, model.rope_scaling->mscale_all_dim);
  return plain * stretched * stretched;
}

}  // namespace penstock
