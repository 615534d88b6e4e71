// A cluster whose two sides of the control plane are both the real ones: the coordinator's core and
// one Agent per worker. Simulated are connections, rank processes that follow worker/agent/agent.h,
// what their daemons hold of them in memory, and faults.
//
// The network is as bad as ZeroMQ over TCP can be. A connection keeps its order and repeats
// nothing. When it breaks, what was under way to the worker is lost, of what was under way to the
// coordinator a beginning still arrives, which may be long after the worker's next connection was
// made, and the coordinator is not told. It may be held up, in one direction or both, and then
// hand over everything at once. Repeats and gaps come from what both sides send again after a new
// connection. It is worse where orders are to overtake each other.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "comm/control/lease_file.h"
#include "tests/simulation/simulated_coordinator.h"
#include "worker/agent/agent.h"

namespace penstock {

struct AgentClusterOptions {
  uint64_t seed = 0;
  int worker_count = 3;
  int devices_per_worker = 2;
  int job_count = 2;
  // Chances per tick and subject.
  double rank_kills = 0.006;
  double rank_crashes = 0.001;   // exits or aborts by itself: nobody trusts its memory
  double rank_hangs = 0.0;       // stopped (SIGSTOP), or stuck: it does nothing any more
  double rank_slowness = 0.001;  // it takes as long as `longest_slow` for a step
  double failed_spawns = 0.01;   // of each
  bool sick_worker = false;      // the first: ranks crash there, and its host may fail its checks
  double daemon_kills = 0.003;
  double daemon_stalls = 0.0;  // like SIGSTOP, and SIGCONT some time later
  double cuts = 0.01;          // of a connection
  double link_stalls = 0.003;
  double overtaking = 0.0;   // of each order: it takes up to 10 s, and later ones come before it
  double departures = 0.0;   // of a daemon that is asked to end, and is started anew later
  double cancels = 0.0;      // of a job, by its user, who resumes it later
  double suspensions = 0.0;  // likewise
  Duration longest_slow = std::chrono::seconds(10);
  Duration longest_stall = std::chrono::seconds(8);
  Duration longest_cut = std::chrono::seconds(8);
  CoordinatorFaults coordinator = {.stalls = 0.0005, .commit_failures = 0.02, .damage = 0.05};
  int64_t hang_timeout = 60;  // of the spec's recovery
  // Of the spec's rebalance; with it, load is reported that is uneven in another way every time.
  double rebalance_threshold = 0.0;
  bool mirrors = false;           // the spec's recovery does
  std::set<int64_t> spikes = {};  // steps whose loss is one, which a rollback must leave out
  bool restarts_nothing = false;  // these faults must not end any attempt
  Duration fault_time = std::chrono::seconds(40);   // faults happen
  Duration quiet_time = std::chrono::seconds(300);  // then none do, and every job must succeed
};

class AgentCluster final : public SimulatedCoordinator {
 public:
  explicit AgentCluster(const AgentClusterOptions& options);
  std::string run() override;

 private:
  // Which steps changed a state: bit n for step n.
  using Trained = uint64_t;
  // A rank process of one worker.
  struct Process {
    int32_t pid = 0;
    int32_t device = 0;
    int64_t hello_at_ns = 0;  // when it connects to its daemon
    bool bound = false;
    std::optional<StartRank> order;
    int64_t ready_at_ns = 0;  // when it has loaded, once it has its order
    bool ready = false;
    std::optional<BeginTraining> begin;
    int64_t step = 0;
    Trained trained = 0;
    bool waits = false;  // for its end, since it found a spike
    bool final_committed = false;
    bool pause = false;      // asked to
    int64_t paused_at = -1;  // saved after that step, and trains no other
    bool stopped = false;    // by SIGSTOP
    bool stuck = false;      // in a loop, say
    int64_t slow_until_ns = 0;
    std::optional<int64_t> gives_up_at_ns;  // it heeds SIGTERM then
    int64_t moved_at_ns = 0;                // its flight record changed
    std::optional<ExitStatus> ends;         // as soon as the daemon looks
    bool hangs() const { return stopped || stuck; }
    std::string address() const { return "process " + std::to_string(pid); }
  };
  // What a daemon holds of one rank.
  struct Held {
    Epoch epoch;  // the last it was for
    std::map<int64_t, Trained> steps;
  };
  // What daemons copy of them, here and there (agent_copies.cc).
  using CopyKey = std::tuple<JobId, Epoch, Rank, int64_t>;
  struct Copies {
    struct Round {
      MirrorRanks order;
      std::map<Rank, bool> ranks;  // that are copied; whether they are there, too
      std::optional<RanksMirrored> outcome;
    };
    struct UnderWay {
      int64_t at_ns = 0;
      CopyKey key;
      Trained trained = 0;
      StatePlace to;
    };
    std::map<JobId, Round> rounds;
    std::map<CopyKey, Trained> kept;
    std::deque<UnderWay> under_way;
    std::deque<RanksMirrored> to_say;
  };
  struct Worker {
    std::string name;
    int incarnation = 0;
    std::unique_ptr<Agent> agent;  // null while the daemon is down
    bool gave_up = false;          // and is about to be down
    bool leaves = false;           // as it was asked to
    int left = 0;                  // the newest incarnation that has
    int64_t back_at_ns = 0;
    int64_t stalled_until_ns = 0;
    std::optional<int64_t> check_ends_ns;  // of its host, begun by that incarnation
    int check_incarnation = 0;
    int64_t disturbed_until_ns = 0;  // by any fault that keeps it from being heard
    int64_t heard_ns = 0;            // by the coordinator
    int64_t heard_newest_ns = 0;     // likewise, on its newest connection
    Duration lease = Duration(0);    // of its ranks, as the coordinator set it
    int64_t lease_end_ns = LeaseFile::kEndless;
    std::map<RankKey, Process> processes;
    std::deque<std::pair<RankKey, ControlMessage>> inbox;  // from its ranks
    std::map<std::pair<JobId, Rank>, Held> memory;         // what the daemon holds
    Copies copies;
    bool connected = false;
    std::string peer;  // of its newest connection: each has a name
    int connections = 0;
    int64_t connect_at_ns = 0;
  };
  struct Flight {
    int64_t at_ns = 0;
    ControlMessage message;
  };
  // One direction of a connection.
  struct Line {
    Worker* worker = nullptr;
    std::deque<Flight> flights;  // in the order in which they arrive
    int64_t newest_at_ns = 0;    // when the newest arrives that keeps its turn
    int64_t stalled_until_ns = 0;
  };
  using Member = std::pair<Worker*, RankKey>;

