#include "coordinator/plan/save_interval.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "comm/base/counted.h"

namespace penstock {
namespace {

constexpr int64_t kSavesAveraged = 5;
// Of the limit on the overhead, when that decides: so that noise does not move the interval.
constexpr double kOverheadAim = 0.9;
constexpr double kChangeMin = 1.2;

// "0.35 s", "2.1 h": three digits are plenty, but no exponents below a million hours.
std::string span_text(double seconds) {
  if (seconds < 1.0) return fmt::format("{:.3g} ms", seconds * 1e3);
  if (seconds < 600.0) return fmt::format("{:.3g} s", seconds);
  if (seconds < 36'000.0) return fmt::format("{:.3g} min", seconds / 60.0);
  if (seconds < 3.6e6) return fmt::format("{:.4g} h", seconds / 3600.0);
  return fmt::format("{:.6g} h", std::round(seconds / 3600.0));
}

double median(const std::deque<double>& values) {
  if (values.empty()) return 0.0;
  std::vector<double> sorted(values.begin(), values.end());
  const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  return *middle;
}

std::string first_reason(int64_t steps) {
  return fmt::format("the first checkpoint comes after {}, to measure what one costs",
                     counted(steps, "step"));
}

}  // namespace

void SaveMeasurements::add(const SaveMeasurements& save) {
  ++save_count;
  const auto weight = 1.0 / static_cast<double>(std::min(save_count, kSavesAveraged));
  const auto move = [weight](double& mean, double value) { mean += weight * (value - mean); };
  move(stall_seconds, save.stall_seconds);
  move(slowdown_seconds, save.slowdown_seconds);
  move(save_seconds, save.save_seconds);
}

SaveChoice choose_save_interval(const SaveMeasurements& measured, const SaveLimits& limits) {
  SaveChoice choice;
  choice.mtbf_seconds = (limits.mtbf_prior_seconds + measured.training_seconds) /
                        (1.0 + static_cast<double>(measured.failure_count));
  if (measured.save_count == 0 || !(measured.step_seconds > 0.0)) {
    choice.steps = std::min(kFirstSaveSteps, limits.steps_max);
    choice.reason = first_reason(choice.steps);
    return choice;
  }
  const double cost = measured.cost_seconds();
  const double mtbf = choice.mtbf_seconds;
  const double optimum = 2.0 * cost < mtbf ? std::sqrt(2.0 * cost * mtbf) : mtbf;
  const double bearable = cost / (kOverheadAim * limits.max_overhead);
  const double pause = 2.0 * measured.save_seconds;
  const double seconds = std::max({optimum, bearable, pause});
  const double steps = std::ceil(seconds / measured.step_seconds);
  const auto most = static_cast<double>(limits.steps_max);
  choice.steps =
      steps < most ? std::max<int64_t>(1, static_cast<int64_t>(steps)) : limits.steps_max;
  const double chosen_seconds = static_cast<double>(choice.steps) * measured.step_seconds;
  choice.overhead = cost / chosen_seconds;
  std::string rule =
      fmt::format("sqrt(2 x {} x {}) is {}", span_text(cost), span_text(mtbf), span_text(optimum));
  if (bearable > optimum && bearable >= pause) {
    rule += fmt::format(", but checkpoint.max_overhead {:.3g}% asks for {}",
                        100.0 * limits.max_overhead, span_text(bearable));
  } else if (pause > optimum) {
    rule += fmt::format(", but twice what a save takes is {}", span_text(pause));
  }
  choice.reason = fmt::format(
      "a checkpoint every {} ({}), {:.2g}% of training: one costs {} (stall {}, slower steps {}) "
      "and takes {}, a step takes {}, a failure is expected every {} ({} in {} of training, {} "
      "expected before); {}",
      counted(choice.steps, "step"), span_text(chosen_seconds), 100.0 * choice.overhead,
      span_text(cost), span_text(measured.stall_seconds), span_text(measured.slowdown_seconds),
      span_text(measured.save_seconds), span_text(measured.step_seconds), span_text(mtbf),
      counted(measured.failure_count, "failure"), span_text(measured.training_seconds),
      span_text(limits.mtbf_prior_seconds), rule);
  return choice;
}

bool worth_changing(int64_t current, const SaveChoice& choice, const SaveMeasurements& measured,
                    const SaveLimits& limits) {
  if (current < 1) return true;
  const auto from = static_cast<double>(current);
  const auto to = static_cast<double>(choice.steps);
  if (to >= from * kChangeMin || from >= to * kChangeMin) return true;
  const double interval_seconds = from * measured.step_seconds;
  return choice.steps > current && measured.cost_seconds() > limits.max_overhead * interval_seconds;
}

void SaveMeter::on_step(Instant now, int64_t step, double step_seconds, double stall_seconds) {
  std::deque<double>& steps = save_ ? beside_ : quiet_;
  steps.push_back(step_seconds);
  if (steps.size() > kStepsKept) steps.pop_front();
  if (save_) {
    save_->beside_seconds += step_seconds;
    ++save_->beside_count;
  }
  if (stall_seconds > 0.0) save_ = Save{step, now, stall_seconds, 0.0, 0};
}

std::optional<SaveMeasurements> SaveMeter::on_commit(Instant now, int64_t step) {
  if (!save_ || save_->step != step) return std::nullopt;
  SaveMeasurements cost;
  cost.stall_seconds = save_->stall_seconds;
  cost.save_seconds = to_seconds(now - save_->began);
  if (!quiet_.empty()) {
    const double undisturbed = static_cast<double>(save_->beside_count) * median(quiet_);
    cost.slowdown_seconds = std::max(0.0, save_->beside_seconds - undisturbed);
  }
  save_.reset();
  return cost;
}

void SaveMeter::on_failure(int64_t step) {
  if (save_ && save_->step == step) save_.reset();
}

double SaveMeter::step_seconds() const {
  return median(quiet_.empty() ? beside_ : quiet_);
}

}  // namespace penstock
