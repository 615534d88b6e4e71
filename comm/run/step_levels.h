// A value that changes at given steps: piecewise constant, hence a pure function of the step, so
// that a resumed run needs no state to find it.
#pragma once

#include <cstdint>
#include <vector>

namespace penstock {

template <typename T>
struct StepLevel {
  int64_t from_step = 1;  // the first step it holds for; steps count from 1
  T value = {};
  bool operator==(const StepLevel&) const = default;
};

// The value of the last level that has begun by `step`, or `initial` before the first.
// REQUIRES: from_step ascends.
template <typename T>
T value_at(const std::vector<StepLevel<T>>& levels, T initial, int64_t step) {
  for (const StepLevel<T>& level : levels) {
    if (level.from_step > step) break;
    initial = level.value;
  }
  return initial;
}

// Σ of the values of steps 1 to `step` - 1.
template <typename T>
T total_before(const std::vector<StepLevel<T>>& levels, T initial, int64_t step) {
  T total = {};
  int64_t from = 1;
  for (const StepLevel<T>& level : levels) {
    if (level.from_step >= step) break;
    total += initial * (level.from_step - from);
    from = level.from_step;
    initial = level.value;
  }
  return total + initial * (step - from);
}

}  // namespace penstock
