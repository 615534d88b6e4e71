// What a worker daemon decides: registration, heartbeats, which ranks to start and stop, what to
// relay, what to keep while the coordinator is away. Sockets, processes and files are behind
// AgentActions, so that every behaviour is a unit test.
//
// The rank side of the protocol (worker/rank follows it, this daemon relies on it):
//
//   1. The daemon spawns
//        penstock-rank --daemon <endpoint> --job <JobId> --epoch <Epoch> --rank <Rank>
//      with ids in decimal. <endpoint> is a ZeroMQ endpoint ("ipc:///…") of the daemon's
//      RouterChannel. stdin is /dev/null, stdout and stderr are pipes to the daemon (both become
//      the rank's log). The rank dies with its daemon (PR_SET_PDEATHSIG), so it need not watch the
//      connection.
//   2. The rank connects a DealerChannel with DealerOptions{} and sends RankHello{job, epoch, rank,
//   getpid()}.
//   3. The daemon checks that it spawned that rank as that pid and answers StartRank, exactly as
//   the coordinator
//      sent it. A hello that fits nothing is ignored; a rank without StartRank within 30 s exits
//      kUnreachable.
//   4. The rank loads, opens its data plane and sends RankReady{address}.
//   5. BeginTraining{addresses by rank} arrives: the rank connects its peers and trains. Until then
//   it waits.
//   6. Per step every rank sends RankProgress, rank 0 also StepReport (and EvaluationReport where
//   due), in step
//      order. Per checkpoint the first rank of a stage sends ExpertLoadReport, every rank
//      SegmentSaved or SaveFailed, and later receives CheckpointOutcome of that step; training
//      goes on meanwhile.
//   7. After the last step: the final checkpoint's CheckpointOutcome, then RankFinished, then the
//   rank destroys its
//      channel (which flushes it) and exits 0.
//   8. When anything is wrong the rank writes one line that says so as the last line of stderr and
//   exits with the
//      code of comm/base/exit_codes.h that fits (kPeerLost when a peer went away). That line,
//      which begins with kLastWordsPrefix, goes into RankExited.reason. It sends no message for
//      this.
//   9. PauseRanks: after the step in progress every rank saves, says so with SegmentSaved, and
//   waits for the coordinator to end the attempt; a CheckpointOutcome that says that it failed lets
//   it go on.
//  10. SIGTERM asks it to end (exit kPreempted, no checkpoint); SIGKILL follows after the grace of
//   StopRanks.
// Every message a rank sends must carry its own job, epoch and rank; others are dropped and logged.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "comm/base/clock.h"
#include "comm/base/exit_codes.h"
#include "comm/control/message.h"
#include "comm/control/process.h"
#include "comm/control/pulse_thread.h"
#include "worker/agent/report_queue.h"

namespace penstock {

// One rank process of one attempt.
struct RankKey {
  JobId job;
  Epoch epoch;
  Rank rank;
  auto operator<=>(const RankKey&) const = default;
};

std::string to_string(const RankKey& key);  // "job 3 epoch 2 rank 1"

struct AgentConfig {
  std::string name;
  uint64_t incarnation = 0;  // random, never 0
  std::string host;
  int32_t device_count = 1;
  std::string device_kind = "cpu";
  std::string http_address;
  StatePlace state_place;  // where it takes in copies of ranks' state
  Duration register_interval = std::chrono::milliseconds(500);  // between Registers until answered
  Duration resend_interval = std::chrono::seconds(1);           // of RankExited until acknowledged
  Duration leave_grace = std::chrono::seconds(25);    // for ranks to save, when asked to end
  Duration shutdown_grace = std::chrono::seconds(3);  // between SIGTERM and SIGKILL
  // A rank that exits 0 has said RankFinished; how long to wait for that message to come through.
  Duration finish_grace = std::chrono::seconds(2);
  size_t log_bytes_max = 4 << 20;  // of rank output waiting for the coordinator; the oldest go
  ReportQueueLimits reports;
};

// What the agent can do. Every function returns at once and never calls back into the agent.
struct AgentActions {
  std::function<Status(const ControlMessage&)> send_to_coordinator;
  std::function<Status(const RankKey&, const ControlMessage&)> send_to_rank;
  std::function<Result<int32_t>(const StartRank&)> spawn_rank;  // the pid
  std::function<void(const RankKey&, int signal)> signal_rank;
  // What is held in memory of the ranks of a job, none of which runs; and that what is held of
  // attempts before `epoch` is not needed.
  std::function<std::vector<HeldRank>(JobId)> held_state;
  std::function<void(JobId, Epoch epoch)> drop_state_before;
  // Begins to carry the order out (worker/agent/state_mirror.h); its end is told by on_mirrored.
  std::function<void(const MirrorRanks&)> mirror;
  // The copies, of own ranks and others', of exactly that attempt.
  std::function<std::vector<HeldRank>(JobId, Epoch)> held_copies;
  // Attempts of the job up to `epoch` are over: held_copies of them must not change any more, and
  // copies of attempts before `epoch` may go.
  std::function<void(JobId, Epoch epoch)> fence_copies;
  // The coordinator has registered this daemon.
  std::function<void(const PulseThread::Registration&)> begin_pulses;
  // It has heard what was sent to it then.
  std::function<void(int64_t sent_ns)> heard;
  // Of a rank that has a process.
  std::function<RankActivity(const RankKey&)> inspect_rank;
  // Begins a check of this host, whose end is told by on_host_checked. Empty: this daemon cannot
  // check, and says that its host passes.
  std::function<Status()> check_host = {};
  // Empty: the coordinator is not told how late it is here.
  std::function<Instant()> wall_clock = {};
  std::function<void(ExitCode, const std::string& why)> exit;  // ends the daemon's loop
};

// Single-threaded: the daemon's loop calls it. Time is an argument: nanoseconds of the monotonic
// clock, never decreasing. Sends nothing but Register until the coordinator answered it.
class Agent {
 public:
  Agent(AgentConfig config, AgentActions actions);

