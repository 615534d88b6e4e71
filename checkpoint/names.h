// Logical names of everything a checkpoint holds. Weights carry Hugging Face's tensor name with
// global expert ids; optimizer state hangs off it after a bar; run-wide scalars live under
// "state|".
//
//   model.layers.3.mlp.experts.7.up_proj.weight             the weight
//   model.layers.3.mlp.experts.7.up_proj.weight|exp_avg     Adam's first moment
//   state|step                                              i64, 0-d
//   state|guards                                            f64, 1-d: what guards remember
#pragma once

#include <string>
#include <string_view>

namespace penstock {

enum class TensorKind { kWeight, kMaster, kExpAvg, kExpAvgSq, kEma, kState };

// REQUIRES: tensor holds no '|'; for kState it is the part after the bar ("step").
std::string logical_name(std::string_view tensor, TensorKind kind);

inline std::string weight_name(std::string_view tensor) {
  return logical_name(tensor, TensorKind::kWeight);
}
inline std::string master_name(std::string_view tensor) {
  return logical_name(tensor, TensorKind::kMaster);
}
inline std::string exp_avg_name(std::string_view tensor) {
  return logical_name(tensor, TensorKind::kExpAvg);
}
inline std::string exp_avg_sq_name(std::string_view tensor) {
  return logical_name(tensor, TensorKind::kExpAvgSq);
}
inline std::string state_name(std::string_view what) {
  return logical_name(what, TensorKind::kState);
}

struct LogicalName {
  std::string_view tensor;  // views into the parsed text
  TensorKind kind = TensorKind::kWeight;
};
// Splits at the bar. An unknown suffix belongs to the tensor name of a weight: a newer writer's
// kinds are listed, not lost.
LogicalName parse_logical_name(std::string_view name);

}  // namespace penstock
