#include "tests/simulation/agent_cluster.h"

#include <signal.h>

#include <algorithm>

#include "tests/run/spec_text.h"

namespace penstock {
namespace {

using std::chrono::milliseconds;

constexpr int64_t kTickNs = 50'000'000;
constexpr int64_t kSteps = 12;
constexpr int64_t kCheckpointInterval = 4;
constexpr size_t kWorldSize = 4;

JobSpec sim_spec(uint64_t number) {
  JobSpec spec = parse_job_spec(kValidSpec, "sim").value();
  spec.name = fmt::format("job{}", number);
  spec.training.steps = kSteps;
  spec.checkpoint.interval = kCheckpointInterval;
  spec.recovery.max_restarts = 1000;
  return spec;
}

}  // namespace

AgentCluster::AgentCluster(const AgentClusterOptions& options)
    : options_(options), random_(options.seed, 0), workers_(options.worker_count) {
  for (size_t i = 0; i < workers_.size(); ++i) {
    workers_[i].name = fmt::format("w{}", i);
    start_daemon(workers_[i]);
  }
  start_core();
}

std::string AgentCluster::run() {
  const int64_t faults_end_ns = now_ns_ + options_.fault_time.count();
  const int64_t end_ns = faults_end_ns + options_.quiet_time.count();
  while (now_ns_ < end_ns && violation_.empty()) {
    if (now_ns_ >= faults_end_ns && all_succeeded()) break;
    now_ns_ += kTickNs;
    if (now_ns_ < faults_end_ns) faults();
    if (!core_ && now_ns_ >= core_back_at_ns_) start_core();
    submit_jobs();
    deliver();
    train_gangs();
    for (Worker& worker : workers_) {
      if (!worker.agent && now_ns_ >= worker.back_at_ns) start_daemon(worker);
      if (!worker.agent) continue;
      if (core_ && !worker.connected && now_ns_ >= worker.connect_at_ns) {
        worker.connected = true;
        ++worker.connection;
        worker.agent->on_connected(now_ns_);
      }
      advance_processes(worker);
      if (worker.agent) worker.agent->on_tick(now_ns_);
    }
    if (core_) feed(Tick{});
  }
  if (violation_.empty() && !all_succeeded()) {
    std::string states;
    for (const auto& [id, job] : core_->jobs()) {
      states += fmt::format(" job {} {} epoch {}: {};", id, job_state_name(job.record.state),
                            job.record.epoch, job.record.reason.message);
    }
    violate("after a long quiet time not every job has succeeded:" + states);
  }
  for (const Worker& worker : workers_) {
    if (!worker.processes.empty()) violate("a rank runs on " + worker.name + " after every job");
  }
  return violation_;
}

int64_t AgentCluster::restarts() const {
  int64_t count = 0;
  for (const auto& [id, job] : core_->jobs()) count += job.record.restarts;
  return count;
}

bool AgentCluster::all_succeeded() const {
  const bool busy = std::any_of(workers_.begin(), workers_.end(),
                                [](const Worker& worker) { return !worker.processes.empty(); });
  return core_ && !busy && std::ssize(accepted_) == options_.job_count &&
         std::all_of(accepted_.begin(), accepted_.end(), [&](JobId job) {
           return core_->find_job(job)->record.state == JobState::kSucceeded;
         });
}

// ---- daemons and their connections

void AgentCluster::start_daemon(Worker& worker) {
  AgentConfig config;
  config.name = worker.name;
  config.incarnation = static_cast<uint64_t>(++worker.incarnation);
  config.host = worker.name;
  config.device_count = options_.devices_per_worker;
  worker.agent = std::make_unique<Agent>(std::move(config), actions_of(worker));
  worker.connect_at_ns = now_ns_ + below(milliseconds(300));
}

void AgentCluster::kill_daemon(Worker& worker) {
  trace(worker.name + ": daemon killed");
  disconnect(worker);
  worker.agent.reset();
  worker.processes.clear();  // they die with it
  worker.back_at_ns = now_ns_ + below(std::chrono::seconds(6));
}

// What was under way from the coordinator is lost; what it had received already is not.
void AgentCluster::disconnect(Worker& worker) {
  if (!worker.connected) return;
  worker.connected = false;
  to_workers_.erase(worker.peer());
  const std::string peer = worker.peer();
  std::erase_if(to_core_, [&](const Flight& flight) { return flight.peer == peer && chance(0.5); });
  worker.connect_at_ns = now_ns_ + below(options_.longest_cut);
  worker.agent->on_disconnected();
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
  actions.exit = [this, &worker](ExitCode, const std::string& why) {
    violate(worker.name + " gave up: " + why);
  };
  return actions;
}

int64_t AgentCluster::arrival(const std::deque<Flight>& line) {
  const int64_t at_ns = now_ns_ + below(milliseconds(200));
  return line.empty() ? at_ns : std::max(at_ns, line.back().at_ns);
}

Status AgentCluster::to_rank(Worker& worker, const RankKey& key, const ControlMessage& message) {
  const auto found = worker.processes.find(key);
  if (found == worker.processes.end() || !found->second.bound) return unavailable("no such rank");
  Process& process = found->second;
  if (const auto* start = std::get_if<StartRank>(&message)) {
    process.order = *start;
    process.step = start->restore_step;
    process.ready_at_ns = now_ns_ + below(std::chrono::seconds(1));
  } else if (std::holds_alternative<BeginTraining>(message)) {
    process.begun = true;
  } else if (const auto* outcome = std::get_if<CheckpointOutcome>(&message)) {
    if (outcome->step == kSteps && outcome->committed) process.final_committed = true;
  }
  return {};
}

// Whether older ranks of a job cannot run on a worker any more when a new epoch starts: the
// coordinator did not lose it, or has heard since that they are gone.
bool AgentCluster::must_be_stopped(const Worker& worker, JobId job) const {
  if (!core_) return false;
  const auto known =
      std::find_if(core_->workers().begin(), core_->workers().end(),
                   [&](const auto& entry) { return entry.second.record.name == worker.name; });
  return known != core_->workers().end() && known->second.state != WorkerState::kLost &&
         !known->second.stale.contains(job);
}

// The promise: of one job no two epochs run, but where the coordinator has lost a worker.
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
      const bool same_device =
          &other == &worker && process.order && process.order->device == start.device;
      if (same_device) violate("two ranks on one device of " + worker.name);
    }
  }
  Process process;
  process.pid = ++last_pid_;
  process.hello_at_ns = now_ns_ + below(milliseconds(300));
  worker.processes[key] = process;
  return process.pid;
}

