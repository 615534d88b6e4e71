#include "tests/simulation/agent_cluster.h"

#include <signal.h>

#include <algorithm>

namespace penstock {
namespace {

using std::chrono::milliseconds;

constexpr Duration kTick = milliseconds(50);

}  // namespace

AgentCluster::AgentCluster(const AgentClusterOptions& options)
    : SimulatedCoordinator(options.seed), options_(options), workers_(options.worker_count) {
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
    now_ = now_ + kTick;
    if (now_ < faults_end) faults();
    start_core_when_due();
    submit_jobs();
    suspend_and_resume();
    deliver();
    train_gangs();
    for (Worker& worker : workers_) {
      if (!worker.agent && now_ns() >= worker.back_at_ns) start_daemon(worker);
      if (!worker.agent) continue;
      if (core_ && !worker.connected && now_ns() >= worker.connect_at_ns) {
        worker.connected = true;
        ++worker.connection;
        worker.agent->on_connected(now_ns());
      }
      keep_to_lease(worker);
      advance_processes(worker);
      if (worker.agent) worker.agent->on_tick(now_ns());
    }
    if (core_) feed(Tick{});
  }
  if (!all_succeeded()) {
    violate("after a long quiet time not every job has succeeded:" + states());
  }
  for (const Worker& worker : workers_) {
    if (!worker.processes.empty()) violate("a rank runs on " + worker.name + " after every job");
  }
  return violation_;
}

bool AgentCluster::all_succeeded() const {
  const bool busy = std::any_of(workers_.begin(), workers_.end(),
                                [](const Worker& worker) { return !worker.processes.empty(); });
  return !busy &&
         all_jobs(options_.job_count, [](JobState state) { return state == JobState::kSucceeded; });
}

// ---- daemons and their connections

void AgentCluster::start_daemon(Worker& worker) {
  AgentConfig config;
  config.name = worker.name;
  config.incarnation = static_cast<uint64_t>(++worker.incarnation);
  config.host = worker.name;
  config.device_count = options_.devices_per_worker;
  worker.agent = std::make_unique<Agent>(std::move(config), actions_of(worker));
  worker.connect_at_ns = within(milliseconds(300));
}

void AgentCluster::kill_daemon(Worker& worker) {
  trace(worker.name + ": daemon killed");
  disconnect(worker);
  worker.agent.reset();
  worker.processes.clear();  // they die with it
  worker.lease_end_ns = LeaseFile::kEndless;
  worker.memory.clear();
  worker.back_at_ns = within(std::chrono::seconds(6));
}

// What was under way from the coordinator is lost; what it had received already is not.
void AgentCluster::disconnect(Worker& worker) {
  if (!worker.connected) return;
  worker.connected = false;
  to_workers_.erase(worker.peer());
  const std::string peer = worker.peer();
  std::erase_if(to_core_, [&](const Flight& flight) { return flight.peer == peer && chance(0.5); });
  worker.connect_at_ns = within(options_.longest_cut);
  worker.agent->on_disconnected();
}

void AgentCluster::extend_lease(Worker& worker, int64_t since_ns) {
  const int64_t end_ns = since_ns + worker.lease.count();
  const bool first = worker.lease_end_ns == LeaseFile::kEndless;
  worker.lease_end_ns = first ? end_ns : std::max(worker.lease_end_ns, end_ns);
}

// As ranks do, but those that are stopped. A coordinator that is down refuses connections.
void AgentCluster::keep_to_lease(Worker& worker) {
  if (worker.lease_end_ns == LeaseFile::kEndless) return;
  if (!core_) extend_lease(worker, now_ns());
  if (now_ns() <= worker.lease_end_ns) return;
  for (auto& [key, process] : worker.processes) {
    if (process.ends || process.stopped) continue;
    trace(fmt::format("{}: the lease of {} is over", worker.name, to_string(key)));
    process.ends = ExitStatus{static_cast<int>(ExitCode::kUnreachable), 0};
  }
}

// Every step needs every rank.
bool AgentCluster::can_progress(JobId job, Epoch epoch) const {
  size_t running = 0;
  for (const Worker& worker : workers_) {
    for (const auto& [key, process] : worker.processes) {
      running += key.job == job && key.epoch == epoch && !process.ends && !process.stopped;
    }
  }
  return running == kSimWorldSize;
}

