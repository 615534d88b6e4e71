// Daemons, connections and the coordinator's side; agent_ranks.cc has the rank processes.
#include "tests/simulation/agent_cluster.h"

#include <signal.h>

#include <algorithm>

#include "coordinator/core/failure.h"
#include "coordinator/core/hang_verdict.h"

namespace penstock {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr Duration kTick = milliseconds(50);
constexpr Duration kDelayMax = milliseconds(200);
constexpr Duration kOvertakenMax = seconds(10);
// Some beats, what is on its way, and the ticks between: who is not disturbed is heard.
constexpr Duration kHeardWithin = milliseconds(4500);
const CoreConfig kCoreConfig;
// A worker that cannot be heard is given up after it, and not long after it.
const Duration kSilent = kCoreConfig.silent_beats * kCoreConfig.heartbeat_interval;
const Duration kTimeToTell = 2 * kCoreConfig.heartbeat_interval;
const Duration kLease = kCoreConfig.lease + kCoreConfig.lease_margin;
constexpr Duration kLeaseSlack = milliseconds(1500);
constexpr Duration kSettle = seconds(8);
constexpr Duration kRest = seconds(4);

}  // namespace

AgentCluster::AgentCluster(const AgentClusterOptions& options)
    : SimulatedCoordinator(options.seed, options.coordinator),
      options_(options),
      workers_(options.worker_count) {
  for (size_t i = 0; i < workers_.size(); ++i) {
    workers_[i].name = fmt::format("w{}", i);
    start_daemon(workers_[i]);
  }
  start_core();
}

std::string AgentCluster::run() {
  const Instant faults_end = now_ + options_.fault_time;
  const Instant end = faults_end + options_.quiet_time;
  while (now_ < end && violation_.empty()) {
    if (now_ >= faults_end && all_succeeded()) break;
    faulty_ = now_ < faults_end;
    if (faulty_) faults();
    tick();
  }
  if (!all_succeeded()) {
    violate("after a long quiet time not every job has succeeded:" + states());
  }
  if (violation_.empty()) rest();
  count_restarts();
  if (options_.restarts_nothing && counts_.restarts > 0) {
    violate("nothing happened that would have to end an attempt, but one was:" + states());
  }
  return violation_;
}

void AgentCluster::tick() {
  now_ = now_ + kTick;
  start_core_when_due();
  submit_jobs();
  cancel_and_resume();
  suspend_and_resume(options_.suspensions, 0.02);
  release_hosts();
  // A coordinator that was stopped has both waiting for it: the time that has passed, and messages.
  if (core_hears() && chance(0.5)) feed(Tick{});
  deliver_to_core();
  feed_disk_results();
  train_gangs();
  for (Worker& worker : workers_) tick_worker(worker);
  if (core_hears()) feed(Tick{});
}

void AgentCluster::tick_worker(Worker& worker) {
  if (!worker.agent && core_hears() && chance(0.02)) prove_gone(worker);
  if (!worker.agent && now_ns() >= worker.back_at_ns) start_daemon(worker);
  check_silence(worker);
  keep_to_lease(worker);
  if (worker.gave_up) kill_daemon(worker);
  if (!worker.agent || now_ns() < worker.stalled_until_ns) return;
  if (core_ && !worker.connected && now_ns() >= worker.connect_at_ns) {
    worker.connected = true;
    worker.peer = fmt::format("{}/{}", worker.name, ++worker.connections);
    worker_by_peer_[worker.peer] = &worker;
    disturb(worker, now_ns());
    ++counts_.worker_events;
    worker.agent->on_connected(now_ns());
  }
  deliver_to(worker);
  // A process's end and what it said last come to the daemon by two ways.
  if (chance(0.5)) hear_ranks(worker);
  advance_processes(worker);
  hear_ranks(worker);
  move_copies(worker);
  end_check(worker);
  worker.agent->on_tick(now_ns());
}

// ---- the end

bool AgentCluster::all_succeeded() const {
  const bool busy = std::any_of(workers_.begin(), workers_.end(),
                                [](const Worker& worker) { return !worker.processes.empty(); });
  return !busy &&
         all_jobs(options_.job_count, [](JobState state) { return state == JobState::kSucceeded; });
}