// ---- ranks

void AgentCluster::advance_processes(Worker& worker) {
  std::vector<RankKey> keys;
  for (const auto& [key, process] : worker.processes) keys.push_back(key);
  for (const RankKey& key : keys) {
    Process& process = worker.processes.at(key);
    if (process.ends) {
      const ExitStatus status = *process.ends;
      worker.processes.erase(key);
      worker.agent->on_rank_exit(now_ns_, key, status, "sim");
      continue;
    }
    if (!process.bound && now_ns_ >= process.hello_at_ns) {
      if (!worker.agent->accepts({key.job, key.epoch, key.rank, process.pid})) continue;
      process.bound = true;
      worker.agent->on_rank_bound(key);
    }
    if (process.order && !process.ready && now_ns_ >= process.ready_at_ns) {
      process.ready = true;
      worker.agent->on_rank_message(now_ns_, key, RankReady{key.job, key.epoch, key.rank, "here"});
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
  const bool whole = gang.size() == kWorldSize;
  const bool all_begun =
      std::all_of(gang.begin(), gang.end(), [&](const auto& at) { return process_of(at).begun; });
  if (!whole) {
    for (const auto& at : gang) {
      const bool lost_a_peer = process_of(at).begun && process_of(at).step < kSteps;
      if (lost_a_peer && chance(0.2)) {
        process_of(at).ends = ExitStatus{static_cast<int>(ExitCode::kPeerLost), 0};
      }
    }
  }
  for (const auto& at : gang) {
    if (process_of(at).step < kSteps || !process_of(at).final_committed) continue;
    at.first->agent->on_rank_message(
        now_ns_, at.second, RankFinished{at.second.job, at.second.epoch, at.second.rank, kSteps});
    process_of(at).ends = ExitStatus{0, 0};
  }
  if (!whole || !all_begun || !chance(0.3) || process_of(gang[0]).step >= kSteps) return;
  const int64_t step = process_of(gang[0]).step + 1;
  for (const auto& at : gang) {
    const auto& [job, epoch, rank] = at.second;
    Agent& agent = *at.first->agent;
    process_of(at).step = step;
    RankProgress progress;
    progress.job = job;
    progress.epoch = epoch;
    progress.rank = rank;
    progress.step = step;
    agent.on_rank_message(now_ns_, at.second, progress);
    if (rank.value == 0) {
      StepReport report;
      report.job = job;
      report.epoch = epoch;
      report.step = step;
      report.loss = 1.0 / static_cast<double>(step);
      agent.on_rank_message(now_ns_, at.second, report);
    }
    if (step % kCheckpointInterval != 0) continue;
    SegmentSaved saved;
    saved.job = job;
    saved.epoch = epoch;
    saved.rank = rank;
    saved.step = step;
    saved.file = "s";
    agent.on_rank_message(now_ns_, at.second, saved);
  }
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
    }
  }
  if (core_ && chance(options_.coordinator_crashes)) crash_core();
}

// ---- coordinator

void AgentCluster::submit_jobs() {
  if (!core_ || std::ssize(accepted_) >= options_.job_count) return;
  int64_t devices = 0;
  for (const auto& [id, worker] : core_->workers()) devices += worker.record.device_count;
  if (devices < static_cast<int64_t>(kWorldSize)) return;
  const RequestId request = {++requests_};
  feed(SubmitJob{request, sim_spec(request.value)});
}