AgentActions AgentCluster::actions_of(Worker& worker) {
  AgentActions actions;
  actions.send_to_coordinator = [this, &worker](const ControlMessage& message) -> Status {
    if (!worker.connected) return unavailable("not connected");
    to_core_.push_back({arrival(to_core_), worker.peer(), message});
    return {};
  };
  actions.send_to_rank = [this, &worker](const RankKey& key, const ControlMessage& message) {
    return to_rank(worker, key, message);
  };
  actions.spawn_rank = [this, &worker](const StartRank& start) { return spawn(worker, start); };
  actions.signal_rank = [&worker](const RankKey& key, int signal) {
    const auto process = worker.processes.find(key);
    if (process == worker.processes.end() || process->second.ends) return;
    process->second.ends = signal == SIGKILL
                               ? ExitStatus{-1, SIGKILL}
                               : ExitStatus{static_cast<int>(ExitCode::kPreempted), 0};
  };
  actions.held_state = [&worker](JobId job) {
    std::vector<HeldRank> held;
    for (const auto& [key, state] : worker.memory) {
      if (key.first == job && !state.steps.empty()) held.push_back({key.second, state.steps});
    }
    return held;
  };
  actions.drop_state_before = [&worker](JobId job, Epoch epoch) {
    std::erase_if(worker.memory, [&](const auto& entry) {
      return entry.first.first == job && entry.second.epoch < epoch;
    });
  };
  actions.begin_pulses = [this, &worker](const PulseThread::Registration& registration) {
    worker.lease = registration.lease;
    extend_lease(worker, registration.asked_ns);
  };
  actions.heard = [this, &worker](int64_t sent_ns) { extend_lease(worker, sent_ns); };
  actions.inspect_rank = [this, &worker](const RankKey& key) { return inspect(worker, key); };
  actions.exit = [this, &worker](ExitCode, const std::string& why) {
    violate(worker.name + " gave up: " + why);
  };
  return actions;
}

int64_t AgentCluster::arrival(const std::deque<Flight>& line) {
  const int64_t at_ns = within(milliseconds(200));
  return line.empty() ? at_ns : std::max(at_ns, line.back().at_ns);
}

// What trains waits for a rank of its gang that is stopped, if there is one.
RankActivity AgentCluster::inspect(const Worker& worker, const RankKey& key) const {
  const Process& process = worker.processes.at(key);
  RankActivity activity{
      .rank = key.rank,
      .process = process.stopped ? ProcessState::kStopped : ProcessState::kSleeping,
      .recorded = process.bound,
      .state = {.phase = FlightPhase::kLoading},
      .quiet_ms = (now_ns() - process.moved_at_ns) / 1'000'000};
  if (process.ready) activity.state.phase = FlightPhase::kReady;
  if (!process.begun || process.stopped) return activity;
  activity.state.phase =
      process.step < kSimSteps ? FlightPhase::kTraining : FlightPhase::kCommitting;
  activity.quiet_ms = 0;
  for (int32_t rank = 0; rank < static_cast<int32_t>(kSimWorldSize); ++rank) {
    const Process* const peer = find_process({key.job, key.epoch, Rank{rank}});
    if (peer == nullptr || !peer->stopped) continue;
    activity.state.peer = rank;
    activity.quiet_ms = (now_ns() - process.moved_at_ns) / 1'000'000;
  }
  return activity;
}

const AgentCluster::Process* AgentCluster::find_process(const RankKey& key) const {
  for (const Worker& worker : workers_) {
    const auto found = worker.processes.find(key);
    if (found != worker.processes.end() && !found->second.ends) return &found->second;
  }
  return nullptr;
}

Status AgentCluster::to_rank(Worker& worker, const RankKey& key, const ControlMessage& message) {
  const auto found = worker.processes.find(key);
  if (found == worker.processes.end() || !found->second.bound) return unavailable("no such rank");
  Process& process = found->second;
  if (process.stopped) return {};  // into its queue, for ever
  process.moved_at_ns = now_ns();
  if (const auto* start = std::get_if<StartRank>(&message)) {
    process.order = *start;
    process.step = start->restore_step;
    process.ready_at_ns = within(std::chrono::seconds(1));
    if (!restore_from_memory(worker, *start)) {
      process.ends = ExitStatus{static_cast<int>(ExitCode::kNotFound), 0};
    }
  } else if (std::holds_alternative<BeginTraining>(message)) {
    process.begun = true;
  } else if (const auto* outcome = std::get_if<CheckpointOutcome>(&message)) {
    if (outcome->step == kSimSteps && outcome->committed) process.final_committed = true;
    if (outcome->step == process.paused_at && !outcome->committed) {
      process.pause = false;
      process.paused_at = -1;
    }
  } else if (std::holds_alternative<PauseRanks>(message) && process.paused_at < 0) {
    process.pause = true;
  }
  return {};
}

