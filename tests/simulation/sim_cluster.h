// A cluster whose workers are a model: daemons that follow comm/control/message.h and no more, on a
// network that delays, reorders, repeats and loses single messages, which is worse than ZeroMQ over
// TCP can be (agent_cluster.h has what that can do). The core must hold out all the same: it
// promises that any message may be lost, late or repeated.
#pragma once

#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "tests/simulation/simulated_coordinator.h"

namespace penstock {

struct SimOptions {
  uint64_t seed = 0;
  int worker_count = 3;
  int devices_per_worker = 2;
  int job_count = 2;
  double loss = 0.05;  // of each message
  double repetition = 0.05;
  double lateness = 0.01;     // likewise: it comes up to half a minute later
  double rank_kills = 0.006;  // chances per tick and worker
  double worker_kills = 0.004;
  double partitions = 0.003;
  double removals = 0.0;  // of jobs that ended; per tick
  int64_t max_restarts = 1000;
  bool strange_data = false;  // the first worker's copy of the data is another one
  CoordinatorFaults coordinator = {.crashes = 0.006,
                                   .longest_down = std::chrono::seconds(6),
                                   .commit_failures = 0.05,
                                   .last_commit_fails = true};
  double drains = 0.0;       // chance per tick of each worker; it is undrained some time later
  double scalings = 0.0;     // of each job, to another data-parallel width
  double suspensions = 0.0;  // likewise of a job, which is resumed
  // Steps whose loss is a spike that a rollback must leave out.
  std::set<int64_t> spikes = {};
  Duration fault_time = std::chrono::seconds(40);   // faults happen
  Duration quiet_time = std::chrono::seconds(400);  // then none do, and every job must end
};

class SimCluster final : public SimulatedCoordinator {
 public:
  explicit SimCluster(const SimOptions& options);
  std::string run() override;

 private:
  using RankKey = std::tuple<JobId, Epoch, Rank>;
  struct SimRank {
    StartRank order;
    RankStatus status;
    Instant ready_at;
    bool begun = false;
    bool final_answered = false;
    bool pause = false;      // asked to
    int64_t paused_at = -1;  // saved after that step, and trains no other
  };
  struct SimWorker {
    std::string name;
    uint64_t incarnation = 0;
    bool alive = false;
    bool registered = false;
    Instant back_at;
    Instant partitioned_until;
    uint64_t sequence = 0;
    uint64_t challenge = 0;
    Instant next_beat;
    std::map<JobId, Epoch> fences;
    std::map<RankKey, SimRank> ranks;
    std::map<RankKey, ControlMessage> exits;                         // until acknowledged
    std::map<std::pair<RankKey, int64_t>, ControlMessage> segments;  // until CheckpointOutcome
    std::string peer;
  };
  struct InFlight {
    bool to_core = false;
    std::string peer;     // of the worker's side
    uint64_t number = 0;  // of all that were sent
    ControlMessage message;
  };

  Duration milliseconds_below(int64_t bound) { return below(std::chrono::milliseconds(bound)); }
  void post(InFlight flight);
  void deliver_due();
  void tick_world();
  void faults();
  void on_core_crash() override;
  void submit_jobs();
  void bother_jobs();
  void scale();
  void drain_and_undrain();

  void start_worker(SimWorker& worker);
  void kill_worker(SimWorker& worker);
  void tick_worker(SimWorker& worker);
  void say(SimWorker& worker, ControlMessage message);
  void send_register(SimWorker& worker);
  void on_order(SimWorker& worker, const ControlMessage& message);
  void on_start(SimWorker& worker, const StartRank& order);
  void on_stop(SimWorker& worker, const StopRanks& order);
  void end_rank(SimWorker& worker, const RankKey& key, int32_t code, int32_t signal);
  void train(JobId job, Epoch epoch);
  RankReady ready(const SimWorker& worker, const RankKey& key) const;
  void check_data(JobId job, const std::vector<std::pair<SimWorker*, RankKey>>& members);
  std::set<int64_t>& trained_by(const StartRank& order);
  void check_trained();
  JobSpec spec_of(const std::string& name) const;

  void send(OutgoingMessage out) override;
  void check(const Effects& effects) override;
  void check_start_order(const StartRank& order);
  void check_drained(const JobEvent& event);
  bool may_still_run(const SimWorker& worker, JobId job, Epoch epoch) const;

  const SimOptions options_;
  std::vector<SimWorker> workers_;
  std::multimap<Instant, InFlight> network_;
  std::map<std::string, size_t> worker_by_peer_;
  uint64_t sent_ = 0;
  std::map<std::pair<bool, std::string>, uint64_t> newest_delivered_;
  std::map<std::pair<JobId, Epoch>, size_t> world_;   // ranks of an attempt
  std::map<JobId, Epoch> started_;                    // newest epoch with a StartRank
  std::map<JobId, std::vector<StepRange>> left_out_;  // what its newest StartRank says
  // The steps that changed the model: of an epoch so far, with those that its start restored; and
  // those in what was saved after a step.
  std::map<std::pair<JobId, Epoch>, std::set<int64_t>> trained_;
  std::map<std::tuple<JobId, Epoch, int64_t>, std::set<int64_t>> saved_;
  std::map<JobId, bool> trained_on_strange_data_;
};

}  // namespace penstock
