#include "coordinator/driver/driver.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "comm/base/clock.h"
#include "comm/base/ip_address.h"
#include "comm/base/log.h"
#include "comm/control/channel.h"
#include "comm/control/event_loop.h"
#include "comm/control/lifelines.h"
#include "comm/control/pulse_listener.h"
#include "coordinator/driver/checkpoint_scrubber.h"
#include "coordinator/driver/checkpoint_threads.h"
#include "coordinator/driver/run_metrics.h"
#include "coordinator/store/state_directory.h"

namespace penstock {
namespace {

// Longer than what ZeroMQ takes to give up a connection that lets nothing through and make another.
constexpr int kLeaseBeats = 15;
// Workers take a second to see that a coordinator is stopped (comm/control/pulse_thread.h), several
// times in a lease.
constexpr Duration kLeaseMin = std::chrono::milliseconds(kLeaseMsMin);
constexpr Duration kTickIntervalMax = std::chrono::milliseconds(100);

// Wall-clock time that never jumps: set once, carried on by the monotonic clock.
class SteadyWall {
 public:
  Instant now() const { return wall_ + Duration(monotonic_ns() - monotonic_); }

 private:
  const Instant wall_ = wall_now();
  const int64_t monotonic_ = monotonic_ns();
};

}  // namespace

struct Driver::Impl {
  explicit Impl(DriverOptions given)
      : options(std::move(given)), core(core_config(options)), logs(options.state_dir / "logs") {}

  static CoreConfig core_config(const DriverOptions& options) {
    CoreConfig config;
    config.checkpoint_root = (options.state_dir / "checkpoints").string();
    config.heartbeat_interval = std::chrono::milliseconds(options.heartbeat_interval_ms);
    config.lease = options.lease_ms > 0
                       ? Duration(std::chrono::milliseconds(options.lease_ms))
                       : std::max<Duration>(kLeaseBeats * config.heartbeat_interval, kLeaseMin);
    config.slow_ratio = options.slow_ratio;
    config.quarantine_failures = options.quarantine_failures;
    config.quarantine_window = std::chrono::seconds(options.quarantine_seconds);
    return config;
  }

  Status start();
  Status listen();
  void listen_to_pulses();
  Status write_endpoints() const;
  ApiActions api_actions();
  void feed(const Event& event);
  void act(Effects effects);
  void send(const OutgoingMessage& out);
  void deliver(const OutgoingMessage& out);
  void append_log(const LogChunk& chunk);
  void start_scrubber();
  void choose_scrubbed(const Job& job);
  void tick();