// Whether older ranks of a job cannot run on a worker any more when a new epoch starts: the
// coordinator hears it, and has heard that they are gone. Of one that it lost, or that was silent
// when the epoch was placed and has not registered since the coordinator was started again, it
// cannot know; that such ranks make no progress is checked beside it.
bool AgentCluster::must_be_stopped(const Worker& worker, JobId job) const {
  if (!core_) return false;
  const auto known =
      std::find_if(core_->workers().begin(), core_->workers().end(),
                   [&](const auto& entry) { return entry.second.record.name == worker.name; });
  return known != core_->workers().end() && known->second.state == WorkerState::kUp &&
         !known->second.stale.contains(job);
}

// The promise: of one job no two epochs can make progress, and none runs beside another but where
// the coordinator has lost a worker.
Result<int32_t> AgentCluster::spawn(Worker& worker, const StartRank& start) {
  const RankKey key = {start.job, start.epoch, start.rank};
  trace(fmt::format("{}: starts {}", worker.name, to_string(key)));
  for (const Worker& other : workers_) {
    for (const auto& [running, process] : other.processes) {
      if (process.ends) continue;
      if (running.job == start.job && running.epoch != start.epoch &&
          must_be_stopped(other, start.job)) {
        violate(fmt::format("{} starts on {} while {} runs on {}", to_string(key), worker.name,
                            to_string(running), other.name));
      }
      if (running.job == start.job && running.epoch != start.epoch &&
          can_progress(running.job, running.epoch)) {
        violate(fmt::format("{} starts while every rank of epoch {} still trains", to_string(key),
                            running.epoch));
      }
      const bool same_device =
          &other == &worker && process.order && process.order->device == start.device;
      if (same_device) violate("two ranks on one device of " + worker.name);
    }
  }
  Process process;
  process.pid = ++last_pid_;
  process.moved_at_ns = now_ns();
  process.hello_at_ns = within(milliseconds(300));
  worker.processes[key] = process;
  return process.pid;
}

// ---- ranks

bool AgentCluster::restore_from_memory(Worker& worker, const StartRank& start) {
  Held& held = worker.memory[{start.job, start.rank}];
  held.epoch = start.epoch;
  if (!start.from_memory) {
    held.steps.clear();
    return true;
  }
  ++memory_starts_;
  const bool there =
      std::find(held.steps.begin(), held.steps.end(), start.restore_step) != held.steps.end();
  held.steps = {start.restore_step};
  return there;
}

// The state it was writing is lost, and all of a process that ended in a way nobody understands.
void AgentCluster::leave_memory(Worker& worker, const RankKey& key, const ExitStatus& status) {
  Held& held = worker.memory[{key.job, key.rank}];
  const bool sound = status.signal == SIGKILL ||
                     status.exit_code == static_cast<int>(ExitCode::kPeerLost) ||
                     status.exit_code == static_cast<int>(ExitCode::kUnreachable) ||
                     status.exit_code == static_cast<int>(ExitCode::kPreempted);
  if (!sound) {
    held.steps.clear();
  } else if (status.signal == SIGKILL && held.steps.size() > 1 && chance(0.3)) {
    held.steps.pop_back();
  }
}

void AgentCluster::advance_processes(Worker& worker) {
  std::vector<RankKey> keys;
  for (const auto& [key, process] : worker.processes) keys.push_back(key);
  for (const RankKey& key : keys) {
    Process& process = worker.processes.at(key);
    if (process.ends) {
      const ExitStatus status = *process.ends;
      worker.processes.erase(key);
      leave_memory(worker, key, status);
      worker.agent->on_rank_exit(now_ns(), key, status, "sim");
      continue;
    }
    if (process.stopped) continue;
    if (!process.bound && now_ns() >= process.hello_at_ns) {
      if (!worker.agent->accepts({key.job, key.epoch, key.rank, process.pid})) continue;
      process.bound = true;
      worker.agent->on_rank_bound(key);
    }
    if (process.order && !process.ready && now_ns() >= process.ready_at_ns) {
      process.ready = true;
      process.moved_at_ns = now_ns();
      worker.agent->on_rank_message(now_ns(), key, RankReady{key.job, key.epoch, key.rank, "here"});
    }
  }
}

