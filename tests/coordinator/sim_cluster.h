// A whole cluster in one thread and virtual time: the real coordinator core, worker daemons that
// follow comm/control/message.h, a network that delays, reorders, repeats and loses, and faults
// drawn from a seed. Checked after every step of the core; the first violation is kept with its
// time.
#pragma once

#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "tests/support/simulation.h"

namespace penstock {

struct SimOptions {
  uint64_t seed = 0;
  int worker_count = 3;
  int devices_per_worker = 2;
  int job_count = 2;
  double loss = 0.05;  // of each message
  double repetition = 0.05;
  bool partitions = true;
  bool coordinator_crashes = true;
  // Chance per tick that a worker is drained; some time later it is undrained.
  double drains = 0.0;
  double scalings = 0.0;     // likewise of a job, to another data-parallel width
  double suspensions = 0.0;  // likewise of a job, which is resumed
  // Steps whose loss is a spike that a rollback must leave out.
  std::set<int64_t> spikes = {};
  Duration fault_time = std::chrono::seconds(40);   // faults happen
  Duration quiet_time = std::chrono::seconds(400);  // then none do, and every job must end
};

class SimCluster final : public SimulatedCoordinator {
 public:
  explicit SimCluster(const SimOptions& options);
  // The first violated invariant, or empty.
  std::string run();

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
    Instant next_beat;
    std::map<JobId, Epoch> fences;
    std::map<RankKey, SimRank> ranks;
    std::map<RankKey, ControlMessage> exits;                         // until acknowledged
    std::map<std::pair<RankKey, int64_t>, ControlMessage> segments;  // until CheckpointOutcome
    std::string peer() const { return name + "#" + std::to_string(incarnation); }
  };
  struct InFlight {
    bool to_core = false;
    std::string peer;  // of the worker's side
    ControlMessage message;
  };

  Duration milliseconds_below(int64_t bound) { return below(std::chrono::milliseconds(bound)); }
  void post(InFlight flight);
  void deliver_due();
  void tick_world();
  void faults();
  void break_connections();
  void submit_and_cancel();
  void suspend_and_resume();
  void drain_and_undrain();
  void check_drained(const JobEvent& event);

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
  std::set<int64_t>& trained_by(const StartRank& order);
  void check_trained();
  JobSpec spec_of(const std::string& name) const;

  void send(OutgoingMessage out) override;
  void check(const Effects& effects) override;
  void check_start_order(const StartRank& order);
  bool may_still_run(const SimWorker& worker, JobId job, Epoch epoch) const;
  void check_suspended(const JobEvent& event);

  const SimOptions options_;
  std::vector<SimWorker> workers_;
  std::multimap<Instant, InFlight> network_;
  std::map<JobId, JobState> ended_;
  std::map<JobId, uint64_t> cursors_;
  std::map<std::pair<JobId, Epoch>, size_t> world_;   // ranks of an attempt
  std::map<JobId, Epoch> started_;                    // newest epoch with a StartRank
  std::map<JobId, std::vector<StepRange>> left_out_;  // what its newest StartRank says
  // The steps that changed the model: of an epoch so far, with those that its start restored; and
  // those in what was saved after a step.
  std::map<std::pair<JobId, Epoch>, std::set<int64_t>> trained_;
  std::map<std::tuple<JobId, Epoch, int64_t>, std::set<int64_t>> saved_;
  uint64_t last_event_ = 0;
  uint64_t requests_ = 0;
};

}  // namespace penstock
