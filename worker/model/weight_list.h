// What a whole model consists of, without the memory for it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "comm/run/model_config.h"

namespace penstock {

struct WeightShape {
  std::string name;  // Hugging Face's
  std::vector<int64_t> shape;
};

// Every parameter and router bias, as checkpoints and model folders hold them.
std::vector<WeightShape> weight_list(const ModelConfig& model);

}  // namespace penstock
