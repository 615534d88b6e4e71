// What the simulations share (tests/coordinator: the core against a model of the workers;
// tests/simulation: the core against the real agents): the coordinator's side in virtual time, with
// its store, its clients and its checkpoint disk; seeds.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "comm/base/random.h"
#include "coordinator/core/coordinator.h"

namespace penstock {

// What every simulated job is.
inline constexpr int64_t kSimSteps = 12;
inline constexpr int64_t kSimCheckpointInterval = 4;
inline constexpr size_t kSimWorldSize = 4;
JobSpec sim_spec(const std::string& name);
StepReport sim_report(JobId job, Epoch epoch, int64_t step);
SegmentSaved sim_segment(JobId job, Epoch epoch, Rank rank, int64_t step);

// A simulated cluster around the real core. Of the core's records what was synced survives a crash,
// and a prefix of the rest; what its disk threads did not report may be done or not.
class SimulatedCoordinator {
 public:
  SimulatedCoordinator(const SimulatedCoordinator&) = delete;
  SimulatedCoordinator& operator=(const SimulatedCoordinator&) = delete;
  int64_t core_steps() const { return core_steps_; }
  int64_t restarts() const;  // of all jobs
  int64_t rebalances() const { return rebalances_; }

 protected:
  explicit SimulatedCoordinator(uint64_t seed) : random_(seed, 0) {}
  virtual ~SimulatedCoordinator() = default;
  virtual void send(OutgoingMessage out) = 0;
  // Once written, before they are acted upon.
  virtual void check(const Effects& effects) = 0;

  bool chance(double probability) { return random_.uniform() < probability; }
  Duration below(Duration bound) {
    return Duration(static_cast<int64_t>(random_.below(static_cast<uint64_t>(bound.count()))));
  }
  void start_core();
  void start_core_when_due() {
    if (!core_ && now_ >= core_back_at_) start_core();
  }
  void crash_core(Duration down_max);
  void feed(const Event& event);
  void feed_disk_results();
  // Every job clients were promised, at least so many, passes.
  bool all_jobs(int count, const std::function<bool(JobState)>& passes) const;
  std::string states() const;  // of all jobs, for a violation
  // The first violation is kept, with what happened last before it.
  void violate(const std::string& what);
  void trace(const std::string& line);

  Random random_;
  Instant now_{1'000'000'000'000'000};
  const Instant begin_ = now_;
  std::optional<Coordinator> core_;                        // nothing while it is down
  std::map<JobId, std::map<int64_t, Epoch>> checkpoints_;  // committed, by step
  std::set<JobId> accepted_;                               // jobs clients were promised
  double commit_failures_ = 0;                             // chance; never of the last step
  std::string violation_;                                  // empty: none

 private:
  void apply(Effects effects);
  void emit_from_disk(JobId job, Duration longest, Event event);

  Instant core_back_at_;
  std::map<std::string, std::string> store_;
  std::vector<Record> unsynced_;  // written since the last synced batch
  std::multimap<Instant, Event> disk_results_;
  std::map<JobId, Instant> disk_free_at_;  // one thread does a job's work on the disk, in order
  std::map<JobId, FindCheckpoint> finds_;  // the newest
  int64_t core_steps_ = 0;
  int64_t rebalances_ = 0;
  std::deque<std::string> trace_;
};

// Runs `run` for seeds from `first_seed` on until one returns a violation, which fails the test
// with its seed. `count` is for optimised builds; others, ten times slower, try a seventh.
// PENSTOCK_SIM_SEED runs one seed alone, PENSTOCK_SIM_SEEDS another number of them.
void run_seeds(uint64_t first_seed, uint64_t count,
               const std::function<std::string(uint64_t seed)>& run);

}  // namespace penstock