// Once everything has ended and was told, only heartbeats are left: nothing is said again and
// again, and nothing kept that nobody needs.
void AgentCluster::rest() {
  faulty_ = false;
  const Instant settled_by =
      now_ + options_.longest_cut + options_.longest_stall + seconds(20) + kSettle;
  const auto everybody_is_back = [&] {
    return std::all_of(workers_.begin(), workers_.end(), [&](const Worker& worker) {
      return worker.agent && worker.agent->registered() && now_ns() > worker.disturbed_until_ns;
    });
  };
  while (now_ < settled_by && !(core_hears() && everybody_is_back())) tick();
  if (!everybody_is_back()) return violate("a worker does not come back");
  for (const Instant settled = now_ + kSettle; now_ < settled;) tick();
  resting_ = true;
  for (const Instant rested = now_ + kRest; now_ < rested && violation_.empty();) tick();
  for (const Worker& worker : workers_) {
    if (worker.agent->kept() > 0) violate(worker.name + " keeps what it has told");
    for (const auto& [of, held] : worker.memory) {
      if (held.steps.empty()) continue;
      violate(fmt::format("{} holds the state of job {}, which has ended", worker.name, of.first));
    }
  }
  for (const auto& [id, worker] : core_->workers()) {
    if (worker.state != WorkerState::kUp) violate(worker.record.name + " is up, but not so known");
    if (!worker.stale.empty()) violate(worker.record.name + " is still to stop something");
    if (std::ssize(core_->free_devices(id)) != options_.devices_per_worker) {
      violate(worker.record.name + " has devices that nobody uses and nobody can get");
    }
  }
}

void AgentCluster::hear_resting(const ControlMessage& message, const std::string& who) {
  const auto* answer = std::get_if<Registered>(&message);
  const bool beats = std::holds_alternative<Heartbeat>(message) ||
                     (answer != nullptr && answer->heard_sequence != 0);
  if (!resting_ || beats) return;
  violate(fmt::format("when everything has ended, {} still says {}", who, message_name(message)));
}

// ---- daemons and their connections

void AgentCluster::start_daemon(Worker& worker) {
  AgentConfig config;
  config.name = worker.name;
  config.incarnation = static_cast<uint64_t>(++worker.incarnation);
  config.host = worker.name;
  config.device_count = options_.devices_per_worker;
  config.state_place = place_of(worker);
  worker.agent = std::make_unique<Agent>(std::move(config), actions_of(worker));
  worker.connect_at_ns = within(milliseconds(300));
  disturb(worker, worker.connect_at_ns);
}

void AgentCluster::kill_daemon(Worker& worker) {
  trace(worker.name, "daemon gone");
  disconnect(worker);
  worker.agent.reset();
  worker.gave_up = false;
  worker.leaves = false;
  worker.processes.clear();  // they die with it
  worker.lease_end_ns = LeaseFile::kEndless;
  worker.inbox.clear();
  worker.memory.clear();
  worker.copies = {};
  worker.stalled_until_ns = 0;
  worker.back_at_ns = within(seconds(6));
  disturb(worker, worker.back_at_ns);
}

void AgentCluster::disconnect(Worker& worker) {
  if (!worker.connected) return;
  worker.connected = false;
  worker_by_peer_.erase(worker.peer);
  to_workers_.erase(worker.peer);
  if (const auto line = to_core_.find(worker.peer); line != to_core_.end()) {
    std::deque<Flight>& flights = line->second.flights;
    flights.resize(random_.below(flights.size() + 1));
  }
  worker.connect_at_ns = within(options_.longest_cut);
  disturb(worker, worker.connect_at_ns);
  worker.agent->on_disconnected();
}

void AgentCluster::disturb(Worker& worker, int64_t until_ns) {
  worker.disturbed_until_ns = std::max(worker.disturbed_until_ns, until_ns);
}

// The host refuses connections to a daemon that has ended.
void AgentCluster::prove_gone(const Worker& worker) {
  for (const auto& [id, known] : core_->workers()) {
    if (known.record.name != worker.name) continue;
    const WorkerGone gone{id, known.record.incarnation};
    proven_gone_ = &worker;
    feed(gone);
    proven_gone_ = nullptr;
    return;
  }
}

