#include "worker/agent/daemon.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <limits>

#include "comm/base/check.h"
#include "comm/base/ip_address.h"
#include "comm/base/log.h"
#include "comm/base/log_folder.h"
#include "comm/control/flight_reader.h"

namespace penstock {
namespace {

constexpr const char* kFlightFolder = "flights";
constexpr size_t kQueuedLogBytesMax = 64 << 20;
constexpr size_t kReadBytes = 64 << 10;
// What a process that has ended can have left in a pipe: its capacity, unless a grandchild goes on
// writing.
constexpr int kDrainReadsMax = 32;
constexpr Duration kLoopTurnInterval = std::chrono::seconds(1);
constexpr size_t kSocketPathBytesMax = 107;  // sun_path, with its final zero

uint64_t half_of_memory() {
  const auto pages = static_cast<uint64_t>(std::max<long>(0, ::sysconf(_SC_PHYS_PAGES)));
  return pages / 2 * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
}

uint64_t random_incarnation() {
  uint64_t number = 0;
  while (number == 0) {
    const ssize_t count = getrandom(&number, sizeof number, 0);
    PENSTOCK_CHECK(count == sizeof number, errno);
  }
  return number;
}

std::string host_name() {
  std::array<char, 256> name{};
  if (gethostname(name.data(), name.size() - 1) != 0 || name[0] == '\0') return "unknown";
  return name.data();
}

// Made anew by each process, and removed when it is reaped.
Path flight_file_of(const Path& state_dir, const RankKey& key) {
  return state_dir / kFlightFolder / fmt::format("job-{}.rank-{}.flight", key.job, key.rank);
}

RankKey key_of(const RankHello& hello) {
  return {hello.job, hello.epoch, hello.rank};
}

}  // namespace

Daemon::Daemon(DaemonOptions options)
    : options_(std::move(options)),
      incarnation_(random_incarnation()),
      appender_(kQueuedLogBytesMax,
                [root = options_.state_dir / "logs"] {
                  const Status bounded = bound_logs(root);
                  if (!bounded.ok())
                    log_warning("logs stay over their bounds: {}", bounded.message());
                }),
      metrics_(options_.name),
      traces_(options_.state_dir / "traces", static_cast<size_t>(options_.device_count)),
      checker_(loop_, {.rank_binary = options_.rank_binary, .directory = options_.state_dir},
               [this](bool passed, std::string report) {
                 with_tick([&](int64_t) { agent_->on_host_checked(passed, std::move(report)); });
               }),
      mirror_(options_.copies_bytes_max > 0 ? options_.copies_bytes_max : half_of_memory(),
              [this](const RanksMirrored& outcome) {
                loop_.post(
                    [this, outcome] { with_tick([&](int64_t) { agent_->on_mirrored(outcome); }); });
              }) {}

Daemon::~Daemon() {
  for (auto& [key, process] : processes_) {
    for (const WatchId watch : process.stream_watches) loop_.unwatch(watch);
    loop_.unwatch(process.exit_watch);
  }
}

Result<std::unique_ptr<Daemon>> Daemon::start(const DaemonOptions& options) {
  auto daemon = std::make_unique<Daemon>(options);
  PENSTOCK_TRY(daemon->open_state_dir());
  PENSTOCK_TRY(daemon->open_rank_socket());
  PENSTOCK_TRY(daemon->open_http());
  PENSTOCK_TRY_ASSIGN(LeaseFile lease, LeaseFile::create());
  PENSTOCK_TRY_ASSIGN(daemon->pulses_, PulseThread::start(options.coordinator, daemon->incarnation_,
                                                          std::move(lease)));
  if (const Status listens = daemon->mirror_.listen(options.coordinator); !listens.ok()) {
    log_warning("takes in no copies of other hosts' state: {}", listens.message());
  }
  daemon->make_agent();
  PENSTOCK_TRY(daemon->connect_coordinator());
  return daemon;
}

Status Daemon::open_state_dir() {
  PENSTOCK_TRY(create_directories_durably(options_.state_dir));
  const Path path = options_.state_dir / "lock";
  PENSTOCK_TRY_ASSIGN(lock_file_, open_file(path, O_RDWR | O_CREAT));
  if (flock(lock_file_.get(), LOCK_EX | LOCK_NB) == 0) {
    const Path flights = options_.state_dir / kFlightFolder;
    std::error_code ignored;
    std::filesystem::remove_all(flights, ignored);  // of ranks of a killed daemon
    return create_directories_durably(flights);
  }
  if (errno != EWOULDBLOCK) return errno_status(errno, "lock " + path.string());
  return already_exists(fmt::format(
      "{} belongs to another penstock-worker that is running; give each its own --state-dir",
      options_.state_dir.string()));
}

Status Daemon::open_rank_socket() {
  // In the state directory, which is this daemon's alone; where its path is too long for a socket's
  // name, ZeroMQ makes a temporary folder.
  const std::string path =
      (std::filesystem::absolute(options_.state_dir) / "ranks.socket").string();
  const bool fits = path.size() <= kSocketPathBytesMax;
  RouterChannel::Handlers handlers;
  handlers.on_message = [this](const PeerId& peer, const ControlMessage& message) {
    on_rank_frame(peer, message);
  };
  PENSTOCK_TRY_ASSIGN(rank_channel_, RouterChannel::bind(loop_, "ipc://" + (fits ? path : "*"),
                                                         std::move(handlers)));
  return {};
}

Status Daemon::open_http() {
  HttpServerOptions http;
  http.bind = options_.http_bind;
  http.port = options_.http_port;
  PENSTOCK_TRY_ASSIGN(
      http_, HttpServer::start(loop_.io_context(), http,
                               [this](const HttpRequest& request, const HttpResponder& respond) {
                                 handle_http(request, respond);
                               }));
  return {};
}

void Daemon::make_agent() {
  AgentConfig config;
  config.name = options_.name;
  config.incarnation = incarnation_;
  config.host = host_name();
  config.device_count = options_.device_count;
  config.leave_grace = std::chrono::seconds(options_.grace_seconds);
  // Prometheus comes from elsewhere: it needs a name that means this host there too.
  const bool everywhere = is_unspecified_address(options_.http_bind);
  config.http_address = host_and_port(everywhere ? config.host : options_.http_bind, http_->port());
  config.state_place = {mirror_.address(), mirror_.key()};
  AgentActions actions;
  actions.send_to_coordinator = [this](const ControlMessage& message) {
    return coordinator_channel_ ? coordinator_channel_->send(message) : unavailable("cut off");
  };
  actions.send_to_rank = [this](const RankKey& key, const ControlMessage& message) {
    return send_to_rank(key, message);
  };
  actions.spawn_rank = [this](const StartRank& start) { return spawn_rank(start); };
  actions.signal_rank = [this](const RankKey& key, int signal) { signal_rank(key, signal); };
  actions.held_state = [this](JobId job) { return state_.held(job); };
  actions.drop_state_before = [this](JobId job, Epoch epoch) {
    state_.drop_before(job, epoch);
    mirror_.drop_before(job, epoch);
  };
  actions.mirror = [this](const MirrorRanks& order) { mirror_.order(order, state_.share(order)); };
  actions.held_copies = [this](JobId job, Epoch epoch) { return mirror_.copies(job, epoch); };
  actions.fence_copies = [this](JobId job, Epoch epoch) { mirror_.fence(job, epoch); };
  actions.begin_pulses = [this](const PulseThread::Registration& registration) {
    pulses_->registered(registration);
  };
  actions.heard = [this](int64_t sent_ns) { pulses_->heard(sent_ns); };
  actions.inspect_rank = [this](const RankKey& key) { return inspect_rank(key); };
  actions.check_host = [this] { return checker_.begin(); };
  actions.wall_clock = [] { return wall_now(); };
  actions.exit = [this](ExitCode code, const std::string& why) {
    log_line(code == ExitCode::kOk ? LogLevel::kInfo : LogLevel::kError, why);
    exit_code_ = code;
    loop_.stop();
  };
  log_info("{} device(s), metrics on http://{}/metrics, state in {}", config.device_count,
           config.http_address, options_.state_dir.string());
  agent_ = std::make_unique<Agent>(std::move(config), std::move(actions));
}

Status Daemon::connect_coordinator() {
  DealerOptions dealer;
  // A second daemon of this name must not take over this one's connection: the coordinator decides
  // between them.
  dealer.identity = fmt::format("{}/{:016x}", options_.name, incarnation_);
  dealer.queue_while_disconnected = false;
  DealerChannel::Handlers handlers;
  handlers.on_message = [this](const ControlMessage& message) {
    with_tick([&](int64_t now_ns) { agent_->on_coordinator_message(now_ns, message); });
  };
  handlers.on_connected = [this] {
    with_tick([this](int64_t now_ns) { agent_->on_connected(now_ns); });
  };
  handlers.on_disconnected = [this] { with_tick([this](int64_t) { agent_->on_disconnected(); }); };
  PENSTOCK_TRY_ASSIGN(
      coordinator_channel_,
      DealerChannel::connect(loop_, options_.coordinator, std::move(dealer), std::move(handlers)));
  return {};
}

// From now on nothing comes from the coordinator or goes to it, for as long as was asked; ranks and
// their data plane are left alone.
Status Daemon::partition(const HttpRequest& request) {
  constexpr int64_t kPartitionMsMax = 24 * 3'600'000;
  if (!options_.allow_chaos) {
    return permission_denied(
        "this worker was started without --allow-chaos, which penstock dev up gives its workers");
  }
  const std::string_view text = request.parameter("for_ms").value_or("");
  int64_t span_ms = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), span_ms);
  if (error != std::errc() || end != text.data() + text.size() || span_ms < 1 ||
      span_ms > kPartitionMsMax) {
    return invalid_argument(
        fmt::format("for_ms=\"{}\": give milliseconds from 1 to {}", text, kPartitionMsMax));
  }
  log_warning("cut off from the coordinator for {} ms, as asked over HTTP", span_ms);
  coordinator_channel_.reset();
  pulses_->cut_off(true);
  with_tick([this](int64_t) { agent_->on_disconnected(); });
  loop_.cancel(partition_timer_);
  partition_timer_ = loop_.call_after(std::chrono::milliseconds(span_ms), [this] {
    pulses_->cut_off(false);
    const Status connecting = connect_coordinator();
    PENSTOCK_CHECK(connecting.ok(), connecting.message());  // it was, with the same endpoint
  });
  return {};
}

