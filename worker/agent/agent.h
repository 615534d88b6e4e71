// What a worker daemon decides: registration, heartbeats, which ranks to start and stop, what to relay, what to keep
// while the coordinator is away. Sockets, processes and files are behind AgentActions, so that every behaviour
// is a unit test.
//
// The rank side of the protocol (worker/rank follows it, this daemon relies on it):
//
//   1. The daemon spawns
//        penstock-rank --daemon <endpoint> --job <JobId> --epoch <Epoch> --rank <Rank>
//      with ids in decimal. <endpoint> is a ZeroMQ endpoint ("ipc:///…") of the daemon's RouterChannel. stdin is
//      /dev/null, stdout and stderr are pipes to the daemon (both become the rank's log). The rank dies with its
//      daemon (PR_SET_PDEATHSIG), so it need not watch the connection.
//   2. The rank connects a DealerChannel with DealerOptions{} and sends RankHello{job, epoch, rank, getpid()}.
//   3. The daemon checks that it spawned that rank as that pid and answers StartRank, exactly as the coordinator
//      sent it. A hello that fits nothing is ignored; a rank without StartRank within 30 s exits kUnreachable.
//   4. The rank loads, opens its data plane and sends RankReady{address}.
//   5. BeginTraining{addresses by rank} arrives: the rank connects its peers and trains. Until then it waits.
//   6. Per step every rank sends RankProgress, rank 0 also StepReport (and EvaluationReport where due), in step
//      order. Per checkpoint every rank sends SegmentSaved or SaveFailed, and later receives
//      CheckpointOutcome of that step; training goes on meanwhile.
//   7. After the last step: the final checkpoint's CheckpointOutcome, then RankFinished, then the rank destroys its
//      channel (which flushes it) and exits 0.
//   8. When anything is wrong the rank writes one line that says so as the last line of stderr and exits with the
//      code of comm/base/exit_codes.h that fits (kPeerLost when a peer went away). That line becomes
//      RankExited.reason. It sends no message for this.
//   9. SIGTERM asks it to end (exit kInterrupted, no checkpoint); SIGKILL follows after the grace of StopRanks.
// Every message a rank sends must carry its own job, epoch and rank; others are dropped and logged.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "comm/base/clock.h"
#include "comm/base/exit_codes.h"
#include "comm/control/message.h"
#include "comm/control/process.h"
#include "worker/agent/report_queue.h"

namespace penstock {

// One rank process of one attempt.
struct RankKey {
  JobId job;
  Epoch epoch;
  Rank rank;
  auto operator<=>(const RankKey&) const = default;
};

struct AgentConfig {
  std::string name;
  uint64_t incarnation = 0;  // random, never 0
  std::string host;
  int32_t device_count = 1;
  std::string device_kind = "cpu";
  std::string http_address;
  Duration register_interval = std::chrono::milliseconds(500);  // between Registers until answered
  Duration resend_interval = std::chrono::seconds(1);           // of RankExited until acknowledged
  Duration shutdown_grace = std::chrono::seconds(3);            // between SIGTERM and SIGKILL
  ReportQueueLimits reports;
};

// What the agent can do. Every function returns at once and never calls back into the agent.
struct AgentActions {
  std::function<Status(const ControlMessage&)> send_to_coordinator;
  std::function<Status(const RankKey&, const ControlMessage&)> send_to_rank;
  std::function<Result<int32_t>(const RankKey&)> spawn_rank;  // the pid
  std::function<void(const RankKey&, int signal)> signal_rank;
  std::function<void(ExitCode, const std::string& why)> exit;  // ends the daemon's loop
};

// Single-threaded: the daemon's loop calls it. Time is an argument: nanoseconds of the monotonic clock.
class Agent {
 public:
  Agent(AgentConfig config, AgentActions actions);

