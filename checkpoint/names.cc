#include "checkpoint/names.h"

#include <array>
#include <cstdlib>

#include "comm/base/check.h"

namespace penstock {
namespace {

constexpr std::string_view kStatePrefix = "state|";

constexpr std::string_view suffix_of(TensorKind kind) {
  switch (kind) {
    case TensorKind::kWeight:
      return "";
    case TensorKind::kMaster:
      return "|master";
    case TensorKind::kExpAvg:
      return "|exp_avg";
    case TensorKind::kExpAvgSq:
      return "|exp_avg_sq";
    case TensorKind::kEma:
      return "|ema";
    case TensorKind::kState:
      return "";
  }
  std::abort();
}

}  // namespace

std::string logical_name(std::string_view tensor, TensorKind kind) {
  PENSTOCK_CHECK(tensor.find('|') == std::string_view::npos, tensor);
  if (kind == TensorKind::kState) return std::string(kStatePrefix) + std::string(tensor);
  return std::string(tensor) + std::string(suffix_of(kind));
}

LogicalName parse_logical_name(std::string_view name) {
  if (name.starts_with(kStatePrefix)) {
    return {name.substr(kStatePrefix.size()), TensorKind::kState};
  }
  constexpr std::array kSuffixed = {TensorKind::kMaster, TensorKind::kExpAvg, TensorKind::kExpAvgSq,
                                    TensorKind::kEma};
  for (const TensorKind kind : kSuffixed) {
    if (name.ends_with(suffix_of(kind))) {
      return {name.substr(0, name.size() - suffix_of(kind).size()), kind};
    }
  }
  return {name, TensorKind::kWeight};
}

}  // namespace penstock