  const DriverOptions options;
  const SteadyWall clock;
  FileDescriptor lock;
  EventLoop loop;
  std::unique_ptr<RecordStore> store;
  Coordinator core;
  LogFiles logs;
  MetricRegistry registry;
  std::optional<RunMetrics> metrics;
  std::unique_ptr<CheckpointThreads> checkpoints;
  std::unique_ptr<CheckpointScrubber> scrubber;
  std::unique_ptr<RouterChannel> workers;
  std::unique_ptr<PulseListener> pulses;  // none where its port is taken
  Lifelines lifelines{loop, [this](WorkerId worker, uint64_t incarnation) {
                        feed(WorkerGone{worker, incarnation});
                      }};
  std::unique_ptr<HttpServer> http;
  std::optional<Api> api;
  std::map<RequestId, std::function<void(const Answer&)>> requests;
  uint64_t last_request = 0;
  Status broken;  // not ok: the store refused a write, and nothing may be decided any more
};

Status Driver::Impl::start() {
  PENSTOCK_TRY_ASSIGN(lock, lock_state_directory(options.state_dir));
  PENSTOCK_TRY_ASSIGN(store, open_rocks_store(options.state_dir / kRecordsFolder));
  PENSTOCK_TRY_ASSIGN(const StoredState stored, read_stored_state(*store));
  PENSTOCK_TRY_ASSIGN(Effects effects, core.start(clock.now(), stored));
  metrics.emplace(registry, core);
  PENSTOCK_TRY_ASSIGN(checkpoints,
                      CheckpointThreads::start(loop, options.state_dir / "checkpoint-index"));
  start_scrubber();
  PENSTOCK_TRY(listen());
  act(std::move(effects));
  PENSTOCK_TRY(broken);
  PENSTOCK_TRY(write_endpoints());
  const Duration beat = std::chrono::milliseconds(options.heartbeat_interval_ms);
  loop.call_every(std::min(kTickIntervalMax, beat / 2), [this] { tick(); });
  return {};
}

void Driver::Impl::start_scrubber() {
  const ScrubOptions scrub{.bytes_per_second = options.scrub_bytes_per_second,
                           .pause = std::chrono::seconds(options.scrub_pause_seconds)};
  ScrubHandlers handlers;
  handlers.on_read = [this](JobId job, uint64_t bytes) { metrics->observe_scrub(job, bytes); };
  handlers.on_damage = [this](JobId job, const std::string& damage) {
    feed(CheckpointDamaged{job, damage});
  };
  handlers.on_pass = [this](JobId job) { metrics->observe_scrub_pass(job, clock.now()); };
  handlers.on_ended_pass = [this] { metrics->observe_finished_scrub_pass(clock.now()); };
  scrubber = std::make_unique<CheckpointScrubber>(loop, scrub, std::move(handlers));
  for (const auto& [id, job] : core.jobs()) choose_scrubbed(job);
}

// From its first checkpoint until it is removed.
void Driver::Impl::choose_scrubbed(const Job& job) {
  const JobRecord& record = job.record;
  if (!record.checkpoint) return;
  if (is_final(record.state)) return scrubber->watch_ended(record.id, record.checkpoint_dir);
  scrubber->watch_running(record.id, record.checkpoint_dir);
}

Status Driver::Impl::listen() {
  RouterChannel::Handlers handlers;
  handlers.on_message = [this](const PeerId& peer, ControlMessage message) {
    feed(WorkerMessage{peer, std::move(message), wall_now()});
  };
  handlers.on_rejected = [this](const Rejection& rejection) {
    metrics->frame_rejected(rejection.peer.empty() ? "connection" : "frame");
    log_warning("refused {} bytes from {}: {}", rejection.byte_count,
                rejection.address.empty() ? "a control connection" : rejection.address,
                rejection.reason.message());
  };
  const std::string endpoint = "tcp://" + host_and_port(options.bind, options.control_port);
  PENSTOCK_TRY_ASSIGN(workers, RouterChannel::bind(loop, endpoint, std::move(handlers)));
  listen_to_pulses();
  api.emplace(core, *store, logs, registry, api_actions());
  HttpServerOptions http_options;
  http_options.bind = options.bind;
  http_options.port = options.http_port;
  PENSTOCK_TRY_ASSIGN(http,
                      HttpServer::start(loop.io_context(), http_options,
                                        [this](const HttpRequest& request, HttpResponder respond) {
                                          if (request.path == "/metrics")
                                            metrics->refresh(clock.now());
                                          api->handle(request, std::move(respond));
                                        }));
  return {};
}

void Driver::Impl::listen_to_pulses() {
  const auto hear = [this](const Pulse& pulse, const SocketAddress& from) {
    if (!broken.ok() || !core.hears(pulse.worker, pulse.incarnation)) return false;
    feed(WorkerPulse{pulse.worker, pulse.incarnation});
    if (pulse.life_port != 0) {
      lifelines.hold(pulse.worker, pulse.incarnation, with_port(from, pulse.life_port));
    }
    return true;
  };
  auto bound = PulseListener::bind(loop, workers->endpoint(), hear);
  if (!bound.ok()) {
    return log_warning("workers are known by their heartbeats alone, no pulses: {}",
                       bound.status().message());
  }
  pulses = std::move(bound).value();
}

Status Driver::Impl::write_endpoints() const {
  const std::string& control = workers->endpoint();
  const nlohmann::json endpoints = {
      {"bind", options.bind},
      {"http_port", http->port()},
      {"control_port", std::stoi(control.substr(control.rfind(':') + 1))},
      {"http", "http://" + host_and_port(options.bind, http->port())},
      {"control", control},
      {"pid", getpid()}};
  return replace_file_durably(options.state_dir / "endpoints.json",
                              as_bytes(endpoints.dump(2) + "\n"));
}

ApiActions Driver::Impl::api_actions() {
  ApiActions actions;
  actions.command = [this](std::function<Event(RequestId)> make,
                           std::function<void(const Answer&)> done) {
    const RequestId request = {++last_request};
    requests.emplace(request, std::move(done));
    feed(make(request));
  };
  actions.list_checkpoints = [this](const Job& job, auto done) {
    checkpoints->list(job.record.id, job.record.checkpoint_dir, std::move(done));
  };
  actions.ready = [this] { return broken; };
  actions.now = [this] { return clock.now(); };
  return actions;
}

void Driver::Impl::feed(const Event& event) {
  if (!broken.ok()) return;
  act(core.step(clock.now(), event));
}

// Writes first, acts after: nobody hears of what could still be forgotten.
void Driver::Impl::act(Effects effects) {
  const std::vector<Record> records = records_of(effects);
  if (!records.empty()) {
    const int64_t begun_ns = monotonic_ns();
    std::vector<std::string> erased;
    for (const JobId job : effects.removed_jobs) {
      for (std::string& prefix : prefixes_of(job)) erased.push_back(std::move(prefix));
    }
    broken = store->write(records, erased, effects.must_sync());
    if (!broken.ok()) {
      log_error("stopping, because the state store refuses writes: {}", broken.message());
      return loop.stop();
    }
    if (effects.must_sync()) metrics->observe_write(Duration(monotonic_ns() - begun_ns));
  }
  metrics->observe(clock.now(), effects);
  for (const LogLine& line : effects.log) log_line(line.level, line.text);
  for (const JobEvent& event : effects.events) {
    const std::string subject =
        event.job.value == 0 ? "" : fmt::format("job {} \"{}\": ", event.job, event.job_name);
    log_info("{}{}{}", subject,
             event.from ? fmt::format("{} ", job_state_name(*event.state)) : std::string(),
             event.reason.message);
    if (const Job* job = core.find_job(event.job)) choose_scrubbed(*job);
  }
  for (const LogChunk& chunk : effects.log_chunks) append_log(chunk);
  for (const OutgoingMessage& out : effects.messages) send(out);
  for (CommitCheckpoint& commit : effects.commits) {
    checkpoints->commit(std::move(commit), [this](const CheckpointDone& done, Duration took) {
      if (!done.compared) metrics->observe_commit(done.job, took);
      feed(done);
    });
  }
  for (FindCheckpoint& find : effects.finds) {
    checkpoints->find(std::move(find), [this](const CheckpointFound& found) { feed(found); });
  }
  for (const RemoveCheckpoints& removal : effects.removals) {
    checkpoints->remove(removal, [this, job = removal.job](Status status) {
      feed(CheckpointsRemoved{job, std::move(status)});
    });
  }
  for (const JobId job : effects.removed_jobs) {
    scrubber->forget(job);
    logs.remove(job);
  }
  for (const ReadSteps& read : effects.reads) {
    loop.post([this, read] { feed(read_steps(*store, read)); });
  }
  for (const Answer& answer : effects.answers) {
    const auto request = requests.extract(answer.request);
    if (!request.empty()) request.mapped()(answer);
  }
  if (!records.empty() || !effects.log_chunks.empty()) api->wake();
}

void Driver::Impl::send(const OutgoingMessage& out) {
  const auto* start = std::get_if<StartRank>(&out.message);
  if (start == nullptr || start->rank.value != 0) return deliver(out);
  // Ranks save into the directory from several hosts at once; one of us makes it, and none of them
  // trains before there is a rank 0. Dropped while an earlier order waits for its directory: the
  // core repeats it. A failure shows as their failed save.
  checkpoints->prepare(start->job, start->checkpoint_dir, [this, out](const Status& made) {
    const JobId job = std::get<StartRank>(out.message).job;
    if (!made.ok()) log_warning("job {}: {}", job, made.message());
    deliver(out);
  });
}

void Driver::Impl::deliver(const OutgoingMessage& out) {
  // What cannot be sent is repeated by the core until workers report it done.
  const Status sent = workers->send(out.peer, out.message);
  if (!sent.ok()) log_debug("{} not sent: {}", message_name(out.message), sent.message());
}

void Driver::Impl::append_log(const LogChunk& chunk) {
  const Status appended = logs.append(chunk);
  if (!appended.ok()) {
    log_debug("log of job {} rank {}: {}", chunk.job, chunk.rank, appended.message());
  }
}

void Driver::Impl::tick() {
  if (pulses) pulses->hear_all();
  feed(Tick{});
  api->expire();
}

Driver::Driver(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Driver::~Driver() = default;

Result<std::unique_ptr<Driver>> Driver::start(DriverOptions options) {
  options.state_dir = std::filesystem::absolute(options.state_dir);
  auto impl = std::make_unique<Impl>(std::move(options));
  PENSTOCK_TRY(impl->start());
  return std::make_unique<Driver>(std::move(impl));
}

ExitCode Driver::run() {
  impl_->loop.on_signals({SIGTERM, SIGINT}, [this](int signal) {
    log_info("stopping on signal {}; jobs go on without a coordinator", signal);
    impl_->loop.stop();
  });
  log_info("serving HTTP on {} and workers on {}, state in {}", http_address(), control_endpoint(),
           impl_->options.state_dir.string());
  impl_->loop.run();
  return impl_->broken.ok() ? ExitCode::kOk : ExitCode::kFailure;
}

bool Driver::finish(Duration limit) {
  const int64_t deadline_ns = monotonic_ns() + limit.count();
  std::vector<JobId> hanging = impl_->checkpoints->finish(limit);
  const Duration left(std::max<int64_t>(0, deadline_ns - monotonic_ns()));
  for (const JobId job : impl_->scrubber->finish(left)) hanging.push_back(job);
  for (const JobId job : hanging) {
    const Job* known = impl_->core.find_job(job);
    log_warning("job {}: {} does not answer; what was under way there is left behind", job,
                known == nullptr ? "its checkpoint directory" : known->record.checkpoint_dir);
  }
  return hanging.empty();
}

void Driver::stop() {
  impl_->loop.stop();
}

std::string Driver::http_address() const {
  return host_and_port(impl_->options.bind, impl_->http->port());
}

std::string Driver::control_endpoint() const {
  return impl_->workers->endpoint();
}

}  // namespace penstock
