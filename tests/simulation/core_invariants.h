// What must hold after every event of the coordinator's core, whatever the workers do. Judged by
// what the core was given, decided and wrote, so that both simulations share it; what only the
// simulated world knows (which processes run) is checked by the clusters.
//
//   one epoch     epochs only grow; steps, commits and orders are of the current one; steps are
//                 recorded in the order trained
//   durable       events have consecutive numbers; a job's id is used once; an ended job stays as
//                 it ended until it is resumed; a cancelled one never runs on
//   gangs         placed whole or not at all, on free devices of workers that are up; all ranks of
//                 an epoch get the same order; training begins when every rank is ready; a commit
//                 has a segment of every rank, is ordered once, and over before the next start
//   progress      states follow the diagram of coordinator.h; the restart budget and the back-off
//                 hold; who is lost hosts nothing that is to run; what is suspended holds no
//                 device and has its last step saved; what users were promised comes before the
//                 next start
//   bounds        what is kept for a job, and what one event sends
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <tuple>

#include "coordinator/core/coordinator.h"

namespace penstock {

class CoreInvariants {
 public:
  // `event`: what the core was given; none at its start. Returns the first violation, or empty.
  std::string after_event(Instant now, const Event* event, const Coordinator& core,
                          const Effects& effects);
  // A new core has taken up the records of one that crashed, and done nothing yet but its start.
  std::string after_restart(const Coordinator& core);

 private:
  struct JobHistory {
    Epoch epoch;
    std::optional<JobState> ended;
    bool cancelled = false;
    uint64_t cursor = 0;
    std::optional<StartRank> order;  // the first of `epoch`
    int64_t failures_without_step = 0;
    std::optional<Instant> failed_at;  // by this core
    int64_t failures = 0;              // since it was submitted or resumed
    int64_t failures_counted = 0;      // likewise, without a step, as they are to be on record
    using Commit = std::pair<Epoch, int64_t>;
    std::set<Commit> commits;         // that this core ordered
    std::set<Commit> commits_on_way;  // and of these those that it has heard nothing of
    std::set<Epoch> crashed;  // of which it was told that a rank may have written anything
    bool suspend = false;             // a user was promised that it will be
    std::optional<int64_t> width;     // likewise, of its next start
  };

  template <typename Message>
  const Message* said_by_host(const Coordinator& core) const;
  void check_events(Instant now, const Coordinator& core, const Effects& effects);
  void check_suspended(const Coordinator& core, const JobEvent& event);
  void check_transition(Instant now, const Coordinator& core, const JobEvent& event);
  void check_placing(Instant now, const Job& job);
  void check_promises(const Job& job);
  void check_answers(const Coordinator& core, const Effects& effects);
  void check_steps(const Coordinator& core, const Effects& effects);
  void check_commits(const Coordinator& core, const Effects& effects);
  void check_orders(const Coordinator& core, const Effects& effects);
  void note_crash(const Coordinator& core);
  void check_failed_save(const Coordinator& core);
  void check_start(const Job& job, const StartRank& order);
  void check_begin(const Job& job, const BeginTraining& order);
  void check_jobs(const Coordinator& core, const Effects& effects);
  void check_job(const Coordinator& core, const Job& job);
  void check_placement(const Coordinator& core, const Job& job);
  void check_bounds(const Coordinator& core, const Job& job);
  void check_exit(const Coordinator& core, const Effects& effects);
  void check_incarnations(Instant now, const Coordinator& core);
  void violate(std::string what);

  const Event* event_ = nullptr;  // that is being checked
  std::string violation_;
  uint64_t last_event_ = 0;
  uint64_t looks_ = 0;
  JobId last_job_;
  std::set<RequestId> answered_;
  std::map<JobId, JobHistory> jobs_;
  std::map<std::pair<WorkerId, int32_t>, JobId> devices_;
  std::map<JobId, std::vector<RankPlacement>> placements_;
  std::map<WorkerId, std::vector<uint64_t>> incarnations_;  // that were the one on record
};

}  // namespace penstock
