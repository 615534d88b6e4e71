// Decides whether a step may change the model: a pure function of the sums that every rank has at
// the end of the step, and of the loss and gradient norm of the steps accepted before it. So every
// rank decides the same, and since those values are part of the training state, a run that goes on
// from a checkpoint decides as one that was never interrupted.
//
// What is usual is a median, and how far values are from it a median, too, so that neither a slope
// nor a few bad steps among the accepted ones move the limit much:
//   limit = median + sigmas · max(1.4826 · median(|x - median|), median / 1000)
// 1.4826 makes it one standard deviation where values are normally distributed; the last term keeps
// a loss that hardly moves from tripping over nothing. Nothing is judged before half a window of
// steps is accepted. Steps that are left out are not part of the window.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "comm/run/guards.h"

namespace penstock {

class NumericalGuard {
 public:
  // Takes all memory.
  explicit NumericalGuard(const GuardsSpec& spec);

  // What follows from a step's loss and gradient norm. Records them when the step is accepted, and
  // that it was left out when it is. A skip beyond max_skips is a stop.
  GuardFinding judge(double loss, double grad_norm);

  // Steps left out so far.
  int64_t skips() const { return static_cast<int64_t>(state_[kSkips]); }

  // What judge() depends on, for checkpoints; the same size whatever the spec. Addresses are
  // stable.
  std::span<double> state() { return state_; }

 private:
  static constexpr size_t kAccepted = 0;
  static constexpr size_t kSkips = 1;
  static constexpr size_t kLosses = 2;
  static constexpr size_t kNorms = kLosses + kGuardWindowMax;
  static constexpr size_t kStateSize = kNorms + kGuardWindowMax;

  GuardFinding spike(const SpikeSpec& spec, GuardSignal signal, size_t values, double value);

  const GuardsSpec spec_;
  // Steps accepted, steps left out, rings of the newest accepted losses and gradient norms.
  std::vector<double> state_;
  std::vector<double> sorted_;  // scratch
};

}  // namespace penstock