ExitCode Daemon::run() {
  loop_.on_signals({SIGTERM, SIGINT}, [this](int) {
    with_tick([this](int64_t now_ns) { agent_->shut_down(now_ns); });
  });
  loop_.call_every(kLoopTurnInterval, [this] { pulses_->loop_turned(); });
  loop_.run();
  return exit_code_;
}

void Daemon::with_tick(const std::function<void(int64_t now_ns)>& act) {
  const int64_t now_ns = monotonic_ns();
  act(now_ns);
  const int64_t due_ns = agent_->on_tick(now_ns);
  loop_.cancel(tick_timer_);
  if (due_ns == std::numeric_limits<int64_t>::max()) return;
  tick_timer_ = loop_.call_after(Duration(due_ns - now_ns), [this] { with_tick([](int64_t) {}); });
}

Result<int32_t> Daemon::spawn_rank(const StartRank& start) {
  const RankKey key = {start.job, start.epoch, start.rank};
  PENSTOCK_CHECK(!processes_.contains(key), to_string(key));
  SpawnOptions spawn;
  spawn.argv = {
      options_.rank_binary.string(), "--daemon", rank_channel_->endpoint(),       "--job",
      std::to_string(key.job.value), "--epoch",  std::to_string(key.epoch.value), "--rank",
      std::to_string(key.rank.value)};
  if (const Result<Path> trace = traces_.make_room(key.job, key.rank); trace.ok()) {
    spawn.argv.insert(spawn.argv.end(), {"--trace-file", trace->string()});
  } else {
    log_warning("{} runs without a trace: {}", to_string(key), trace.status().to_string());
  }
  const Path flight = flight_file_of(options_.state_dir, key);
  spawn.argv.insert(spawn.argv.end(), {"--flight-file", flight.string()});
  spawn.argv.insert(spawn.argv.end(), {"--lease-file", pulses_->lease().path().string()});
  if (const auto state = state_.hold(key.job, key.epoch, key.rank, start.from_memory); state.ok()) {
    spawn.argv.insert(spawn.argv.end(), {"--state-file", state->string()});
  } else {
    log_warning("what {} trains will not outlive it in memory: {}", to_string(key),
                state.status().to_string());
  }
  if (std::getenv("UCX_NET_DEVICES") == nullptr && !options_.data_interface.empty()) {
    spawn.environment = {"UCX_NET_DEVICES=" + options_.data_interface};
  }
  spawn.kept_descriptor = pulses_->life_socket();
  PENSTOCK_TRY_ASSIGN(ChildProcess child, ChildProcess::spawn(spawn));
  const int32_t pid = child.pid();
  Process process(std::move(child));
  process.streams = {process.child.take_stdout(), process.child.take_stderr()};
  process.flight_file = flight;
  process.spawned_ns = monotonic_ns();
  process.log_file = options_.state_dir / "logs" / fmt::format("job-{}", key.job) /
                     fmt::format("epoch-{}.rank-{}.log", key.epoch, key.rank);
  Process& kept = processes_.emplace(key, std::move(process)).first->second;
  for (const RankOutput::Stream stream : {RankOutput::kStdout, RankOutput::kStderr}) {
    kept.stream_watches[stream] = loop_.watch_readable(kept.streams[stream].get(), [=, this] {
      with_tick([&](int64_t) {
        Process& readable = processes_.at(key);
        if (!read_stream(key, readable, stream)) loop_.unwatch(readable.stream_watches[stream]);
      });
    });
  }
  kept.exit_watch = loop_.watch_readable(kept.child.pidfd(), [=, this] { on_process_end(key); });
  metrics_.rank_started(start, pid);
  return pid;
}