void AgentCluster::deliver() {
  std::deque<Flight> later;
  std::deque<Flight> arriving;
  for (Flight& flight : std::exchange(to_core_, {})) {
    (flight.at_ns <= now_ns_ ? arriving : later).push_back(std::move(flight));
  }
  to_core_ = std::move(later);
  for (Flight& flight : arriving) {
    if (core_) feed(WorkerMessage{flight.peer, std::move(flight.message)});
  }
  for (Worker& worker : workers_) {
    while (worker.connected) {
      std::deque<Flight>& line = to_workers_[worker.peer()];
      if (line.empty() || line.front().at_ns > now_ns_) break;
      const ControlMessage message = std::move(line.front().message);
      line.pop_front();
      worker.agent->on_coordinator_message(now_ns_, message);
    }
  }
  while (core_ && !disk_.empty() && disk_.begin()->first <= now_ns_) {
    feed(disk_.extract(disk_.begin()).mapped());
  }
}

void AgentCluster::start_core() {
  StoredState stored;
  for (const auto& [key, value] : store_) {
    const bool is_state = key.starts_with(kJobPrefix) || key.starts_with(kSpecPrefix) ||
                          key.starts_with(kWorkerPrefix) || key.starts_with(kEvaluationPrefix);
    if (is_state) stored.records.push_back({key, value});
    if (key.starts_with(kEventPrefix)) stored.last_event_sequence = decode_event(value)->sequence;
  }
  CoreConfig config;
  config.checkpoint_root = "/sim";
  core_.emplace(config);
  Result<Effects> effects = core_->start({now_ns_}, stored);
  if (!effects.ok()) return violate("restart from records: " + effects.status().to_string());
  apply(*std::move(effects));
}

void AgentCluster::crash_core() {
  trace("coordinator crashes");
  core_.reset();
  core_back_at_ns_ = now_ns_ + below(std::chrono::seconds(5));
  to_core_.clear();
  disk_.clear();
  for (Worker& worker : workers_) {
    if (worker.agent) disconnect(worker);
  }
}

void AgentCluster::feed(Event event) {
  if (const auto* done = std::get_if<CheckpointDone>(&event)) {
    checkpoints_[done->job][done->step] = done->epoch;
  }
  if (auto* found = std::get_if<CheckpointFound>(&event)) {
    if (const auto& steps = checkpoints_[found->job]; !steps.empty()) {
      found->step = steps.rbegin()->first;
      found->manifest = fmt::format("/sim/{}/{}", found->job, found->step);
    }
  }
  apply(core_->step({now_ns_}, event));
}

void AgentCluster::apply(Effects effects) {
  for (Record& record : records_of(effects)) store_[record.key] = std::move(record.value);
  for (const JobEvent& event : effects.events) {
    trace(fmt::format("core: job {} epoch {} {}: {}", event.job, event.epoch, event.reason.code,
                      event.reason.message));
  }
  for (OutgoingMessage& out : effects.messages) {
    const bool open = std::any_of(workers_.begin(), workers_.end(), [&](const Worker& worker) {
      return worker.connected && worker.peer() == out.peer;
    });
    if (!open) continue;
    std::deque<Flight>& line = to_workers_[out.peer];
    line.push_back({arrival(line), out.peer, std::move(out.message)});
  }
  for (const CommitCheckpoint& commit : effects.commits) {
    const auto& steps = checkpoints_[commit.job];
    const bool backwards = std::any_of(steps.begin(), steps.end(), [&](const auto& committed) {
      return committed.second > commit.epoch;
    });
    if (backwards) violate(fmt::format("job {} commits for an old epoch", commit.job));
    CheckpointDone done;
    done.job = commit.job;
    done.epoch = commit.epoch;
    done.step = commit.step;
    done.checkpoint.manifest = fmt::format("/sim/{}/{}", commit.job, commit.step);
    emit_from_disk(milliseconds(800), done);
  }
  for (const FindCheckpoint& find : effects.finds) {
    CheckpointFound found;
    found.job = find.job;
    emit_from_disk(milliseconds(300), found);
  }
  for (const Answer& answer : effects.answers) {
    if (answer.status.ok()) accepted_.insert(answer.job);
  }
}

// One thread does the disk's work, in order.
void AgentCluster::emit_from_disk(Duration longest, Event event) {
  const int64_t free_at_ns = disk_.empty() ? now_ns_ : std::max(now_ns_, disk_.rbegin()->first);
  disk_.emplace(free_at_ns + below(longest), std::move(event));
}

void AgentCluster::violate(const std::string& what) {
  if (!violation_.empty()) return;
  violation_ = fmt::format("at {:.1f} s: {}", to_seconds(Duration(now_ns_ - begin_ns_)), what);
  for (const std::string& line : trace_) violation_ += "\n  " + line;
}

void AgentCluster::trace(const std::string& line) {
  trace_.push_back(fmt::format("{:.1f} s {}", to_seconds(Duration(now_ns_ - begin_ns_)), line));
  if (trace_.size() > 60) trace_.pop_front();
}

}  // namespace penstock