  // The connection to the coordinator came up (first time or again) or went away.
  void on_connected(int64_t now_ns);
  void on_disconnected();
  // The coordinator may only send Registered, StartRank, BeginTraining, StopRanks,
  // CheckpointOutcome, SaveInterval, PauseRanks, MirrorRanks, InspectRanks and CheckHost; ranks
  // only RankReady, StepReport, EvaluationReport, ExpertLoadReport, SegmentSaved, SaveFailed,
  // RankFinished, RankProgress (and RankHello, which comes through on_rank_hello). Anything else is
  // logged and dropped.
  void on_coordinator_message(int64_t now_ns, const ControlMessage& message);
  void on_rank_message(int64_t now_ns, const RankKey& from, const ControlMessage& message);
  // Whether the hello fits a process spawned here. When true, the caller lets send_to_rank reach
  // that connection and then calls on_rank_bound, which sends StartRank (and BeginTraining, if it
  // is here already).
  bool accepts(const RankHello& hello) const;
  void on_rank_bound(const RankKey& key);
  // A rank process was reaped. `last_words`: why, as it said itself, and `log_tail`: the last lines
  // of its stderr (worker/agent/rank_output.h); either may be empty.
  void on_rank_exit(int64_t now_ns, const RankKey& key, const ExitStatus& status,
                    const std::string& last_words, const std::string& log_tail = {});
  // Lines of a rank's output; `offset` is their first byte's position in that rank's log.
  void on_rank_output(const RankKey& key, uint64_t offset, std::string text);
  // What became of actions.mirror.
  void on_mirrored(const RanksMirrored& outcome);

  // The check that check_host began has ended.
  void on_host_checked(bool passed, std::string report);

  // Does whatever is due: heartbeat, Register, resends, SIGKILL after a grace. Returns when to be
  // called next at the latest; any other call may make that earlier, so tick after each.
  int64_t on_tick(int64_t now_ns);
  // Ends the daemon. With a coordinator its ranks go on until what they trained is saved, and end
  // then: actions.exit(kOk). When leave_grace is over, when there is no coordinator, who alone
  // could commit what they save, or when asked a second time, they are ended as they are, by
  // SIGTERM and after shutdown_grace (the second time at once) SIGKILL: actions.exit(kPreempted).
  void shut_down(int64_t now_ns);

  bool registered() const { return registered_; }
  bool knows(const RankKey& key) const { return ranks_.contains(key); }
  size_t rank_count() const { return ranks_.size(); }  // running or about to
  uint64_t reports_dropped() const { return reports_.dropped(); }
  // What it will say again until the coordinator shows that it knows.
  size_t kept() const { return reports_.size() + exits_.size() + stops_to_answer_.size(); }
  uint64_t log_lines_dropped() const { return log_lines_dropped_; }

 private:
  struct RankEntry {
    StartRank start;
    int32_t pid = 0;  // 0: waits until the ranks of lower epochs are gone
    RankState state = RankState::kStarting;
    int64_t step = 0;
    RankPace pace;
    bool bound = false;                  // its connection is known
    std::optional<RankReady> ready;      // what it said, to repeat
    std::optional<BeginTraining> begin;  // sent on, or waiting for it to bind
    std::string stop_reason;             // why it was signalled; empty: it was not
    std::optional<int64_t> kill_at_ns;   // SIGKILL when it still runs then
    // It exited 0 but its RankFinished is still on its way: wait for that until then.
    std::optional<int64_t> finish_wait_until_ns;
    bool has_process() const { return pid != 0 && !finish_wait_until_ns; }
  };
  struct PendingExit {
    RankExited message;
    int64_t resend_at_ns = 0;
    bool told = false;          // over this connection
    bool acknowledged = false;  // and gone once it is told
  };
  using Ranks = std::map<RankKey, RankEntry>;
  static constexpr Epoch kLastEpoch{std::numeric_limits<uint32_t>::max()};

