// What happens when a step's loss or gradient norm is no number, or jumps: what a spec asks for,
// and what was found at a step. worker/engine/numerical_guard.h decides.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace penstock {

// From mild to severe: where a step trips two guards, the later one holds. Numbers are part of the
// wire format: never renumber.
enum class GuardPolicy : uint8_t {
  kNone = 0,  // not looked at
  kWarn,      // an event; the step counts
  kSkip,      // the step changes nothing; training goes on with the next one
  kRollback,  // back to a checkpoint from before, from which this step and those before it are left
              // out
  kStop,      // the job fails
};
inline constexpr GuardPolicy kGuardPolicies[] = {GuardPolicy::kNone, GuardPolicy::kWarn,
                                                 GuardPolicy::kSkip, GuardPolicy::kRollback,
                                                 GuardPolicy::kStop};
std::string_view to_string(GuardPolicy policy);  // "none", "warn", "skip", "rollback", "stop"

// Accepted steps whose loss and gradient norm the state holds.
inline constexpr int64_t kGuardWindowMax = 1024;

// A value more than `sigmas` deviations above the median of the last `window` accepted steps.
struct SpikeSpec {
  GuardPolicy policy = GuardPolicy::kNone;
  double sigmas = 6.0;
  int64_t window = 128;
  bool operator==(const SpikeSpec&) const = default;
};

struct GuardsSpec {
  GuardPolicy not_finite = GuardPolicy::kStop;  // skip, rollback or stop
  SpikeSpec loss_spike;
  SpikeSpec grad_norm_spike;
  int64_t rollback_steps = 100;  // that a rollback takes back and leaves out, the bad one included
  int64_t max_skips = 10;        // steps that kSkip may leave out; the next one stops the job
  int64_t max_rollbacks = 3;     // since the job was submitted or resumed
  // Silent corruption; 0: never.
  int64_t compare_replicas_every = 100;  // steps: replicas have the same weights
  int64_t duplicate_every = 0;           // steps: computed twice, with the same results
  // Whether what is decided depends on earlier steps.
  bool remembers() const {
    return not_finite == GuardPolicy::kSkip || loss_spike.policy != GuardPolicy::kNone ||
           grad_norm_spike.policy != GuardPolicy::kNone;
  }
  bool operator==(const GuardsSpec&) const = default;
};

// Steps of a job, both ends included.
struct StepRange {
  int64_t first = 0;
  int64_t last = 0;
  bool operator==(const StepRange&) const = default;
};
bool contains(std::span<const StepRange> ranges, int64_t step);

// Numbers are part of the wire format: never renumber.
enum class GuardSignal : uint8_t { kNone = 0, kNotFinite = 1, kLossSpike = 2, kGradNormSpike = 3 };
inline constexpr GuardSignal kGuardSignalLast = GuardSignal::kGradNormSpike;
std::string_view to_string(GuardSignal signal);  // "none", "not_finite", "loss_spike", …

// What a guard found at one step and what follows. kSkip without a signal: a rollback left the step
// out.
struct GuardFinding {
  GuardSignal signal = GuardSignal::kNone;
  GuardPolicy action = GuardPolicy::kNone;
  double value = 0.0;   // that tripped it
  double median = 0.0;  // of a spike: what is usual
  double limit = 0.0;   // of a spike: what the value is above
  bool operator==(const GuardFinding&) const = default;
};
// "loss 9.31 is above 4.72, the limit by the accepted steps before it, whose median is 4.1"
std::string words_of(const GuardFinding& finding);

}  // namespace penstock