AgentActions AgentCluster::actions_of(Worker& worker) {
  AgentActions actions;
  actions.send_to_coordinator = [this, &worker](const ControlMessage& message) -> Status {
    if (!worker.connected) return unavailable("not connected");
    hear_resting(message, worker.name);
    Line& line = to_core_[worker.peer];
    line.worker = &worker;
    put(line, message);
    return {};
  };
  actions.send_to_rank = [this, &worker](const RankKey& key, const ControlMessage& message) {
    return to_rank(worker, key, message);
  };
  actions.spawn_rank = [this, &worker](const StartRank& start) { return spawn(worker, start); };
  actions.signal_rank = [this, &worker](const RankKey& key, int number) {
    signal(worker, key, number);
  };
  actions.held_state = [&worker](JobId job) {
    std::vector<HeldRank> held;
    for (const auto& [key, state] : worker.memory) {
      if (key.first != job || state.steps.empty()) continue;
      std::vector<int64_t> steps;
      for (const auto& [step, trained] : state.steps) steps.push_back(step);
      held.push_back({key.second, std::move(steps)});
    }
    return held;
  };
  copy_actions(worker, actions);
  actions.drop_state_before = [&worker](JobId job, Epoch epoch) {
    std::erase_if(worker.copies.kept, [&](const auto& entry) {
      return std::get<JobId>(entry.first) == job && std::get<Epoch>(entry.first) < epoch;
    });
    std::erase_if(worker.memory, [&](const auto& entry) {
      return entry.first.first == job && entry.second.epoch < epoch;
    });
  };
  actions.begin_pulses = [&worker](const PulseThread::Registration& registration) {
    worker.lease = registration.lease;
    extend_lease(worker, registration.asked_ns);
  };
  actions.heard = [&worker](int64_t sent_ns) { extend_lease(worker, sent_ns); };
  actions.check_host = [this, &worker] { return begin_check(worker); };
  actions.inspect_rank = [this, &worker](const RankKey& key) { return inspect(worker, key); };
  actions.exit = [this, &worker](ExitCode code, const std::string& why) {
    // Of two daemons whose first words come late and in turn nobody can say which is the newer one.
    trace(worker.name, "gave up: {}", why);
    if (worker.incarnation == 1 && code == ExitCode::kConflict) {
      violate(worker.name + " gave up: " + why);
    }
    if (code != ExitCode::kConflict) worker.left = worker.incarnation;
    worker.gave_up = true;
  };
  return actions;
}

void AgentCluster::put(Line& line, ControlMessage message) {
  const int64_t at_ns = std::max(within(kDelayMax), line.newest_at_ns);
  line.newest_at_ns = at_ns;
  const auto after = std::find_if(line.flights.rbegin(), line.flights.rend(),
                                  [&](const Flight& flight) { return flight.at_ns <= at_ns; });
  line.flights.insert(after.base(), {at_ns, std::move(message)});
}

// Worse than ZeroMQ over TCP: an order that later ones overtake.
void AgentCluster::put_out_of_order(Line& line, ControlMessage message) {
  count(Fault::kMessageOvertaken);
  const int64_t at_ns = within(kOvertakenMax);
  const auto after = std::find_if(line.flights.begin(), line.flights.end(),
                                  [&](const Flight& flight) { return flight.at_ns > at_ns; });
  line.flights.insert(after, {at_ns, std::move(message)});
}

void AgentCluster::deliver_to_core() {
  if (!core_hears()) return;
  std::vector<std::pair<Worker*, WorkerMessage>> arriving;
  for (auto& [peer, line] : to_core_) {
    if (now_ns() < line.stalled_until_ns) continue;
    while (!line.flights.empty() && line.flights.front().at_ns <= now_ns()) {
      arriving.push_back({line.worker, {peer, std::move(line.flights.front().message)}});
      line.flights.pop_front();
    }
  }
  std::erase_if(to_core_, [this](const auto& line) {
    return line.second.flights.empty() && !worker_by_peer_.contains(line.first);
  });
  for (auto& [worker, message] : arriving) {
    worker->heard_ns = now_ns();
    const std::string peer = message.peer;
    feed(std::move(message));
    // Of what comes before it is introduced the coordinator cannot know whom it is from.
    const auto* const known = core_ ? core_->find_worker(worker->name) : nullptr;  // it may crash
    const bool introduced = known != nullptr && known->peer == peer;
    if (peer == worker->peer && introduced) worker->heard_newest_ns = now_ns();
  }
}

