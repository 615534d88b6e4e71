#include "checkpoint/census.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdlib>
#include <optional>
#include <set>

namespace penstock {
namespace {

constexpr size_t kMissingNamed = 8;
constexpr std::array kOptimizerKinds = {TensorKind::kMaster, TensorKind::kExpAvg,
                                        TensorKind::kExpAvgSq, TensorKind::kEma};

// The number behind the first `key` in a name: 3 for "model.layers.3.mlp" and "layers.".
std::optional<int64_t> number_after(std::string_view name, std::string_view key) {
  const size_t at = name.find(key);
  if (at == std::string_view::npos) return std::nullopt;
  const char* begin = name.data() + at + key.size();
  int64_t number = 0;
  const auto [end, error] = std::from_chars(begin, name.data() + name.size(), number);
  if (error != std::errc() || end == begin || number < 0) return std::nullopt;
  return number;
}

// Set by the balancing rule, not by the optimizer.
bool is_trained(std::string_view weight) {
  return !weight.ends_with(".e_score_correction_bias");
}

void count_experts(const std::map<int64_t, std::set<int64_t>>& experts, Census& census) {
  census.layer_count = static_cast<int64_t>(experts.size());
  for (const auto& [layer, ids] : experts) {
    const auto count = static_cast<int64_t>(ids.size());
    if (count == 0) continue;
    census.experts_min =
        census.expert_layer_count == 0 ? count : std::min(census.experts_min, count);
    census.experts_max = std::max(census.experts_max, count);
    ++census.expert_layer_count;
  }
}

// Moments are always wanted; a master or an average of one weight only when others have theirs.
void find_missing(const Manifest& manifest, Census& census) {
  for (const ManifestTensor& tensor : manifest.tensors) {
    if (parse_logical_name(tensor.name).kind != TensorKind::kWeight) continue;
    if (!is_trained(tensor.name)) continue;
    for (const TensorKind kind : kOptimizerKinds) {
      const bool moment = kind == TensorKind::kExpAvg || kind == TensorKind::kExpAvgSq;
      if (!moment && !census.kinds.contains(kind)) continue;
      // A name with a bar in it is none of ours, and has no optimizer state.
      if (tensor.name.find('|') != std::string::npos) continue;
      const std::string wanted = logical_name(tensor.name, kind);
      const ManifestTensor* found = manifest.find(wanted);
      if (found != nullptr && found->shape == tensor.shape) continue;
      ++census.missing_count;
      if (census.missing.size() < kMissingNamed) census.missing.push_back(wanted);
    }
  }
}

}  // namespace

std::string_view kind_name(TensorKind kind) {
  switch (kind) {
    case TensorKind::kWeight:
      return "weights";
    case TensorKind::kMaster:
      return "masters";
    case TensorKind::kExpAvg:
      return "exp_avg";
    case TensorKind::kExpAvgSq:
      return "exp_avg_sq";
    case TensorKind::kEma:
      return "ema";
    case TensorKind::kState:
      return "state";
  }
  std::abort();
}

bool Census::optimizer_complete() const {
  return missing_count == 0 && kinds.contains(TensorKind::kExpAvg);
}

std::string Census::sentence() const {
  const std::string experts = experts_min == experts_max
                                  ? std::to_string(experts_max)
                                  : fmt::format("{} to {}", experts_min, experts_max);
  std::string text = fmt::format("{} layers", layer_count);
  if (expert_layer_count > 0 && expert_layer_count == layer_count) {
    text += fmt::format(" × {} experts", experts);
  } else if (expert_layer_count > 0) {
    text += fmt::format(", {} of them × {} experts", expert_layer_count, experts);
  }
  if (optimizer_complete()) return text + ", optimizer complete";
  if (!kinds.contains(TensorKind::kExpAvg)) return text + ", no optimizer state";
  return text + fmt::format(", optimizer not complete: {} tensors missing", missing_count);
}

Census take_census(const Manifest& manifest) {
  Census census;
  std::map<int64_t, std::set<int64_t>> experts;  // by layer
  for (const ManifestTensor& tensor : manifest.tensors) {
    const LogicalName name = parse_logical_name(tensor.name);
    Census::Sum& sum = census.kinds[name.kind];
    const auto elements = static_cast<uint64_t>(element_count(tensor.shape));
    ++sum.tensor_count;
    sum.bytes += elements * dtype_bytes(tensor.dtype);
    if (name.kind != TensorKind::kWeight) continue;
    if (is_trained(name.tensor)) census.parameter_count += elements;
    if (const auto layer = number_after(name.tensor, "layers.")) {
      std::set<int64_t>& ids = experts[*layer];
      if (const auto expert = number_after(name.tensor, ".mlp.experts.")) ids.insert(*expert);
    }
  }
  count_experts(experts, census);
  find_missing(manifest, census);
  return census;
}

}  // namespace penstock
