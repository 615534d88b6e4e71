#include "worker/model/generator.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "comm/base/random.h"
#include "kernels/cpu/cpu_kernels.h"
#include "worker/model/stage.h"

namespace penstock {
namespace {

StageOptions generator_options(const ModelConfig& model, int64_t context_length) {
  StageOptions options;
  options.model = model;
  options.sequence_length_max = context_length;
  options.gradient_slot_count = 0;
  return options;
}

}  // namespace

class Generator::Impl {
 public:
  Impl(const ModelConfig& model, int64_t context_length)
      : options_(generator_options(model, context_length)), kernels_(make_cpu_kernels()) {
    if (has_moe_layer(options_)) {
      exchange_ =
          ExpertExchange::create(nullptr, expert_exchange_config(options_, {Rank{0}})).value();
    }
    stage_ = std::make_unique<Stage>(options_, *kernels_, exchange_.get());
    for (const Parameter& parameter : stage_->parameters().all()) {
      weights_.push_back({parameter.name,
                          parameter.shape,
                          {parameter.value, static_cast<size_t>(parameter.size)}});
    }
    for (const Router& router : stage_->routers()) {
      weights_.push_back({router.bias_name, {model.n_routed_experts}, router.bias});
    }
  }

  std::span<const Weight> weights() const { return weights_; }
  int64_t vocab_size() const { return options_.model.vocab_size; }

  Status check_tokens(std::span<const int32_t> tokens) const {
    if (tokens.empty()) return invalid_argument("the prompt holds no token; give at least one");
    for (const int32_t token : tokens) {
      if (token < 0 || token >= vocab_size()) {
        return invalid_argument(
            fmt::format("prompt token {} is outside the vocabulary of {}; was the "
                        "model trained with another tokenizer?",
                        token, vocab_size()));
      }
    }
    return {};
  }

  Result<std::span<const float>> logits(std::span<const int32_t> text) {
    PENSTOCK_CHECK(std::ssize(text) <= options_.sequence_length_max, text.size());
    MicroBatch batch;
    batch.sequence_count = 1;
    batch.sequence_length = std::ssize(text);
    batch.tokens = text;
    PENSTOCK_TRY(stage_->forward_only(0, batch).run());
    return stage_->logits(0);
  }

  // Logits of what follows the newest tokens of `text`, as many as the context holds.
  Result<std::span<const float>> next_logits(std::span<const int32_t> text) {
    const auto length =
        std::min<size_t>(text.size(), static_cast<size_t>(options_.sequence_length_max));
    PENSTOCK_TRY_ASSIGN(const std::span<const float> all, logits(text.last(length)));
    return all.last(static_cast<size_t>(vocab_size()));
  }

  int32_t choose(std::span<const float> logits, const SamplingOptions& options, Random& random) {
    candidates_.resize(logits.size());
    std::iota(candidates_.begin(), candidates_.end(), 0);
    // Ties go to the lower id, so that the order, and with it the draw, is always the same.
    const auto likelier = [&](int32_t a, int32_t b) {
      const float la = logits[static_cast<size_t>(a)], lb = logits[static_cast<size_t>(b)];
      return la != lb ? la > lb : a < b;
    };
    if (options.temperature <= 0.0) {
      return *std::min_element(candidates_.begin(), candidates_.end(), likelier);
    }
    if (options.top_k > 0 && options.top_k < std::ssize(candidates_)) {
      std::partial_sort(candidates_.begin(), candidates_.begin() + options.top_k, candidates_.end(),
                        likelier);
      candidates_.resize(static_cast<size_t>(options.top_k));
    }
    const float largest = *std::max_element(logits.begin(), logits.end());
    weights_of_.clear();
    double total = 0.0;
    for (const int32_t id : candidates_) {
      const double scaled = (logits[static_cast<size_t>(id)] - largest) / options.temperature;
      total += weights_of_.emplace_back(std::exp(scaled));
    }
    double left = random.uniform() * total;
    for (size_t i = 0; i < candidates_.size(); ++i) {
      left -= weights_of_[i];
      if (left < 0.0) return candidates_[i];
    }
    return candidates_.back();
  }

 private:
  StageOptions options_;
  std::unique_ptr<Kernels> kernels_;
  std::unique_ptr<ExpertExchange> exchange_;
  std::unique_ptr<Stage> stage_;
  std::vector<Weight> weights_;
  std::vector<int32_t> candidates_;
  std::vector<double> weights_of_;  // by candidate, not normalised
};

Generator::Generator(const ModelConfig& model, int64_t context_length)
    : impl_(std::make_unique<Impl>(model, context_length)) {}
Generator::~Generator() = default;

std::span<const Generator::Weight> Generator::weights() const {
  return impl_->weights();
}

Result<std::span<const float>> Generator::logits(std::span<const int32_t> text) {
  PENSTOCK_TRY(impl_->check_tokens(text));
  return impl_->logits(text);
}

Result<std::vector<int32_t>> Generator::generate(std::span<const int32_t> prompt,
                                                 const SamplingOptions& options,
                                                 const std::function<void(int32_t)>& on_token) {
  PENSTOCK_TRY(impl_->check_tokens(prompt));
  Random random(options.seed, 0);
  std::vector<int32_t> text(prompt.begin(), prompt.end());
  for (int64_t i = 0; i < options.token_count; ++i) {
    PENSTOCK_TRY_ASSIGN(const std::span<const float> logits, impl_->next_logits(text));
    text.push_back(impl_->choose(logits, options, random));
    if (on_token) on_token(text.back());
  }
  return std::vector<int32_t>(text.begin() + std::ssize(prompt), text.end());
}

}  // namespace penstock