void AgentCluster::deliver_to(Worker& worker) {
  const std::string peer = worker.peer;
  while (worker.connected) {
    Line& line = to_workers_[peer];
    if (now_ns() < line.stalled_until_ns) break;
    if (line.flights.empty() || line.flights.front().at_ns > now_ns()) break;
    const ControlMessage message = std::move(line.flights.front().message);
    line.flights.pop_front();
    ++counts_.worker_events;
    worker.agent->on_coordinator_message(now_ns(), message);
  }
}

// ---- faults

void AgentCluster::faults() {
  for (Worker& worker : workers_) {
    if (worker.agent) worker_faults(worker);
  }
  coordinator_faults();
}

void AgentCluster::worker_faults(Worker& worker) {
  const Duration undisturbed(now_ns() - worker.disturbed_until_ns);
  if (options_.restarts_nothing && undisturbed < kHeardWithin) return;  // one after the other
  if (chance(options_.daemon_kills)) {
    count(Fault::kDaemonKilled);
    return kill_daemon(worker);
  }
  const bool in_a_hurry = worker.leaves && !options_.restarts_nothing;
  if (chance(options_.departures) && (!worker.leaves || in_a_hurry)) {
    worker.leaves = true;
    count(Fault::kDaemonAskedToEnd);
    trace(worker.name, "daemon asked to end");
    worker.agent->shut_down(now_ns());
  }
  if (chance(options_.cuts) && worker.connected) {
    disconnect(worker);
    count(Fault::kConnectionCut);
    trace(worker.name, "connection cut for {:.2f} s",
          to_seconds(Duration(worker.connect_at_ns - now_ns())));
  }
  if (chance(options_.link_stalls) && worker.connected) {
    count(Fault::kLinkStalled);
    const int64_t until_ns = within(options_.longest_stall);
    const bool to_core = chance(0.7);
    if (to_core) to_core_[worker.peer].stalled_until_ns = until_ns;
    if (to_core) to_core_[worker.peer].worker = &worker;
    const bool to_worker = !to_core || chance(0.5);
    if (to_worker) to_workers_[worker.peer].stalled_until_ns = until_ns;
    disturb(worker, until_ns);
    trace(worker.name, "connection held up{}{} for {:.2f} s", to_core ? " to the coordinator" : "",
          to_worker ? " to the worker" : "", to_seconds(Duration(until_ns - now_ns())));
  }
  if (chance(options_.daemon_stalls)) {
    count(Fault::kDaemonStalled);
    worker.stalled_until_ns = within(options_.longest_stall);
    disturb(worker, worker.stalled_until_ns);
    trace(worker.name, "daemon stopped for {:.2f} s",
          to_seconds(Duration(worker.stalled_until_ns - now_ns())));
  }
  rank_faults(worker);
}

// ---- the coordinator's side

void AgentCluster::submit_jobs() {
  if (!core_hears() || std::ssize(accepted_) >= options_.job_count) return;
  int64_t devices = 0;
  for (const auto& [id, worker] : core_->workers()) devices += worker.record.device_count;
  const bool all_are_here = core_->workers().size() == workers_.size() || chance(0.05);
  if (devices < static_cast<int64_t>(kSimWorldSize) || !all_are_here) return;
  const RequestId request = {++requests_};
  JobSpec spec = sim_spec(fmt::format("job{}", request.value));
  spec.parallelism.rebalance.threshold = options_.rebalance_threshold;
  spec.recovery.hang_timeout = options_.hang_timeout;
  spec.recovery.mirror_automatic = options_.mirrors;
  if (!options_.spikes.empty()) {
    spec.guards.loss_spike.policy = GuardPolicy::kRollback;
    spec.guards.rollback_steps = 3;
    spec.guards.max_rollbacks = 1000;
  }
  feed(SubmitJob{request, spec});
}

// Who cancels a job resumes it some time later, at the latest when faults stop.
void AgentCluster::cancel_and_resume() {
  if (options_.cancels == 0.0) return;
  for (const JobId id : std::set<JobId>(accepted_)) {
    if (!core_hears()) return;
    const JobState state = core_->find_job(id)->record.state;
    if (state == JobState::kCancelled && (!faulty_ || chance(0.02))) {
      feed(ResumeJob{{++requests_}, id});
    } else if (faulty_ && !is_final(state) && chance(options_.cancels)) {
      feed(CancelJob{{++requests_}, id, static_cast<int64_t>(random_.below(3000))});
    }
  }
}

