#include "tests/simulation/sim_cluster.h"

#include <algorithm>

#include "comm/base/exit_codes.h"

namespace penstock {
namespace {

constexpr Duration kTick = std::chrono::milliseconds(200);
constexpr Duration kBeat = std::chrono::seconds(1);
}  // namespace

SimCluster::SimCluster(const SimOptions& options)
    : SimulatedCoordinator(options.seed, options.coordinator), options_(options) {
  for (int i = 0; i < options.worker_count; ++i) {
    SimWorker worker;
    worker.name = "w" + std::to_string(i);
    workers_.push_back(std::move(worker));
    start_worker(workers_.back());
  }
  start_core();
}

std::string SimCluster::run() {
  const Instant faults_end = now_ + options_.fault_time;
  const Instant end = faults_end + options_.quiet_time;
  const auto all_ended = [&] { return all_jobs(options_.job_count, is_final); };
  while (now_ < end && violation_.empty()) {
    if (now_ >= faults_end && all_ended()) break;
    now_ = now_ + kTick;
    faulty_ = now_ < faults_end;
    if (faulty_) faults();
    submit_jobs();
    if (faulty_) bother_jobs();
    suspend_and_resume(options_.suspensions, 0.05);
    scale();
    drain_and_undrain();
    tick_world();
  }
  if (!all_ended()) violate("after a long quiet time not every job has ended:" + states());
  check_trained();
  count_restarts();
  return violation_;
}

// ---- network

void SimCluster::post(InFlight flight) {
  if (faulty_ && chance(options_.loss)) return count(Fault::kMessageLost);
  const bool repeated = faulty_ && chance(options_.repetition);
  if (repeated) count(Fault::kMessageRepeated);
  flight.number = ++sent_;
  for (int i = 0; i < (repeated ? 2 : 1); ++i) {
    const bool late = faulty_ && chance(options_.lateness);
    if (late) count(Fault::kMessageLate);
    network_.emplace(now_ + milliseconds_below(late ? 30'000 : faulty_ ? 400 : 50), flight);
  }
}

void SimCluster::deliver_due() {
  while (!network_.empty() && network_.begin()->first <= now_) {
    const InFlight flight = std::move(network_.extract(network_.begin()).mapped());
    // A connection of a process that is gone carries nothing more.
    const auto known = worker_by_peer_.find(flight.peer);
    if (known == worker_by_peer_.end()) continue;
    SimWorker& worker = workers_[known->second];
    if (!worker.alive || worker.partitioned_until > now_) continue;
    uint64_t& newest = newest_delivered_[{flight.to_core, flight.peer}];
    if (flight.number < newest) count(Fault::kMessageOvertaken);
    newest = std::max(newest, flight.number);
    if (!flight.to_core) {
      ++counts_.worker_events;
      on_order(worker, flight.message);
    } else if (core_) {
      feed(WorkerMessage{flight.peer, flight.message});
    }
  }
}

void SimCluster::tick_world() {
  start_core_when_due();
  deliver_due();
  feed_disk_results();
  for (SimWorker& worker : workers_) {
    if (!worker.alive && now_ >= worker.back_at) start_worker(worker);
    if (worker.alive) tick_worker(worker);
  }
  std::set<std::pair<JobId, Epoch>> gangs;
  for (const SimWorker& worker : workers_) {
    for (const auto& [key, rank] : worker.ranks) gangs.insert({std::get<0>(key), std::get<1>(key)});
  }
  for (const auto& [job, epoch] : gangs) train(job, epoch);
  if (core_) feed(Tick{});
}

void SimCluster::faults() {
  for (SimWorker& worker : workers_) {
    if (worker.alive && chance(options_.worker_kills)) {
      trace(worker.name, "killed");
      count(Fault::kDaemonKilled);
      kill_worker(worker);
    }
    if (worker.alive && chance(options_.partitions)) {
      worker.partitioned_until = now_ + milliseconds_below(25'000);
      count(Fault::kWorkerCutOff);
      trace(worker.name, "cut off for {:.1f} s", to_seconds(worker.partitioned_until - now_));
    }
    if (!worker.ranks.empty() && chance(options_.rank_kills)) {
      const RankKey victim = worker.ranks.begin()->first;
      count(Fault::kRankKilled);
      end_rank(worker, victim, -1, 9);
    }
  }
  coordinator_faults();
}

// What was under way arrives first, or never.
void SimCluster::on_core_crash() {
  for (auto& [at, flight] : std::exchange(network_, {})) {
    if (!flight.to_core && chance(0.5)) network_.emplace(now_, std::move(flight));
  }
  deliver_due();
}

void SimCluster::submit_jobs() {
  if (!core_hears() || core_->workers().empty()) return;
  const auto wanted = static_cast<uint64_t>(options_.job_count);
  while (requests_ < wanted) {
    ++requests_;
    feed(SubmitJob{{requests_}, spec_of("job" + std::to_string(requests_))});
  }
  if (std::ssize(accepted_) < options_.job_count && chance(0.1)) {
    ++requests_;
    feed(SubmitJob{{requests_}, spec_of("again" + std::to_string(requests_))});
  }
}

void SimCluster::bother_jobs() {
  if (accepted_.empty() || !core_hears()) return;
  const auto some_job = [&] {
    return *std::next(accepted_.begin(), static_cast<int64_t>(random_.below(accepted_.size())));
  };
  if (chance(0.003)) {
    if (chance(0.5)) {
      feed(CancelJob{{++requests_}, some_job(), 1000});
    } else {
      feed(ResumeJob{{++requests_}, some_job()});
    }
  }
  if (!accepted_.empty() && chance(options_.removals)) {
    const JobId job = some_job();
    removals_asked_.insert(job);
    feed(RemoveJob{{++requests_}, job, chance(0.5)});
  }
}

void SimCluster::scale() {
  if (!faulty_ || options_.scalings == 0.0) return;
  for (const JobId job : std::set<JobId>(accepted_)) {
    if (core_hears() && chance(options_.scalings)) {
      feed(ScaleJob{{++requests_}, job, chance(0.5) ? 1 : 2});
    }
  }
}

void SimCluster::drain_and_undrain() {
  if (options_.drains == 0.0) return;
  for (const SimWorker& worker : workers_) {
    const Worker* const known = core_hears() ? core_->find_worker(worker.name) : nullptr;
    if (known == nullptr) continue;
    if (known->record.drain && (!faulty_ || chance(0.02))) {
      feed(DrainWorker{{++requests_}, worker.name, {}});
    } else if (faulty_ && chance(options_.drains)) {
      feed(DrainWorker{{++requests_}, worker.name, "maintenance"});
    }
  }
}

// ---- workers

void SimCluster::start_worker(SimWorker& worker) {
  worker.alive = true;
  worker.registered = false;
  worker.incarnation = random_.next() | 1;
  worker_by_peer_.erase(worker.peer);
  worker.peer = fmt::format("{}#{}", worker.name, worker.incarnation);
  worker_by_peer_[worker.peer] = static_cast<size_t>(&worker - workers_.data());
  worker.sequence = 0;
  worker.challenge = 0;
  worker.next_beat = now_;
  worker.fences.clear();
}

void SimCluster::kill_worker(SimWorker& worker) {
  worker.alive = false;
  worker.back_at = now_ + milliseconds_below(8000);
  worker.ranks.clear();
  worker.exits.clear();
  worker.segments.clear();
}

void SimCluster::say(SimWorker& worker, ControlMessage message) {
  ++counts_.worker_events;
  post({true, worker.peer, 0, std::move(message)});
}

void SimCluster::send_register(SimWorker& worker) {
  Register message;
  message.name = worker.name;
  message.incarnation = worker.incarnation;
  message.host = worker.name;
  message.device_count = options_.devices_per_worker;
  message.sequence = ++worker.sequence;
  message.challenge = worker.challenge;
  for (const auto& [key, rank] : worker.ranks) message.ranks.push_back(rank.status);
  say(worker, message);
}

void SimCluster::tick_worker(SimWorker& worker) {
  for (auto& [key, rank] : worker.ranks) {
    if (rank.status.state != RankState::kStarting || now_ < rank.ready_at) continue;
    rank.status.state = RankState::kReady;
    say(worker, ready(worker, key));
  }
  if (now_ < worker.next_beat) return;
  worker.next_beat = now_ + kBeat;
  if (!worker.registered) return send_register(worker);
  Heartbeat beat;
  beat.incarnation = worker.incarnation;
  beat.sequence = ++worker.sequence;
  for (const auto& [key, rank] : worker.ranks) beat.ranks.push_back(rank.status);
  say(worker, beat);
  for (const auto& [key, message] : worker.exits) say(worker, message);
  for (const auto& [key, message] : worker.segments) say(worker, message);
  for (const auto& [key, rank] : worker.ranks) {
    const auto& [job, epoch, number] = key;
    if (rank.status.state == RankState::kFinished) {
      say(worker, RankFinished{job, epoch, number, kSimSteps});
    }
  }
}

void SimCluster::on_order(SimWorker& worker, const ControlMessage& message) {
  if (const auto* registered = std::get_if<Registered>(&message)) {
    if (!registered->refusal.empty()) return kill_worker(worker);
    worker.registered = registered->worker.value != 0;
    if (registered->challenge != 0) worker.challenge = registered->challenge;
    if (!worker.registered) send_register(worker);
  } else if (const auto* start = std::get_if<StartRank>(&message)) {
    on_start(worker, *start);
  } else if (const auto* begin = std::get_if<BeginTraining>(&message)) {
    for (auto& [key, rank] : worker.ranks) {
      const bool meant = std::get<0>(key) == begin->job && std::get<1>(key) == begin->epoch;
      if (!meant || rank.begun) continue;
      rank.begun = true;
      rank.status.state = RankState::kTraining;
    }
  } else if (const auto* stop = std::get_if<StopRanks>(&message)) {
    on_stop(worker, *stop);
  } else if (const auto* outcome = std::get_if<CheckpointOutcome>(&message)) {
    std::erase_if(worker.segments, [&](const auto& segment) {
      return std::get<0>(segment.first.first) == outcome->job &&
             std::get<1>(segment.first.first) == outcome->epoch &&
             segment.first.second == outcome->step;
    });
    for (auto& [key, rank] : worker.ranks) {
      const bool meant = std::get<0>(key) == outcome->job && std::get<1>(key) == outcome->epoch;
      if (meant && outcome->step == kSimSteps) rank.final_answered = true;
      if (!meant || outcome->committed || rank.paused_at != outcome->step) continue;
      rank.pause = false;
      rank.paused_at = -1;
    }
  } else if (const auto* check = std::get_if<CheckHost>(&message)) {
    say(worker, HostChecked{check->request, true, "simulated"});
  } else if (const auto* pause = std::get_if<PauseRanks>(&message)) {
    for (auto& [key, rank] : worker.ranks) {
      const bool meant = std::get<0>(key) == pause->job && std::get<1>(key) == pause->epoch;
      if (meant && rank.paused_at < 0) rank.pause = true;
    }
  }
}

void SimCluster::on_start(SimWorker& worker, const StartRank& order) {
  if (worker.fences[order.job] >= order.epoch) return;
  const RankKey key = {order.job, order.epoch, order.rank};
  if (const auto exited = worker.exits.find(key); exited != worker.exits.end()) {
    return say(worker, exited->second);
  }
  if (const auto known = worker.ranks.find(key); known != worker.ranks.end()) {
    if (known->second.status.state != RankState::kStarting) {
      say(worker, ready(worker, key));
    }
    return;
  }
  // Two ranks on one device would be two attempts at once.
  for (const auto& [other, rank] : worker.ranks) {
    if (rank.order.device == order.device) {
      violate(fmt::format(
          "device {} of {} given to job {} epoch {} while job {} epoch {} runs there", order.device,
          worker.name, order.job, order.epoch, std::get<0>(other), std::get<1>(other)));
    }
  }
  trace(worker.name, "starts job {} epoch {} rank {}", order.job, order.epoch, order.rank);
  SimRank rank;
  rank.order = order;
  rank.status = {order.job, order.epoch, order.rank, RankState::kStarting, order.restore_step};
  rank.ready_at = now_ + milliseconds_below(1500);
  worker.ranks[key] = std::move(rank);
}

void SimCluster::on_stop(SimWorker& worker, const StopRanks& order) {
  trace(worker.name, "stops job {} up to epoch {}", order.job, order.epoch);
  worker.fences[order.job] = std::max(worker.fences[order.job], order.epoch);
  const auto fenced = [&](const auto& entry) {
    return std::get<0>(entry.first) == order.job && std::get<1>(entry.first) <= order.epoch;
  };
  std::erase_if(worker.ranks, fenced);
  std::erase_if(worker.exits, fenced);
  std::erase_if(worker.segments, [&](const auto& segment) { return fenced(segment.first); });
  say(worker, RanksStopped{order.job, order.epoch});
}

void SimCluster::end_rank(SimWorker& worker, const RankKey& key, int32_t code, int32_t signal) {
  const auto& [job, epoch, rank] = key;
  const RankExited exited{job, epoch, rank, code, signal, "sim"};
  trace(worker.name, "job {} epoch {} rank {} ended with code {} signal {}", job, epoch, rank, code,
        signal);
  worker.ranks.erase(key);
  worker.exits.emplace(key, exited);
  say(worker, exited);
}

RankReady SimCluster::ready(const SimWorker& worker, const RankKey& key) const {
  const auto& [job, epoch, rank] = key;
  const bool strange = options_.strange_data && &worker == workers_.data();
  return {
      job, epoch, rank, worker.name + std::to_string(rank.value), {{"/data", strange ? 1 : 2, {}}}};
}

// All steps of a job are trained on the same data.
void SimCluster::check_data(JobId job, const std::vector<std::pair<SimWorker*, RankKey>>& members) {
  for (const auto& [worker, key] : members) {
    const bool strange = options_.strange_data && worker == workers_.data();
    if (trained_on_strange_data_.try_emplace(job, strange).first->second != strange) {
      violate(fmt::format("job {} trains on other data on {} than before", job, worker->name));
    }
  }
}

// One step of a gang, if all of it is there; its members give up when it is not.
void SimCluster::train(JobId job, Epoch epoch) {
  std::vector<std::pair<SimWorker*, RankKey>> members;
  bool all_begun = true;
  for (SimWorker& worker : workers_) {
    for (auto& [key, rank] : worker.ranks) {
      if (std::get<0>(key) != job || std::get<1>(key) != epoch) continue;
      members.emplace_back(&worker, key);
      all_begun &= rank.begun;
    }
  }
  const auto member = [](const auto& at) -> SimRank& { return at.first->ranks.at(at.second); };
  if (members.size() < world_.at({job, epoch})) {
    for (const auto& at : members) {
      const SimRank& rank = member(at);
      if (rank.begun && rank.status.state == RankState::kTraining && chance(0.3)) {
        end_rank(*at.first, at.second, static_cast<int32_t>(ExitCode::kPeerLost), 0);
      }
    }
    return;
  }
  if (!all_begun) return;
  const int64_t step = member(members[0]).status.step + 1;
  if (step > kSimSteps) {
    for (const auto& at : members) {
      SimRank& rank = member(at);
      if (rank.final_answered) rank.status.state = RankState::kFinished;
    }
    return;
  }
  const auto any = [&](auto condition) {
    return std::any_of(members.begin(), members.end(),
                       [&](const auto& at) { return condition(member(at)); });
  };
  if (any([](const SimRank& rank) { return rank.paused_at >= 0; }) || !chance(0.5)) return;
  const StartRank order = member(members[0]).order;
  check_data(job, members);
  const bool left_out = contains(order.left_out, step);
  const bool spike = options_.spikes.contains(step) && !left_out;
  std::set<int64_t>& trained = trained_by(order);
  if (!left_out && !spike) trained.insert(step);
  const bool pauses = step < kSimSteps && !left_out && !spike &&
                      any([](const SimRank& rank) { return rank.pause; });
  const bool saves =
      (step % kSimCheckpointInterval == 0 && !left_out) || step == kSimSteps || pauses;
  if (saves && !spike) saved_[{job, epoch, step}] = trained;
  for (const auto& at : members) {
    const Rank number = std::get<2>(at.second);
    StepReport report = sim_report(job, epoch, step);
    if (left_out) report.guard.action = GuardPolicy::kSkip;
    if (spike) report.guard = {GuardSignal::kLossSpike, GuardPolicy::kRollback, 9.0, 1.0, 2.0};
    if (number.value == 0) say(*at.first, report);
    if (spike && number.value == 0) count(Fault::kLossSpike);
    if (spike) continue;  // until the coordinator ends the attempt; the daemon says it again
    member(at).status.step = step;
    if (!saves) continue;
    SegmentSaved segment = sim_segment(job, epoch, number, step);
    segment.pauses = pauses;
    if (pauses) member(at).paused_at = step;
    ControlMessage message = segment;
    if (chance(0.05)) {
      count(Fault::kSaveFailed);
      message = SaveFailed{job, epoch, number, step, "disk full"};
    }
    at.first->segments[{at.second, step}] = message;
    say(*at.first, message);
  }
}

std::set<int64_t>& SimCluster::trained_by(const StartRank& order) {
  const auto [at, is_new] = trained_.try_emplace({order.job, order.epoch});
  if (is_new && order.restore_step > 0) {
    const Epoch saver = checkpoints_.at(order.job).at(order.restore_step);
    at->second = saved_.at({order.job, saver, order.restore_step});
  }
  return at->second;
}

// Every step changed the final weights but those that rollbacks left out, which hold every spike.
void SimCluster::check_trained() {
  if (!core_ || !violation_.empty()) return;
  for (const auto& [id, job] : core_->jobs()) {
    if (job.record.state != JobState::kSucceeded) continue;
    if (job.record.guards.rolled_back.size() > options_.spikes.size()) {
      violate(fmt::format("job {}: a spike was rolled back twice", id));
    }
    const std::set<int64_t>& trained = saved_.at({id, checkpoints_[id].at(kSimSteps), kSimSteps});
    for (int64_t step = 1; step <= kSimSteps; ++step) {
      const bool left_out = contains(left_out_[id], step);
      if (trained.contains(step) == left_out) {
        violate(fmt::format("job {}: step {} is {}", id, step,
                            left_out ? "trained, though it is to be left out" : "not trained"));
      }
      if (options_.spikes.contains(step) && !left_out) {
        violate(fmt::format("job {}: the spike of step {} was not left out", id, step));
      }
    }
  }
}

JobSpec SimCluster::spec_of(const std::string& name) const {
  JobSpec spec = sim_spec(name);
  spec.recovery.max_restarts = options_.max_restarts;
  if (options_.scalings > 0.0) spec.parallelism.microbatches *= 2;  // for two replicas
  if (options_.spikes.empty()) return spec;
  spec.guards.loss_spike.policy = GuardPolicy::kRollback;
  spec.guards.rollback_steps = 3;
  spec.guards.max_rollbacks = 1000;
  return spec;
}

// ---- coordinator

void SimCluster::send(OutgoingMessage out) {
  post({false, out.peer, 0, std::move(out.message)});
}

void SimCluster::check(const Effects& effects) {
  for (const OutgoingMessage& out : effects.messages) {
    if (const auto* order = std::get_if<StartRank>(&out.message)) check_start_order(*order);
  }
  for (const JobEvent& event : effects.events) check_drained(event);
  if (effects.jobs.empty()) return;
  for (const auto& [id, job] : core_->jobs()) {
    if (job.record.state == JobState::kSucceeded && !checkpoints_[id].contains(kSimSteps)) {
      violate(fmt::format("job {} succeeded without its final checkpoint on disk", id));
    }
  }
}

// A job is not placed on a worker that is drained, and on one that is being drained only where its
// memory is needed.
void SimCluster::check_drained(const JobEvent& event) {
  if (!event.from || event.state != JobState::kPlacing) return;
  const JobRecord& record = core_->find_job(event.job)->record;
  for (const RankPlacement& at : record.placement) {
    const WorkerRecord& worker = core_->find_worker(at.worker)->record;
    if (worker.drain && (worker.drain_done || !record.restored_from_memory)) {
      violate(fmt::format("job {} is placed on the drained {}", event.job, worker.name));
    }
  }
}

// Where a gang has lost ranks the others make no progress, and a silent worker is not waited for.
// Those of a worker that is lost ended with its lease, which is not simulated here.
bool SimCluster::may_still_run(const SimWorker& worker, JobId job, Epoch epoch) const {
  const auto is_lost = [&](const SimWorker& any) {
    const Worker* const known = core_->find_worker(any.name);
    return known != nullptr && known->state == WorkerState::kLost;
  };
  size_t running = 0;
  for (const SimWorker& any : workers_) {
    if (is_lost(any)) continue;
    running += static_cast<size_t>(
        std::count_if(any.ranks.begin(), any.ranks.end(), [&](const auto& rank) {
          return std::get<0>(rank.first) == job && std::get<1>(rank.first) == epoch;
        }));
  }
  const Worker* const known = core_->find_worker(worker.name);
  if (known == nullptr) return false;
  const CoreConfig defaults;
  const bool silent = now_ - known->last_seen > defaults.silent_beats * defaults.heartbeat_interval;
  return is_lost(worker) ||
         (known->stale.contains(job) && silent && running < world_.at({job, epoch}));
}

// When an epoch starts, no rank of an older one is left but on workers that nobody can reach.
void SimCluster::check_start_order(const StartRank& order) {
  if (order.epoch < started_[order.job]) violate("an epoch lower than one that was started");
  if (order.epoch == started_[order.job]) return;  // repeated, or another rank's
  started_[order.job] = order.epoch;
  world_[{order.job, order.epoch}] = core_->find_job(order.job)->record.placement.size();
  std::vector<StepRange>& left_out = left_out_[order.job];
  if (order.left_out.size() < left_out.size() ||
      !std::equal(left_out.begin(), left_out.end(), order.left_out.begin())) {
    violate(fmt::format("job {} forgets what a rollback left out", order.job));
  }
  left_out = order.left_out;
  for (const SimWorker& worker : workers_) {
    for (const auto& [key, rank] : worker.ranks) {
      const auto& [job, epoch, number] = key;
      if (job != order.job || epoch >= order.epoch) continue;
      if (!may_still_run(worker, job, epoch)) {
        violate(fmt::format("job {} starts epoch {} while rank {} of epoch {} runs on {}", job,
                            order.epoch, number, epoch, worker.name));
      }
    }
  }
}

}  // namespace penstock