  void handle(int64_t now_ns, const Registered& message);
  void handle(int64_t now_ns, const StartRank& message);
  void handle(int64_t now_ns, const BeginTraining& message);
  void handle(int64_t now_ns, const StopRanks& message);
  void handle(int64_t now_ns, const CheckpointOutcome& message);
  void handle(int64_t now_ns, const SaveInterval& message);
  void handle(int64_t now_ns, const PauseRanks& message);
  void handle(int64_t now_ns, const WorkerReleased& message);
  void handle(int64_t now_ns, const InspectRanks& message);
  void handle(int64_t now_ns, const CheckHost& message);
  void begin_check();
  void handle(int64_t now_ns, const MirrorRanks& message);
  // To every rank of its job and epoch that can be reached.
  template <typename Message>
  void pass_on(const Message& message);

  void send_register(int64_t now_ns);
  uint64_t next_sequence(int64_t now_ns);
  void send_heartbeat(int64_t now_ns);
  Status send(const ControlMessage& message);
  void report(int64_t now_ns, const ControlMessage& message);
  void flush(int64_t now_ns);
  void repeat_what_was_said(int64_t now_ns, const RankKey& key, const RankEntry& entry);
  void spawn(int64_t now_ns, const RankKey& key);
  void end_up_to(int64_t now_ns, JobId job, Epoch epoch, Duration grace, const std::string& reason);
  void spawn_waiting(int64_t now_ns);
  void stop(int64_t now_ns, const RankKey& key, RankEntry& entry, Duration grace,
            const std::string& reason);
  void fence(JobId job, Epoch epoch);
  void forget_exits();
  bool fenced(JobId job, Epoch epoch) const;
  bool runs_at_or_below(JobId job, Epoch epoch) const;
  void give_begin(const RankKey& key, RankEntry& entry);
  void end_rank(int64_t now_ns, const RankKey& key, const ExitStatus& status,
                const std::string& reason, const std::string& log_tail = {});
  void answer_stops();
  RanksStopped what_is_held(JobId job, Epoch epoch) const;
  void tell_what_is_held();
  void end_ranks(int64_t now_ns, Duration grace);
  void keep_leaving(int64_t now_ns);
  void exit_when_empty();
  void exit_now();
  std::vector<RankStatus> rank_statuses() const;
  int64_t next_due_ns() const;

  const AgentConfig config_;
  const AgentActions actions_;

  bool connected_ = false;
  bool registered_ = false;                // on this connection
  std::optional<int64_t> leave_until_ns_;  // asked to end: ranks may save until then
  int64_t next_leaving_ns_ = 0;            // when to say so again
  bool shutting_down_ = false;             // ranks are being ended
  ExitCode exit_code_ = ExitCode::kOk;
  bool exited_ = false;  // actions.exit was called
  WorkerId worker_;
  Duration heartbeat_interval_ = std::chrono::seconds(1);
  uint64_t challenge_ = 0;                // the newest that the coordinator asked to repeat
  uint64_t sequence_ = 0;                 // of the newest Register or Heartbeat
  std::array<int64_t, 64> sent_ns_ = {};  // of the newest of them, by sequence
  int64_t asked_to_register_ns_ = 0;      // first, of those that are not answered
  int64_t next_register_ns_ = 0;
  int64_t next_heartbeat_ns_ = 0;

  Ranks ranks_;
  std::map<JobId, Epoch> fences_;  // every epoch up to this one is over, per job
  struct OwedStop {
    Epoch epoch;
    bool keep_state = false;
  };
  std::map<JobId, OwedStop> stops_to_answer_;  // RanksStopped is owed once the last rank is reaped
  std::map<JobId, Epoch> holding_;             // attempts whose state is kept for the next start
  std::map<RankKey, PendingExit> exits_;       // not acknowledged yet
  ReportQueue reports_;
  std::deque<LogChunk> log_chunks_;  // not sent yet
  size_t log_bytes_ = 0;
  uint64_t log_lines_dropped_ = 0;
  bool dropping_reports_ = false;  // said so in the log
  uint64_t check_asked_ = 0;       // the newest CheckHost::request
  uint64_t check_running_ = 0;     // for that one; 0: none runs
  HostChecked checked_;            // the newest result
};

}  // namespace penstock