  // The connection to the coordinator came up (first time or again) or went away.
  void on_connected(int64_t now_ns);
  void on_disconnected();
  // The coordinator may only send Registered, StartRank, BeginTraining, StopRanks, CheckpointOutcome; ranks only
  // RankReady, StepReport, EvaluationReport, SegmentSaved, SaveFailed, RankFinished, RankProgress (and
  // RankHello, see on_rank_hello). Anything else is logged and dropped.
  void on_coordinator_message(int64_t now_ns, const ControlMessage& message);
  void on_rank_message(int64_t now_ns, const RankKey& from, const ControlMessage& message);
  // True: the hello fits a spawned process; bind the connection to it. The answer (StartRank, and BeginTraining when
  // it has already arrived) must then go out: call on_rank_bound once send_to_rank reaches it.
  bool on_rank_hello(const RankHello& hello);
  void on_rank_bound(const RankKey& key);
  // A rank process was reaped. `last_words`: its last stderr lines, may be empty.
  void on_rank_exit(int64_t now_ns, const RankKey& key, const ExitStatus& status,
                    const std::string& last_words);
  // Lines of a rank's output; `offset` is their first byte's position in that rank's log.
  void on_rank_output(int64_t now_ns, const RankKey& key, uint64_t offset, std::string text);

  // Does whatever is due: heartbeat, Register, resends, SIGKILL after a grace. Returns when to be called next.
  int64_t on_tick(int64_t now_ns);
  // SIGTERM: every rank gets SIGTERM, after the grace SIGKILL; actions.exit(kOk) when none is left.
  void shut_down(int64_t now_ns);

  bool registered() const { return registered_; }
  size_t running_ranks() const { return ranks_.size(); }
  const ReportQueue& reports() const { return reports_; }

 private:
  struct RankEntry {
    StartRank start;
    int32_t pid = 0;
    RankState state = RankState::kStarting;
    int64_t step = 0;
    bool bound = false;                  // its connection is known
    std::optional<BeginTraining> begin;  // arrived; kept for a rank that binds later
    std::string stop_reason;             // why we signalled it; empty: we did not
    std::optional<int64_t> kill_at_ns;   // SIGKILL when it still runs then
  };

  void send_register(int64_t now_ns);
  void send_heartbeat(int64_t now_ns);
  void report(int64_t now_ns, ControlMessage message);
  void flush_reports(int64_t now_ns);
  void resend_exits(int64_t now_ns);
  void on_registered(int64_t now_ns, const Registered& message);
  void on_start_rank(int64_t now_ns, const StartRank& message);
  void on_begin_training(const BeginTraining& message);
  void on_stop_ranks(int64_t now_ns, const StopRanks& message);
  void on_checkpoint_outcome(const CheckpointOutcome& message);
  void stop_rank(int64_t now_ns, const RankKey& key, RankEntry& entry, Duration grace,
                 const std::string& reason);
  void record_exit(int64_t now_ns, RankExited exited);
  void acknowledge_exits(JobId job, Epoch epoch_below_or_equal);
  void exit_when_empty();
  std::vector<RankStatus> rank_statuses() const;

  const AgentConfig config_;
  const AgentActions actions_;

  bool connected_ = false;
  bool registered_ = false;  // the newest Register was answered on this connection
  bool shutting_down_ = false;
  WorkerId worker_;  // 0 until first registered
  Duration heartbeat_interval_ = std::chrono::seconds(1);
  uint64_t heartbeat_sequence_ = 0;
  int64_t next_register_ns_ = 0;
  int64_t next_heartbeat_ns_ = 0;
  std::map<RankKey, RankEntry> ranks_;  // running processes, the stopping ones included
  std::map<JobId, Epoch> fences_;       // highest epoch seen stopped or started, per job
  ReportQueue reports_;

  struct PendingExit {
    RankExited message;
    int64_t resend_at_ns = 0;
  };
  std::map<RankKey, PendingExit> exits_;  // not acknowledged yet
};

}  // namespace penstock
