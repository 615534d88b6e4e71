// What a checkpoint holds, counted from its manifest: "61 layers, 58 of them × 256 experts,
// optimizer complete".
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "checkpoint/manifest.h"
#include "checkpoint/names.h"

namespace penstock {

struct Census {
  struct Sum {
    uint64_t tensor_count = 0;
    uint64_t bytes = 0;
  };
  int64_t layer_count = 0;
  int64_t expert_layer_count = 0;  // layers with routed experts
  int64_t experts_min = 0;         // of those layers
  int64_t experts_max = 0;
  std::map<TensorKind, Sum> kinds;
  uint64_t parameter_count = 0;  // elements of weights, router biases not counted
  // Optimizer state that some weights have and these have not, as logical names: the first few.
  std::vector<std::string> missing;
  uint64_t missing_count = 0;

  // Every trained weight has both moments, and whatever else any of them has.
  bool optimizer_complete() const;
  std::string sentence() const;
};

Census take_census(const Manifest& manifest);

// "weights", "masters", "exp_avg", "exp_avg_sq", "ema", "state".
std::string_view kind_name(TensorKind kind);

}  // namespace penstock
