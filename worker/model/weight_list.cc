#include "worker/model/weight_list.h"

#include "worker/model/parameter.h"

namespace penstock {

std::vector<WeightShape> weight_list(const ModelConfig& model) {
  const ParameterSet parameters(model, {.layers = {0, model.num_hidden_layers},
                                        .experts = {0, model.n_routed_experts},
                                        .embedding = true,
                                        .head = true,
                                        .prediction = model.num_nextn_predict_layers > 0,
                                        .memory = false});
  std::vector<WeightShape> weights;
  constexpr std::string_view kGate = ".mlp.gate.weight";
  for (const Parameter& parameter : parameters.all()) {
    weights.push_back({parameter.name, parameter.shape});
    if (!parameter.name.ends_with(kGate)) continue;
    const std::string layer = parameter.name.substr(0, parameter.name.size() - kGate.size());
    weights.push_back({layer + ".mlp.gate.e_score_correction_bias", {model.n_routed_experts}});
  }
  return weights;
}

}  // namespace penstock
