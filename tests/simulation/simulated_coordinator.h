// What both simulated clusters share: the coordinator's side in virtual time, which is the real
// core with a simulated store, clients and checkpoint disk; faults of these; and what must hold
// after every event of the core (core_invariants.h).
//
// The store: of the core's records what was synced survives a crash, and a prefix of the rest. A
// crash comes between two events or within one: before its records are written, when it might as
// well not have happened, or after, when nothing of it was acted upon. The checkpoint disk: what
// its threads did not report may be done or not.
//
// Everything is drawn from one seed, so a seed is a cluster's whole life, and repeats it.
#pragma once

#include <fmt/format.h>

#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "comm/base/random.h"
#include "coordinator/core/coordinator.h"
#include "tests/simulation/core_invariants.h"
#include "tests/simulation/counts.h"

namespace penstock {

// What every simulated job is.
inline constexpr int64_t kSimSteps = 12;
inline constexpr int64_t kSimCheckpointInterval = 4;
inline constexpr size_t kSimWorldSize = 4;
JobSpec sim_spec(const std::string& name);
StepReport sim_report(JobId job, Epoch epoch, int64_t step);
SegmentSaved sim_segment(JobId job, Epoch epoch, Rank rank, int64_t step);

// Chances per tick, of each event or of each commit.
struct CoordinatorFaults {
  double crashes = 0.005;
  double crashes_in_event = 0.0005;
  Duration longest_down = std::chrono::seconds(5);
  double stalls = 0.0;  // like SIGSTOP, and SIGCONT some time later
  Duration longest_stall = std::chrono::seconds(20);
  double commit_failures = 0.0;
  bool last_commit_fails = false;  // that of the last step may, too: then its job has failed
  double damage = 0.0;             // of a committed checkpoint, found by a start that wants it
};

class SimulatedCoordinator {
 public:
  SimulatedCoordinator(const SimulatedCoordinator&) = delete;
  SimulatedCoordinator& operator=(const SimulatedCoordinator&) = delete;
  virtual ~SimulatedCoordinator() = default;
  // To its end, once. The first violation with its time, or empty.
  virtual std::string run() = 0;
  const SimCounts& counts() const { return counts_; }
  // One line each: time, who, what. Kept when asked for before run(); it slows down.
  void keep_transcript() { keeps_transcript_ = true; }
  const std::vector<std::string>& transcript() const { return transcript_; }

 protected:
  SimulatedCoordinator(uint64_t seed, const CoordinatorFaults& faults)
      : random_(seed, 0), coordinator_faults_(faults) {}
  virtual void send(OutgoingMessage out) = 0;
  // Once written, before they are acted upon.
  virtual void check(const Effects& effects) = 0;
  // The coordinator's process is gone, and its connections with it.
  virtual void on_core_crash() = 0;

  bool chance(double probability) { return probability > 0 && random_.uniform() < probability; }
  Duration below(Duration bound) {
    return Duration(static_cast<int64_t>(random_.below(static_cast<uint64_t>(bound.count()))));
  }
  void count(Fault fault) { ++counts_.of(fault); }

  void start_core();
  void start_core_when_due() {
    if (!core_ && now_ >= core_back_at_) start_core();
  }
  // A crash or a stall, maybe.
  void coordinator_faults();
  bool core_hears() const { return core_ && now_ >= core_stalled_until_; }
  // When the coordinator was last away, or will be back.
  Instant core_disturbed_until() const;
  // Nothing while there is no core. There may be none afterwards.
  void feed(const Event& event);
  void feed_disk_results();
  // Every job clients were promised, at least so many, passes.
  bool all_jobs(int count, const std::function<bool(JobState)>& passes) const;
  // Some time after they were suspended, at the latest when faults stop, jobs are resumed.
  void suspend_and_resume(double suspensions, double resumptions);
  std::string states() const;  // of all jobs, for a violation
  void count_restarts();
  // The first violation is kept.
  void violate(const std::string& what);
  template <typename... Values>
  void trace(std::string_view who, fmt::format_string<Values...> what, Values&&... values) {
    if (!keeps_transcript_) return;
    transcript_.push_back(fmt::format("{:7.2f} s  {:<12} {}", to_seconds(now_ - begin_), who,
                                      fmt::format(what, std::forward<Values>(values)...)));
  }

  Random random_;
  Instant now_{1'000'000'000'000'000};
  const Instant begin_ = now_;
  const CoordinatorFaults coordinator_faults_;
  bool faulty_ = true;                                     // until faults stop
  std::optional<Coordinator> core_;                        // nothing while it is down
  std::map<JobId, std::map<int64_t, Epoch>> checkpoints_;  // committed, by step
  std::set<JobId> accepted_;                               // jobs clients were promised
  std::set<JobId> removals_asked_;                         // of jobs, by their users
  uint64_t requests_ = 0;                                  // the newest client's
  std::string violation_;                                  // empty: none
  SimCounts counts_;

 private:
  void crash_core(bool between_events);
  void apply(const Event* event, Effects effects);
  void write(const Effects& effects);
  void act(Effects effects);
  void check_start(const StartRank& order);
  void check_health(const Effects& effects);  // simulated_health.cc
  void check_store();
  CheckpointFound look_for(const FindCheckpoint& find);
  void emit_from_disk(JobId job, Duration longest, Event event);

  Instant core_back_at_;
  Instant core_stalled_until_;
  std::map<std::string, std::string> store_;
  std::vector<Record> unsynced_;  // written since the last synced batch
  uint64_t events_told_ = 0;      // the number of the last event that was acted upon
  std::multimap<Instant, Event> disk_results_;
  std::map<JobId, Instant> disk_free_at_;  // one thread does a job's work on the disk, in order
  std::map<std::pair<JobId, uint64_t>, FindCheckpoint> finds_;  // by job and number
  std::set<std::pair<JobId, int64_t>> damaged_;
  CoreInvariants invariants_;
  bool keeps_transcript_ = false;
  std::vector<std::string> transcript_;
};

}  // namespace penstock