void AgentCluster::train_gangs() {
  std::map<std::pair<JobId, Epoch>, std::vector<std::pair<Worker*, RankKey>>> gangs;
  for (Worker& worker : workers_) {
    for (const auto& [key, process] : worker.processes) {
      if (!process.ends) gangs[{key.job, key.epoch}].emplace_back(&worker, key);
    }
  }
  for (const auto& [attempt, gang] : gangs) train(gang);
}

// One step of a gang that is whole; the members of another notice that a peer is gone.
void AgentCluster::train(const std::vector<std::pair<Worker*, RankKey>>& gang) {
  const auto process_of = [](const auto& at) -> Process& {
    return at.first->processes.at(at.second);
  };
  const bool whole = gang.size() == kSimWorldSize;
  const bool all_begun = std::all_of(gang.begin(), gang.end(), [&](const auto& at) {
    return process_of(at).begun && !process_of(at).stopped;
  });
  if (!whole) {
    for (const auto& at : gang) {
      const bool lost_a_peer =
          process_of(at).begun && process_of(at).step < kSimSteps && !process_of(at).stopped;
      if (lost_a_peer && chance(0.2)) {
        process_of(at).ends = ExitStatus{static_cast<int>(ExitCode::kPeerLost), 0};
      }
    }
  }
  for (const auto& at : gang) {
    if (process_of(at).step < kSimSteps || !process_of(at).final_committed) continue;
    if (process_of(at).stopped) continue;
    at.first->agent->on_rank_message(
        now_ns(), at.second,
        RankFinished{at.second.job, at.second.epoch, at.second.rank, kSimSteps});
    process_of(at).ends = ExitStatus{0, 0};
  }
  const auto any = [&](auto condition) {
    return std::any_of(gang.begin(), gang.end(),
                       [&](const auto& at) { return condition(process_of(at)); });
  };
  if (any([](const Process& process) { return process.paused_at >= 0; })) return;
  if (!whole || !all_begun || !chance(0.3) || process_of(gang[0]).step >= kSimSteps) return;
  const StartRank& first = *process_of(gang[0]).order;
  const bool seated_alike = std::all_of(gang.begin(), gang.end(), [&](const auto& at) {
    return process_of(at).order->seats == first.seats;
  });
  if (!seated_alike) violate(fmt::format("ranks of job {} seat experts differently", first.job));
  const bool begin_alike = std::all_of(gang.begin(), gang.end(), [&](const auto& at) {
    return process_of(at).order->restore_step == first.restore_step &&
           process_of(at).order->from_memory == first.from_memory;
  });
  if (!begin_alike) violate(fmt::format("ranks of job {} go on from different steps", first.job));
  const int64_t step = process_of(gang[0]).step + 1;
  const bool pauses = step < kSimSteps && any([](const Process& process) { return process.pause; });
  for (const auto& at : gang) {
    const auto& [job, epoch, rank] = at.second;
    Agent& agent = *at.first->agent;
    process_of(at).step = step;
    process_of(at).moved_at_ns = now_ns();
    std::vector<int64_t>& held = at.first->memory[{job, rank}].steps;
    held.push_back(step);
    if (held.size() > 2) held.erase(held.begin());
    const auto say = [&](const ControlMessage& message) {
      agent.on_rank_message(now_ns(), at.second, message);
    };
    say(RankProgress{.job = job, .epoch = epoch, .rank = rank, .step = step});
    if (rank.value == 0) say(sim_report(job, epoch, step));
    if (pauses) process_of(at).paused_at = step;
    if (step % kSimCheckpointInterval != 0 && !pauses) continue;
    if (rank.value == 0 && options_.rebalance_threshold > 0.0) say(uneven_loads(at.second, step));
    SegmentSaved segment = sim_segment(job, epoch, rank, step);
    segment.pauses = pauses;
    say(segment);
  }
}

ExpertLoadReport AgentCluster::uneven_loads(const RankKey& key, int64_t step) {
  ExpertLoadReport report{key.job, key.epoch, key.rank, step, {}};
  for (int64_t layer = 1; layer < 4; ++layer) {
    for (int expert = 0; expert < 8; ++expert) {
      report.layers[layer].push_back(static_cast<double>(1 + random_.below(20)));
    }
  }
  return report;
}

