// penstock-worker: the agent's decisions carried out on real sockets, processes, files and clocks.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "comm/base/exit_codes.h"
#include "comm/base/file.h"
#include "comm/base/status.h"
#include "comm/control/background_appender.h"
#include "comm/control/channel.h"
#include "comm/control/event_loop.h"
#include "comm/control/http_server.h"
#include "comm/control/process.h"
#include "comm/control/pulse_thread.h"
#include "worker/agent/agent.h"
#include "worker/agent/agent_metrics.h"
#include "worker/agent/host_checker.h"
#include "worker/agent/rank_output.h"
#include "worker/agent/state_holders.h"
#include "worker/agent/state_mirror.h"
#include "worker/agent/trace_store.h"

namespace penstock {

struct DaemonOptions {
  std::string coordinator;  // "tcp://host:port"
  std::string name;         // 1 to 200 of [A-Za-z0-9._-], unique among workers
  int32_t device_count = 1;
  Path state_dir;  // logs and the rank socket; one daemon at a time
  std::string http_bind = "127.0.0.1";
  uint16_t http_port = 0;
  Path rank_binary;
  // Network interface of the ranks' data plane, as UCX_NET_DEVICES, which wins when it is set.
  // Empty: every interface. main() chooses "lo" beside a coordinator on loopback, so that a local
  // cluster is closed to other hosts.
  std::string data_interface;
  // Let `penstock chaos` cut this daemon off from its coordinator. On dev clusters.
  bool allow_chaos = false;
  uint64_t copies_bytes_max = 0;  // of ranks' state, its own and others'; 0: half the memory
  int64_t grace_seconds = 25;     // for ranks to save when the daemon is asked to end
};

// Single-threaded: everything on the loop of run(), but file writes, pulses and copies of ranks'
// state, which have threads of their own. Owns the rank processes: they end with it. Create and run
// it on the process's main thread, because ranks die with the thread that spawned them.
class Daemon {
 public:
  // Locks the state directory, binds the ports, begins connecting. kAlreadyExists when another
  // daemon has the directory or the port.
  static Result<std::unique_ptr<Daemon>> start(const DaemonOptions& options);
  explicit Daemon(DaemonOptions options);  // for start()
  ~Daemon();
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;

  // Until SIGTERM or SIGINT (twice: at once; Agent::shut_down), or until the coordinator refuses
  // this worker.
  ExitCode run();

 private:
  // One spawned process and what reads from it. At least until it is reaped.
  struct Process {
    explicit Process(ChildProcess spawned) : child(std::move(spawned)) {}
    ChildProcess child;
    std::array<FileDescriptor, 2> streams;  // by RankOutput::Stream
    std::array<WatchId, 2> stream_watches;
    WatchId exit_watch;
    RankOutput output;
    Path log_file;
    Path flight_file;
    int64_t spawned_ns = 0;
  };

  Status open_state_dir();
  Status open_rank_socket();
  Status open_http();
  Status connect_coordinator();
  Status partition(const HttpRequest& request);
  void make_agent();

  Result<int32_t> spawn_rank(const StartRank& start);
  void signal_rank(const RankKey& key, int signal);
  RankActivity inspect_rank(const RankKey& key) const;
  std::string last_doing(const RankKey& key, const Process& process) const;
  Status send_to_rank(const RankKey& key, const ControlMessage& message);
  void on_rank_frame(const PeerId& peer, const ControlMessage& message);
  void on_hello(const PeerId& peer, const RankHello& hello);
  bool read_stream(const RankKey& key, Process& process, RankOutput::Stream stream);
  void drain_stream(const RankKey& key, Process& process, RankOutput::Stream stream);
  void emit(const RankKey& key, Process& process, uint64_t offset, std::string text);
  void on_process_end(const RankKey& key);
  void handle_http(const HttpRequest& request, const HttpResponder& respond);
  // Runs `act` and then whatever became due by it.
  void with_tick(const std::function<void(int64_t now_ns)>& act);

  const DaemonOptions options_;
  const uint64_t incarnation_;
  ExitCode exit_code_ = ExitCode::kOk;
  FileDescriptor lock_file_;

  EventLoop loop_;  // before everything that borrows it
  BackgroundAppender appender_;
  std::unique_ptr<PulseThread> pulses_;
  AgentMetrics metrics_;
  const TraceStore traces_;
  StateHolders state_;
  HostChecker checker_;
  StateMirror mirror_;
  std::unique_ptr<Agent> agent_;
  std::map<RankKey, Process> processes_;
  std::map<PeerId, RankKey> ranks_by_peer_;
  std::map<RankKey, PeerId> peers_;
  std::unique_ptr<HttpServer> http_;
  std::unique_ptr<RouterChannel> rank_channel_;
  std::unique_ptr<DealerChannel> coordinator_channel_;  // nullptr: cut off on purpose
  TimerId partition_timer_;
  TimerId tick_timer_;
};

}  // namespace penstock
