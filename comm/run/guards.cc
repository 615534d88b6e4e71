#include "comm/run/guards.h"

#include <fmt/format.h>

#include <algorithm>

namespace penstock {

std::string_view to_string(GuardPolicy policy) {
  switch (policy) {
    case GuardPolicy::kNone:
      return "none";
    case GuardPolicy::kWarn:
      return "warn";
    case GuardPolicy::kSkip:
      return "skip";
    case GuardPolicy::kRollback:
      return "rollback";
    case GuardPolicy::kStop:
      return "stop";
  }
  return "unknown";
}

std::string_view to_string(GuardSignal signal) {
  switch (signal) {
    case GuardSignal::kNone:
      return "none";
    case GuardSignal::kNotFinite:
      return "not_finite";
    case GuardSignal::kLossSpike:
      return "loss_spike";
    case GuardSignal::kGradNormSpike:
      return "grad_norm_spike";
  }
  return "unknown";
}

bool contains(std::span<const StepRange> ranges, int64_t step) {
  return std::any_of(ranges.begin(), ranges.end(), [step](const StepRange& range) {
    return range.first <= step && step <= range.last;
  });
}

std::string words_of(const GuardFinding& finding) {
  switch (finding.signal) {
    case GuardSignal::kNone:
      return "nothing was found";
    case GuardSignal::kNotFinite:
      return "loss or gradient norm is no number";
    case GuardSignal::kLossSpike:
    case GuardSignal::kGradNormSpike:
      break;
  }
  return fmt::format(
      "{} {:.6g} is above {:.6g}, the limit by the accepted steps before it, whose median is "
      "{:.6g}",
      finding.signal == GuardSignal::kLossSpike ? "loss" : "gradient norm", finding.value,
      finding.limit, finding.median);
}

}  // namespace penstock