  int64_t now_ns() const { return now_.nanoseconds; }
  int64_t within(Duration longest) { return (now_ + below(longest)).nanoseconds; }

  // agent_health.cc: a host that is sick.
  bool is_sick(const Worker& worker) const;
  Status begin_check(Worker& worker);
  void end_check(Worker& worker);
  void release_hosts();

  // agent_cluster.cc: daemons, connections, the coordinator's side.
  void tick();
  void tick_worker(Worker& worker);
  void start_daemon(Worker& worker);
  void kill_daemon(Worker& worker);
  void disconnect(Worker& worker);
  void disturb(Worker& worker, int64_t until_ns);
  void prove_gone(const Worker& worker);
  AgentActions actions_of(Worker& worker);
  void put(Line& line, ControlMessage message);
  void put_out_of_order(Line& line, ControlMessage message);
  void deliver_to_core();
  void deliver_to(Worker& worker);
  void faults();
  void worker_faults(Worker& worker);
  void submit_jobs();
  void cancel_and_resume();
  void on_core_crash() override;
  void send(OutgoingMessage out) override;
  void check(const Effects& effects) override;
  void check_steps(const Effects& effects);
  void check_memory_start(const std::string& peer, const StartRank& order);
  void check_gone(const JobEvent& event);
  void check_loading(const JobEvent& event);
  void check_causes(const Effects& effects);
  void check_cause(const JobEvent& event);
  void check_lost(const WorkerRecord& lost);
  void check_silence(const Worker& worker);
  void rest();
  void hear_resting(const ControlMessage& message, const std::string& who);
  bool all_succeeded() const;

  // agent_copies.cc: copies of ranks' state.
  void take_order(Worker& worker, const MirrorRanks& order);
  void take_copy(Worker& worker, JobId job, Rank rank);
  Worker* find_worker(const StatePlace& place);
  static StatePlace place_of(const Worker& worker);
  bool deliver_copy(Worker& worker, const Copies::UnderWay& copy);
  void move_copies(Worker& worker);
  void copy_actions(Worker& worker, AgentActions& actions);
  bool fetch(const StartRank& start, Trained* trained);

  // agent_ranks.cc: rank processes.
  Result<int32_t> spawn(Worker& worker, const StartRank& start);
  Status to_rank(Worker& worker, const RankKey& key, const ControlMessage& message);
  void signal(Worker& worker, const RankKey& key, int signal);
  RankActivity inspect(const Worker& worker, const RankKey& key) const;
  const Process* find_process(const RankKey& key) const;
  static Process& process_of(const Member& member) {
    return member.first->processes.at(member.second);
  }
  static void extend_lease(Worker& worker, int64_t since_ns);
  void keep_to_lease(Worker& worker);
  bool can_progress(JobId job, Epoch epoch) const;
  bool must_be_stopped(const Worker& worker, JobId job) const;
  bool restore(Worker& worker, const StartRank& start, Process& process);
  void leave_memory(Worker& worker, const RankKey& key, const ExitStatus& status);
  void advance_processes(Worker& worker);
  void hear_ranks(Worker& worker);
  void rank_faults(Worker& worker);
  void train_gangs();
  void train(const std::vector<Member>& gang);
  void lose_peers(const std::vector<Member>& gang);
  void finish(const std::vector<Member>& gang);
  void check_gang(const std::vector<Member>& gang);
  void take_step(const Member& member, int64_t step, bool spike, bool pauses);
  ExpertLoadReport uneven_loads(const RankKey& key, int64_t step);

  const AgentClusterOptions options_;
  std::vector<Worker> workers_;
  std::map<std::string, Worker*> worker_by_peer_;  // of connections that stand
  std::map<std::string, Line> to_core_;            // by connection, also of those that broke
  std::map<std::string, Line> to_workers_;
  std::map<std::tuple<JobId, Epoch, int64_t>, Trained> saved_;
  std::map<JobId, std::pair<Epoch, int64_t>> recorded_;  // the newest step
  bool core_is_new_ = true;
  std::set<RankKey> started_;            // rank processes that were, or were meant to be
  std::map<RankKey, Instant> ended_;     // when they were gone
  const Worker* proven_gone_ = nullptr;  // whose end the core is being told
  int32_t last_pid_ = 100;
  bool resting_ = false;  // everything has ended: only heartbeats may be heard
};

}  // namespace penstock