void AgentCluster::on_core_crash() {
  core_is_new_ = true;
  to_core_.clear();
  for (Worker& worker : workers_) {
    if (worker.agent) disconnect(worker);
  }
}

void AgentCluster::send(OutgoingMessage out) {
  hear_resting(out.message, "the coordinator");
  if (!worker_by_peer_.contains(out.peer)) return;
  Line& line = to_workers_[out.peer];
  if (faulty_ && chance(options_.overtaking)) {
    return put_out_of_order(line, std::move(out.message));
  }
  put(line, std::move(out.message));
}

// ---- what must hold

void AgentCluster::check(const Effects& effects) {
  if (resting_ && !effects.events.empty()) {
    violate("when everything has ended, there still is news: " + effects.events[0].reason.message);
  }
  check_steps(effects);
  check_causes(effects);
  for (const JobEvent& event : effects.events) {
    const bool is_over = event.from == JobState::kStopping;
    if (event.from && (is_over || event.state == JobState::kPlacing)) check_gone(event);
    if (event.from && event.state == JobState::kLoading) check_loading(event);
  }
  // A record of one that is lost is also written for other reasons.
  const bool gives_up =
      std::any_of(effects.events.begin(), effects.events.end(), [](const JobEvent& event) {
        return event.job.value == 0 && event.reason.code == kCauseWorkerLost;
      });
  for (const WorkerRecord& record : effects.workers) {
    if (record.lost && gives_up) check_lost(record);
  }
}

// Daemons tell steps again until they are stored, so none may be missing among the records of an
// attempt, nor between those of two.
void AgentCluster::check_steps(const Effects& effects) {
  if (std::exchange(core_is_new_, false)) {
    recorded_.clear();
    for (const auto& [id, job] : core_->jobs()) {
      const auto& last = job.record.last_step;
      if (last) recorded_[id] = {last->epoch, last->step};
    }
  }
  for (const StepRecord& step : effects.steps) {
    const JobRecord& record = core_->find_job(step.job)->record;
    auto& [epoch, newest] = recorded_[step.job];
    const int64_t before = epoch == step.epoch ? newest : record.restore_step;
    if (step.step != before + 1) {
      violate(fmt::format("job {} epoch {}: step {} is recorded after step {}", step.job,
                          step.epoch, step.step, before));
    }
    epoch = step.epoch;
    newest = step.step;
  }
  for (const OutgoingMessage& out : effects.messages) {
    const auto* start = std::get_if<StartRank>(&out.message);
    if (start == nullptr || !start->from_memory) continue;
    check_memory_start(out.peer, *start);
    if (start->restore_step > core_->find_job(start->job)->record.highest_step) {
      violate(fmt::format("job {} goes on from step {}, which is not recorded", start->job,
                          start->restore_step));
    }
  }
}

// Where there is no such state, the daemon must be another one by now.
void AgentCluster::check_memory_start(const std::string& peer, const StartRank& order) {
  const auto known = worker_by_peer_.find(peer);
  if (known == worker_by_peer_.end()) return;
  const Worker& worker = *known->second;
  const auto is_another = [&](const Worker& any) {
    return core_->find_worker(any.name)->record.incarnation !=
           static_cast<uint64_t>(any.incarnation);
  };
  if (is_another(worker)) return;
  const auto held = worker.memory.find({order.job, order.rank});
  // What was ordered before may have trained on since, or have ended.
  const bool repeated = started_.contains({order.job, order.epoch, order.rank});
  bool there = held != worker.memory.end() && held->second.steps.contains(order.restore_step);
  if (!order.state_from.address.empty()) {
    const Worker* const keeper = find_worker(order.state_from);
    if (keeper == nullptr || keeper->agent == nullptr || is_another(*keeper)) return;
    there = keeper->copies.kept.contains(
        {order.job, Epoch{order.epoch.value - 1}, order.rank, order.restore_step});
  }
  if (!there && !repeated) {
    violate(fmt::format("job {} epoch {} rank {} is to go on from step {}, which {} does not hold",
                        order.job, order.epoch, order.rank, order.restore_step, worker.name));
  }
}

