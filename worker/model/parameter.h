// The trained tensors of one stage, in flat value and gradient buffers: one of each for
// the dense tensors, for the routed experts and for what stages share, because these kinds have
// different replicas. A reduction or an optimizer works on flat ranges and never on single tensors.
#pragma once

#include <cstdint>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "comm/run/expert_seats.h"
#include "comm/run/layout.h"
#include "comm/run/model_config.h"
#include "kernels/arena.h"

namespace penstock {

enum class ParameterKind : uint8_t {
  kDense,   // same on every rank that holds the stage
  kExpert,  // same on every rank that holds the stage with the same expert index
  kShared,  // same on every rank that holds the first or the last stage: the embedding, when
            // multi-token prediction makes the last stage use it, too
};
inline constexpr ParameterKind kParameterKinds[] = {ParameterKind::kDense, ParameterKind::kExpert,
                                                    ParameterKind::kShared};
inline constexpr size_t kParameterKindCount = std::size(kParameterKinds);

// Most tensors start at a multiple of this many elements, for SIMD; the gaps hold zeros, in values
// and gradients, for good. Some follow their neighbour at once, so that both make one wider matrix.
inline constexpr int64_t kParameterAlignment = 16;

// One tensor. Plain view: value and gradient point into the ParameterSet that made it.
struct Parameter {
  std::string name;            // Hugging Face's, with the global expert id
  std::vector<int64_t> shape;  // row-major; matrices are [out, in]
  ParameterKind kind = ParameterKind::kDense;
  int64_t expert = -1;  // global id; -1 for dense ones
  int64_t offset = 0;   // of the first element in the flat buffers of its kind
  int64_t size = 0;     // elements
  float* value = nullptr;
  float* gradient = nullptr;  // null in a set made without gradients

  // Decoupled weight decay falls on matrices only: norm weights are vectors (DeepSeek-V3 report
  // §4.2; the usual convention, as in Megatron).
  bool decays() const { return shape.size() > 1; }
};

// What a set holds: the tensors of decoder layers `layers`, with the embedding and the head where
// asked for, and of the routed experts only those on seats `experts`, in seat order.
struct ParameterSetOptions {
  Range layers;
  Range experts;
  bool embedding = false;  // model.embed_tokens.weight
  bool head = false;       // model.norm.weight, lm_head.weight
  bool gradients = true;
  bool prediction = false;  // the block of multi-token prediction, model.layers.<layer count>
  bool memory = true;       // false: only names and shapes, for lists of what a model has
  ExpertSeats seats = {};   // who sits on `experts`
};

// Owns the buffers. Not thread-safe. Order of tensors is a pure function of (config, options).
class ParameterSet {
 public:
  ParameterSet(const ModelConfig& model, const ParameterSetOptions& options);
  ParameterSet(const ParameterSet&) = delete;
  ParameterSet& operator=(const ParameterSet&) = delete;

  std::span<const Parameter> all() const { return parameters_; }
  // Null when there is none of that name.
  const Parameter* find(std::string_view name) const;

  std::span<float> values(ParameterKind kind);
  std::span<float> gradients(ParameterKind kind);  // empty in a set made without gradients
  std::span<const float> values(ParameterKind kind) const;

  // Matrices normal(0, initializer_range), norm weights 1. Each element is a pure function of
  // (seed, name, index), so that every layout starts from the same model.
  void initialize(uint64_t seed, double initializer_range);
  void zero_gradients();

 private:
  struct Buffer {
    std::unique_ptr<Arena> memory;  // arrives zeroed, so gaps are zero from the start
    std::span<float> floats;
  };
  // kAdjacent: right behind the tensor before it. kShared: aligned, in the shared buffer.
  enum class Place { kAligned, kAdjacent, kShared };
  void add(std::string name, std::vector<int64_t> shape, Place place = Place::kAligned,
           int64_t expert = -1);
  void add_attention(const ModelConfig& model, int64_t layer);
  void add_feed_forward(const ModelConfig& model, const ParameterSetOptions& options,
                        int64_t layer);
  void add_prediction(const ModelConfig& model, const ParameterSetOptions& options);
  void add_gated(const std::string& stem, int64_t width, int64_t hidden, int64_t expert);
  static Buffer allocate(std::string name, int64_t size);

  std::vector<Parameter> parameters_;
  int64_t ends_[kParameterKindCount] =
      {};  // elements given out, by ParameterKind, as the two below
  Buffer values_[kParameterKindCount];
  Buffer gradients_[kParameterKindCount];
};

}  // namespace penstock
