// How often a job saves its state when its spec leaves that to the coordinator
// (`checkpoint.interval: auto`). Pure.
//
// Saving costs time, and so does training again what a failure undoes. With a cost C of one save
// and a mean time M between failures, the sum of both is least when the time T from one save to the
// next is
//
//   T = sqrt(2 C M)   J. W. Young, A first order approximation to the optimum checkpoint interval,
//                     CACM 17(9), 1974; the leading term of J. T. Daly, A higher order estimate of
//                     the optimum checkpoint interval for restart dumps, FGCS 22(3), 2006
//   T = M             where C is M / 2 or more: none of these terms holds there
//
// C is not how long a save takes but what it costs training: the stall, and by how much steps are
// longer while it is written. M is what has been seen of the job, with one failure in the expected
// time before any was: M = (prior + trained) / (1 + failures).
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>

#include "comm/base/clock.h"

namespace penstock {

// What was measured of one job. Seconds; 0 before the first.
struct SaveMeasurements {
  double step_seconds = 0.0;      // median of recent steps that nothing was saved beside
  double stall_seconds = 0.0;     // of a save: what the step waited for; a mean over recent saves,
  double slowdown_seconds = 0.0;  //   as are by how much steps beside it were longer in all,
  double save_seconds = 0.0;      //   and the time from its step to its commit
  int64_t save_count = 0;
  double training_seconds = 0.0;  // over the job's life
  int64_t failure_count = 0;      // likewise
  bool operator==(const SaveMeasurements&) const = default;

  double cost_seconds() const { return stall_seconds + slowdown_seconds; }
  // Adds one save.
  void add(const SaveMeasurements& save);
};

struct SaveLimits {
  double max_overhead = 0.01;  // most that saving may cost, as a share of training time; above 0
  double mtbf_prior_seconds = 0.0;  // above 0
  int64_t steps_max = 1;            // of the job
};

struct SaveChoice {
  int64_t steps = 1;          // from one save to the next
  double mtbf_seconds = 0.0;  // M
  double overhead = 0.0;      // C / T, of the T chosen
  std::string reason;         // one sentence with every input

  bool operator==(const SaveChoice&) const = default;
};

// Steps until the first save, which is there to be measured.
inline constexpr int64_t kFirstSaveSteps = 10;

// T as above, in steps, but
//   - never so short that saving costs more than the limit,
//   - nor than twice what a save takes: saves must not follow each other without a pause, and the
//     cost can only be seen against steps that nothing was saved beside,
//   - at least one step, at most all of them.
// Before a save and a step were measured: kFirstSaveSteps. Never a value that is not finite.
SaveChoice choose_save_interval(const SaveMeasurements& measured, const SaveLimits& limits);

// Whether to go over from `current` steps: the choice is a fifth larger or smaller, or saving costs
// more than the limit at `current`.
bool worth_changing(int64_t current, const SaveChoice& choice, const SaveMeasurements& measured,
                    const SaveLimits& limits);

// Watches the steps of one attempt. Not thread-safe.
class SaveMeter {
 public:
  // A step ended. `step_seconds` without `stall_seconds`, which is above 0 when the state after
  // `step` is being saved now.
  void on_step(Instant now, int64_t step, double step_seconds, double stall_seconds);
  // The save of `step` was committed: what it cost, or nothing when it did not begin here.
  std::optional<SaveMeasurements> on_commit(Instant now, int64_t step);
  // The save of `step` ended otherwise, and says nothing.
  void on_failure(int64_t step);

  // Median of recent steps without a save beside them; of those that had one, when there were no
  // others. 0: none.
  double step_seconds() const;

 private:
  struct Save {
    int64_t step = 0;
    Instant began;
    double stall_seconds = 0.0;
    double beside_seconds = 0.0;  // of the steps trained since
    int64_t beside_count = 0;
  };
  static constexpr size_t kStepsKept = 20;

  std::deque<double> quiet_;   // newest last
  std::deque<double> beside_;  // likewise
  std::optional<Save> save_;   // under way
};

}  // namespace penstock