// When a job starts anew, or has been stopped, ranks of the attempt before may be left only where
// nobody can have heard of them: on a worker that is lost, or silent.
void AgentCluster::check_gone(const JobEvent& event) {
  for (const Worker& worker : workers_) {
    const penstock::Worker* const known = core_->find_worker(worker.name);
    if (known == nullptr || known->state == WorkerState::kLost) continue;
    if (known->state == WorkerState::kUp && now_ns() - worker.heard_newest_ns > kSilent.count()) {
      continue;
    }
    for (const auto& [key, process] : worker.processes) {
      const bool starts = event.state == JobState::kPlacing;
      const bool is_old = starts ? key.epoch < event.epoch
                                 : key.epoch == event.epoch && !known->stale.contains(event.job);
      if (key.job != event.job || !is_old || process.ends) continue;
      violate(fmt::format("job {} epoch {} is {} while {} runs on {}", event.job, event.epoch,
                          job_state_name(*event.state), to_string(key), worker.name));
    }
  }
}

void AgentCluster::check_loading(const JobEvent& event) {
  for (int32_t rank = 0; rank < static_cast<int32_t>(kSimWorldSize); ++rank) {
    if (started_.contains({event.job, event.epoch, Rank{rank}})) continue;
    violate(fmt::format("job {} epoch {} loads before its rank {} is started", event.job,
                        event.epoch, rank));
  }
}

// What is given as the cause of a failure has happened.
void AgentCluster::check_causes(const Effects& effects) {
  for (const JobEvent& event : effects.events) {
    if (event.state == JobState::kRecovering) check_cause(event);
  }
}

void AgentCluster::check_cause(const JobEvent& event) {
  static const std::set<std::string> kEnds = {"rank_killed", "rank_exited", "peer_lost",
                                              "unreachable", "not_found"};
  const std::string& code = event.reason.code;
  if (!event.rank) return;
  const RankKey key = {event.job, event.epoch, *event.rank};
  if (kEnds.contains(code) && !ended_.contains(key)) {
    violate(fmt::format("{} has not ended, but: {}", to_string(key), event.reason.message));
  }
  const auto ended = ended_.find(key);
  if (code == "rank_missing" && ended != ended_.end() && now_ - ended->second < kTimeToTell) {
    violate(fmt::format("{} has just ended, which its daemon is about to tell, but: {}",
                        to_string(key), event.reason.message));
  }
  const Process* const named = find_process(key);
  const bool is_well = named != nullptr && !named->hangs();
  if (is_well && (code == kCauseRankHung || code == "rank_missing")) {
    violate(fmt::format("{} is well, but: {}", to_string(key), event.reason.message));
  }
}

// Unreachable is not dead: nobody is given up without proof before its lease is over, nor who could
// be heard all the time.
void AgentCluster::check_lost(const WorkerRecord& lost) {
  const auto worker = std::find_if(workers_.begin(), workers_.end(), [&](const Worker& candidate) {
    return candidate.name == lost.name;
  });
  if (&*worker == proven_gone_) return;
  if (lost.incarnation == static_cast<uint64_t>(worker->left)) return;  // and says so
  const Duration silence(now_ns() - worker->heard_newest_ns);
  if (silence < kLease) {
    violate(fmt::format("{} is given up after {:.1f} s, before its lease is over", lost.name,
                        to_seconds(silence)));
  }
  if (Duration(now_ns() - worker->disturbed_until_ns) > kHeardWithin) {
    violate(lost.name + " is given up, though nothing kept it from being heard");
  }
}

// And who cannot be heard is.
void AgentCluster::check_silence(const Worker& worker) {
  const Duration silence(now_ns() - worker.heard_ns);
  if (silence <= kLease + kLeaseSlack || !core_hears()) return;
  if (now_ - core_disturbed_until() <= kLease + kLeaseSlack) return;
  for (const auto& [id, known] : core_->workers()) {
    if (known.record.name == worker.name && known.state != WorkerState::kLost) {
      violate(fmt::format("{} was not heard for {:.1f} s and is not given up", worker.name,
                          to_seconds(silence)));
    }
  }
}

}  // namespace penstock
