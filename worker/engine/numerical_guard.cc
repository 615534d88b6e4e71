#include "worker/engine/numerical_guard.h"

#include <algorithm>
#include <cmath>

namespace penstock {
namespace {

constexpr double kDeviationsPerMad = 1.4826;
constexpr double kDeviationLeast = 1e-3;  // relative to the median

// REQUIRES: there is one. Reorders them.
double median_of(std::span<double> values) {
  const auto middle = values.begin() + std::ssize(values) / 2;
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*std::max_element(values.begin(), middle) + *middle) / 2;
}

}  // namespace

NumericalGuard::NumericalGuard(const GuardsSpec& spec)
    : spec_(spec), state_(kStateSize), sorted_(kGuardWindowMax) {}

GuardFinding NumericalGuard::judge(double loss, double grad_norm) {
  GuardFinding finding;
  if (!std::isfinite(loss) || !std::isfinite(grad_norm)) {
    finding = {GuardSignal::kNotFinite, spec_.not_finite, std::isfinite(loss) ? grad_norm : loss};
  } else {
    finding = spike(spec_.loss_spike, GuardSignal::kLossSpike, kLosses, loss);
    const GuardFinding norm =
        spike(spec_.grad_norm_spike, GuardSignal::kGradNormSpike, kNorms, grad_norm);
    if (norm.action > finding.action) finding = norm;
  }
  if (finding.action == GuardPolicy::kSkip) {
    if (skips() >= spec_.max_skips)
      finding.action = GuardPolicy::kStop;
    else
      state_[kSkips] += 1.0;
  }
  if (finding.action <= GuardPolicy::kWarn) {
    const size_t at = static_cast<size_t>(state_[kAccepted]) % kGuardWindowMax;
    state_[kLosses + at] = loss;
    state_[kNorms + at] = grad_norm;
    state_[kAccepted] += 1.0;  // exact below 2^53
  }
  return finding;
}

// `values`: where in the state the ring begins.
GuardFinding NumericalGuard::spike(const SpikeSpec& spec, GuardSignal signal, size_t values,
                                   double value) {
  if (spec.policy == GuardPolicy::kNone) return {};
  const auto accepted = static_cast<int64_t>(state_[kAccepted]);
  const int64_t count = std::min(accepted, spec.window);
  if (count < spec.window / 2) return {};
  const std::span<double> window = std::span(sorted_).first(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<size_t>((accepted - 1 - i) % kGuardWindowMax);
    window[static_cast<size_t>(i)] = state_[values + at];
  }
  const double median = median_of(window);
  for (double& distance : window) distance = std::abs(distance - median);
  const double deviation =
      std::max(kDeviationsPerMad * median_of(window), kDeviationLeast * std::abs(median));
  const double limit = median + spec.sigmas * deviation;
  if (value <= limit) return {};
  return {signal, spec.policy, value, median, limit};
}

}  // namespace penstock