void Daemon::signal_rank(const RankKey& key, int signal) {
  const auto process = processes_.find(key);
  if (process == processes_.end()) return;
  const Status sent = process->second.child.send_signal(signal);
  if (!sent.ok() && sent.code() != Code::kNotFound) log_error("{}", sent.to_string());
}

RankActivity Daemon::inspect_rank(const RankKey& key) const {
  constexpr int64_t kNanosecondsPerMillisecond = 1'000'000;
  RankActivity activity{.rank = key.rank, .state = {}};
  const auto found = processes_.find(key);
  if (found == processes_.end()) return activity;
  const Process& process = found->second;
  activity.process = process_state(process.child.pid());
  activity.log_tail = process.output.log_tail();
  const int64_t now_ns = monotonic_ns();
  int64_t since_ns = process.spawned_ns;
  const Result<FlightRecord> flight = read_flight_record(process.flight_file);
  if (flight.ok() && flight->job == key.job && flight->epoch == key.epoch &&
      flight->rank == key.rank) {
    activity.recorded = true;
    activity.state = flight->state;
    since_ns = flight->since_ns;
  } else if (flight.status().code() == Code::kUnavailable) {
    since_ns = now_ns;  // it changes faster than it can be read
  }
  activity.quiet_ms = std::max<int64_t>(0, now_ns - since_ns) / kNanosecondsPerMillisecond;
  return activity;
}

