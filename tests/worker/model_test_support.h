// Runs whole models, cut into stages and expert groups, inside one test process.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "comm/data/expert_exchange.h"
#include "kernels/kernels.h"
#include "worker/model/stage.h"

namespace penstock {

// A dense layer and three MoE layers of 8 experts in 4 groups, compressed queries, one shared
// expert.
ModelConfig tiny_model();

// Sequences of random tokens with their targets: [sequences, length] each.
struct TokenBatch {
  int64_t sequences = 0;
  int64_t length = 0;
  std::vector<int32_t> tokens;
  std::vector<int32_t> targets;
  int64_t count() const { return sequences * length; }
  TokenBatch part(int64_t first_sequence, int64_t sequence_count) const;
};
TokenBatch random_batch(const ModelConfig& model, int64_t sequences, int64_t length, uint64_t seed);

enum class BackwardMode { kFull, kInputThenWeight };

// All stages of one rank's pipeline, run one after the other in the calling thread.
class Pipeline {
 public:
  struct Options {
    ModelConfig model;
    int64_t stage_count = 1;
    int64_t expert_count = 1;
    int64_t expert_index = 0;
    int64_t sequences_max = 4;
    int64_t length_max = 16;
    Transport* transport = nullptr;  // needed when expert_count > 1
    Precision precision = Precision::kFp32;
    Recompute recompute = {};
    double prediction_weight = 0.3;  // of multi-token prediction, where the model has it
  };
  Pipeline(const Options& options, Kernels& kernels);

  Stage& stage(int64_t index) { return *stages_[static_cast<size_t>(index)]; }
  int64_t stage_count() const { return static_cast<int64_t>(stages_.size()); }
  void initialize(uint64_t seed);
  void zero_gradients();

  // Forward and backward of one micro-batch through every stage; the sum of its losses.
  double train(const TokenBatch& batch, double loss_scale, BackwardMode mode = BackwardMode::kFull);
  // Forward without keeping anything; the sum of losses.
  double evaluate(const TokenBatch& batch);

  // Visits every parameter of every stage; copies of the embedding, too.
  void for_each(const std::function<void(const Parameter&)>& visit) const;
  // Copies added up.
  std::map<std::string, std::vector<float>> gradients() const;

 private:
  double prediction_weight_;
  std::vector<std::unique_ptr<ExpertExchange>> exchanges_;
  std::vector<std::unique_ptr<Stage>> stages_;
};

// |a - b| / |b| in the Frobenius norm.
double relative_difference(std::span<const float> a, std::span<const float> b);

}  // namespace penstock
