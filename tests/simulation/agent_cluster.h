// A cluster in one thread and virtual time whose two sides of the control plane are both the real
// ones: the coordinator's core and one Agent per worker. Simulated are connections (in order, and
// lost with what they carry when they break), rank processes that follow worker/agent/agent.h, the
// checkpoint disk, and faults drawn from a seed.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "comm/control/lease_file.h"
#include "tests/support/simulation.h"
#include "worker/agent/agent.h"

namespace penstock {

struct AgentClusterOptions {
  uint64_t seed = 0;
  int worker_count = 3;
  int devices_per_worker = 2;
  int job_count = 2;
  double rank_kills = 0.006;  // chances per tick and subject
  double rank_stops = 0.0;    // like SIGSTOP: it does nothing any more, and is not gone
  int64_t hang_timeout = 60;  // of the spec's recovery
  double daemon_kills = 0.003;
  double cuts = 0.01;  // of a connection
  Duration longest_cut = std::chrono::seconds(8);
  double coordinator_crashes = 0.005;
  double suspensions = 0.0;  // per job; some time later it is resumed
  // Of the spec's rebalance; with it, load is reported that is uneven in another way every time.
  double rebalance_threshold = 0.0;
  Duration fault_time = std::chrono::seconds(40);   // faults happen
  Duration quiet_time = std::chrono::seconds(200);  // then none do, and every job must succeed
};

class AgentCluster final : public SimulatedCoordinator {
 public:
  explicit AgentCluster(const AgentClusterOptions& options);
  // The first violated promise with what led to it, or empty.
  std::string run();
  // Ranks that went on from what their daemon held.
  int64_t memory_starts() const { return memory_starts_; }
  int64_t suspensions() const { return suspensions_; }

 private:
  // A rank process of one worker.
  struct Process {
    int32_t pid = 0;
    int64_t hello_at_ns = 0;  // when it connects to its daemon
    bool bound = false;
    std::optional<StartRank> order;
    int64_t ready_at_ns = 0;  // when it has loaded, once it has its order
    bool ready = false;
    bool begun = false;
    int64_t step = 0;
    bool final_committed = false;
    bool pause = false;      // asked to
    int64_t paused_at = -1;  // saved after that step, and trains no other
    bool stopped = false;
    int64_t moved_at_ns = 0;         // its flight record changed
    std::optional<ExitStatus> ends;  // as soon as the daemon looks
  };
  struct Held {
    Epoch epoch;  // the last it was for
    std::vector<int64_t> steps;
  };
  struct Worker {
    std::string name;
    int incarnation = 0;
    std::unique_ptr<Agent> agent;  // null while the daemon is down
    int64_t back_at_ns = 0;
    std::map<RankKey, Process> processes;
    std::map<std::pair<JobId, Rank>, Held> memory;  // what the daemon holds
    bool connected = false;
    int connection = 0;  // counts connections, so that each has a name
    int64_t connect_at_ns = 0;
    Duration lease = Duration(0);  // of its ranks, as the coordinator set it
    int64_t lease_end_ns = LeaseFile::kEndless;
    std::string peer() const { return name + "/" + std::to_string(connection); }
  };
  struct Flight {
    int64_t at_ns = 0;
    std::string peer;
    ControlMessage message;
  };

  int64_t now_ns() const { return now_.nanoseconds; }
  int64_t within(Duration longest) { return (now_ + below(longest)).nanoseconds; }
  int64_t arrival(const std::deque<Flight>& line);

  void start_daemon(Worker& worker);
  void kill_daemon(Worker& worker);
  void disconnect(Worker& worker);
  AgentActions actions_of(Worker& worker);
  RankActivity inspect(const Worker& worker, const RankKey& key) const;
  const Process* find_process(const RankKey& key) const;
  void extend_lease(Worker& worker, int64_t since_ns);
  void keep_to_lease(Worker& worker);
  bool can_progress(JobId job, Epoch epoch) const;
  Status to_rank(Worker& worker, const RankKey& key, const ControlMessage& message);
  bool must_be_stopped(const Worker& worker, JobId job) const;
  Result<int32_t> spawn(Worker& worker, const StartRank& start);
  bool restore_from_memory(Worker& worker, const StartRank& start);
  void leave_memory(Worker& worker, const RankKey& key, const ExitStatus& status);

  void deliver();
  void advance_processes(Worker& worker);
  void train_gangs();
  void train(const std::vector<std::pair<Worker*, RankKey>>& gang);
  ExpertLoadReport uneven_loads(const RankKey& key, int64_t step);
  void faults();
  void submit_jobs();
  void suspend_and_resume();

  void break_connections();
  void send(OutgoingMessage out) override;
  void check(const Effects& effects) override;
  bool all_succeeded() const;

  const AgentClusterOptions options_;
  std::vector<Worker> workers_;
  std::deque<Flight> to_core_;                            // by arrival within a connection
  std::map<std::string, std::deque<Flight>> to_workers_;  // by peer
  uint64_t requests_ = 0;
  int32_t last_pid_ = 100;
  int64_t memory_starts_ = 0;
  int64_t suspensions_ = 0;
};

}  // namespace penstock