// Of an ended process that did not say why it did: what it was doing.
std::string Daemon::last_doing(const RankKey& key, const Process& process) const {
  const Result<FlightRecord> flight = read_flight_record(process.flight_file);
  if (!flight.ok() || flight->job != key.job || flight->epoch != key.epoch) return {};
  return "it was " + to_sentence(flight->state);
}

Status Daemon::send_to_rank(const RankKey& key, const ControlMessage& message) {
  const auto peer = peers_.find(key);
  if (peer == peers_.end()) return unavailable(to_string(key) + " has not connected");
  return rank_channel_->send(peer->second, message);
}

void Daemon::on_rank_frame(const PeerId& peer, const ControlMessage& message) {
  if (const auto* hello = std::get_if<RankHello>(&message)) return on_hello(peer, *hello);
  const auto rank = ranks_by_peer_.find(peer);
  if (rank == ranks_by_peer_.end()) {
    return log_warning("{} from a process that has not said who it is", message_name(message));
  }
  if (const auto* progress = std::get_if<RankProgress>(&message)) {
    metrics_.rank_progressed(*progress);
    mirror_.progressed(*progress);
  }
  with_tick([&](int64_t now_ns) { agent_->on_rank_message(now_ns, rank->second, message); });
}

void Daemon::on_hello(const PeerId& peer, const RankHello& hello) {
  const RankKey key = key_of(hello);
  if (!agent_->accepts(hello) || peers_.contains(key)) {
    return log_warning("process {} says it is {}, which it is not", hello.pid, to_string(key));
  }
  std::erase_if(peers_, [this](const auto& entry) { return !agent_->knows(entry.first); });
  std::erase_if(ranks_by_peer_, [this](const auto& entry) { return !agent_->knows(entry.second); });
  peers_[key] = peer;
  ranks_by_peer_[peer] = key;
  with_tick([&](int64_t) { agent_->on_rank_bound(key); });
}

