// A whole model in one process, forward only: samples text from trained weights.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "comm/base/status.h"
#include "comm/run/model_config.h"

namespace penstock {

struct SamplingOptions {
  int64_t token_count = 0;   // to generate
  double temperature = 1.0;  // 0: always the likeliest token
  int64_t top_k = 0;         // choose among the k likeliest; 0: among all
  uint64_t seed = 0;         // equal seed, weights and prompt give equal tokens
};

// Not thread-safe.
class Generator {
 public:
  // A tensor to fill before generating: every parameter and every router bias of the model.
  struct Weight {
    std::string name;  // Hugging Face's
    std::vector<int64_t> shape;
    std::span<float> values;  // owned by the generator
  };

  // Sees at most `context_length` tokens back.
  Generator(const ModelConfig& model, int64_t context_length);
  ~Generator();

  std::span<const Weight> weights() const;

  // Logits of what follows each of `text`'s tokens, [text, vocab_size], until the next call. `text`
  // holds 1 … context_length tokens, each in [0, vocab_size).
  Result<std::span<const float>> logits(std::span<const int32_t> text);

  // Tokens that continue `prompt`, which holds at least one, each in [0, vocab_size). `on_token`,
  // when given, is called with each as it is drawn.
  Result<std::vector<int32_t>> generate(std::span<const int32_t> prompt,
                                        const SamplingOptions& options,
                                        const std::function<void(int32_t)>& on_token = {});

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace penstock