void AgentCluster::faults() {
  for (Worker& worker : workers_) {
    if (!worker.agent) continue;
    if (chance(options_.daemon_kills)) {
      kill_daemon(worker);
      continue;
    }
    if (chance(options_.cuts)) {
      trace(worker.name + ": connection cut");
      disconnect(worker);
    }
    for (auto& [key, process] : worker.processes) {
      if (chance(options_.rank_kills) && !process.ends) {
        trace(fmt::format("{}: {} killed", worker.name, to_string(key)));
        process.ends = ExitStatus{-1, SIGKILL};
      }
      if (options_.rank_stops > 0.0 && chance(options_.rank_stops) && !process.ends) {
        trace(fmt::format("{}: {} stopped", worker.name, to_string(key)));
        process.stopped = true;
      }
    }
  }
  if (core_ && chance(options_.coordinator_crashes)) {
    crash_core(std::chrono::seconds(5));
    break_connections();
  }
}

// ---- coordinator

void AgentCluster::submit_jobs() {
  if (!core_ || std::ssize(accepted_) >= options_.job_count) return;
  int64_t devices = 0;
  for (const auto& [id, worker] : core_->workers()) devices += worker.record.device_count;
  if (devices < static_cast<int64_t>(kSimWorldSize)) return;
  const RequestId request = {++requests_};
  JobSpec spec = sim_spec(fmt::format("job{}", request.value));
  spec.parallelism.rebalance.threshold = options_.rebalance_threshold;
  spec.recovery.hang_timeout = options_.hang_timeout;
  feed(SubmitJob{request, spec});
}

void AgentCluster::suspend_and_resume() {
  if (!core_ || options_.suspensions == 0.0) return;
  const bool faulty = now_ - begin_ < options_.fault_time;
  for (const JobId job : std::set<JobId>(accepted_)) {
    const bool suspended = core_->find_job(job)->record.state == JobState::kSuspended;
    if (suspended && (!faulty || chance(0.02))) {
      ++suspensions_;
      feed(ResumeJob{{++requests_}, job});
    } else if (!suspended && faulty && chance(options_.suspensions)) {
      feed(SuspendJob{{++requests_}, job});
    }
  }
}

void AgentCluster::deliver() {
  std::deque<Flight> later;
  std::deque<Flight> arriving;
  for (Flight& flight : std::exchange(to_core_, {})) {
    (flight.at_ns <= now_ns() ? arriving : later).push_back(std::move(flight));
  }
  to_core_ = std::move(later);
  for (Flight& flight : arriving) {
    if (core_) feed(WorkerMessage{flight.peer, std::move(flight.message)});
  }
  for (Worker& worker : workers_) {
    while (worker.connected) {
      std::deque<Flight>& line = to_workers_[worker.peer()];
      if (line.empty() || line.front().at_ns > now_ns()) break;
      const ControlMessage message = std::move(line.front().message);
      line.pop_front();
      worker.agent->on_coordinator_message(now_ns(), message);
    }
  }
  feed_disk_results();
}

void AgentCluster::break_connections() {
  to_core_.clear();
  for (Worker& worker : workers_) {
    if (worker.agent) disconnect(worker);
  }
}

void AgentCluster::send(OutgoingMessage out) {
  const bool open = std::any_of(workers_.begin(), workers_.end(), [&](const Worker& worker) {
    return worker.connected && worker.peer() == out.peer;
  });
  if (!open) return;
  std::deque<Flight>& line = to_workers_[out.peer];
  line.push_back({arrival(line), out.peer, std::move(out.message)});
}

void AgentCluster::check(const Effects& effects) {
  for (const CommitCheckpoint& commit : effects.commits) {
    const auto& steps = checkpoints_[commit.job];
    const bool backwards = std::any_of(steps.begin(), steps.end(), [&](const auto& committed) {
      return committed.second > commit.epoch;
    });
    if (backwards) violate(fmt::format("job {} commits for an old epoch", commit.job));
  }
  for (const JobEvent& event : effects.events) {
    if (event.reason.code != "rank_hung" || event.state != JobState::kRecovering) continue;
    const Process* const named = find_process({event.job, event.epoch, *event.rank});
    if (named == nullptr || named->stopped) continue;
    violate(fmt::format("rank {} of job {} is well, but: {}", *event.rank, event.job,
                        event.reason.message));
  }
}

}  // namespace penstock