// One read. False: the stream has ended.
bool Daemon::read_stream(const RankKey& key, Process& process, RankOutput::Stream stream) {
  std::array<char, kReadBytes> buffer;
  const ssize_t count = read(process.streams[stream].get(), buffer.data(), buffer.size());
  if (count <= 0) return count < 0 && (errno == EAGAIN || errno == EINTR);
  const uint64_t offset = process.output.offset();
  emit(key, process, offset,
       process.output.add(stream, {buffer.data(), static_cast<size_t>(count)}));
  return true;
}

// What an ended process left in its pipe.
void Daemon::drain_stream(const RankKey& key, Process& process, RankOutput::Stream stream) {
  loop_.unwatch(process.stream_watches[stream]);
  for (int i = 0; i < kDrainReadsMax; ++i) {
    errno = 0;
    if (!read_stream(key, process, stream) || errno == EAGAIN) return;
  }
}

void Daemon::emit(const RankKey& key, Process& process, uint64_t offset, std::string text) {
  if (text.empty()) return;
  appender_.append(process.log_file, text);
  agent_->on_rank_output(key, offset, std::move(text));
}

void Daemon::on_process_end(const RankKey& key) {
  Process& process = processes_.at(key);
  const std::optional<ExitStatus> status = process.child.try_wait();
  if (!status) return;
  loop_.unwatch(process.exit_watch);
  with_tick([&](int64_t now_ns) {
    drain_stream(key, process, RankOutput::kStdout);
    drain_stream(key, process, RankOutput::kStderr);
    const uint64_t offset = process.output.offset();
    emit(key, process, offset, process.output.finish());
    appender_.close(process.log_file);
    std::string last_words = process.output.last_words();
    if (last_words.empty()) last_words = last_doing(key, process);
    std::error_code ignored;
    std::filesystem::remove(process.flight_file, ignored);
    const std::string log_tail = process.output.log_tail();
    if (!leaves_sound_state(status->exit_code, status->signal)) {
      state_.distrust(key.job, key.rank);
      mirror_.distrust(key.job, key.rank);
    }
    processes_.erase(key);
    metrics_.rank_ended(now_ns, key, *status);
    agent_->on_rank_exit(now_ns, key, *status, last_words, log_tail);
  });
}

void Daemon::handle_http(const HttpRequest& request, const HttpResponder& respond) {
  if (request.method == "POST" && request.path == "/chaos/partition") {
    const Status cut = partition(request);
    return respond(cut.ok() ? json_response("{}\n") : error_response(cut));
  }
  if (request.method != "GET") {
    return respond(error_response(invalid_argument(request.method + " is not answered; use GET")));
  }
  if (request.path == "/metrics") {
    metrics_.set_daemon(agent_->registered(), agent_->log_lines_dropped() + appender_.lines_lost(),
                        agent_->reports_dropped());
    metrics_.set_copies(mirror_.byte_count(), mirror_.bytes_sent(), mirror_.copies_missed());
    return respond({.status = 200,
                    .content_type = kMetricsContentType,
                    .body = metrics_.render(monotonic_ns())});
  }
  if (request.path == "/livez" || (request.path == "/readyz" && agent_->registered())) {
    return respond({.status = 200, .content_type = "text/plain", .body = "ok\n"});
  }
  if (request.path == "/readyz") {
    return respond({.status = 503, .content_type = "text/plain", .body = "not registered\n"});
  }
  if (request.path == "/traces" || request.path == "/trace") {
    return respond(traces_.answer(request));
  }
  respond(
      error_response(not_found("a worker serves /metrics, /livez, /readyz, /traces and /trace")));
}

}  // namespace penstock
