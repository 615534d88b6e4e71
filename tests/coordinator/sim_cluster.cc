#include "tests/coordinator/sim_cluster.h"

#include <algorithm>

#include "comm/base/exit_codes.h"

namespace penstock {
namespace {

constexpr Duration kTick = std::chrono::milliseconds(200);
constexpr Duration kBeat = std::chrono::seconds(1);
}  // namespace

SimCluster::SimCluster(const SimOptions& options)
    : SimulatedCoordinator(options.seed), options_(options) {
  commit_failures_ = 0.05;
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
    if (now_ < faults_end) faults();
    submit_and_cancel();
    suspend_and_resume();
    drain_and_undrain();
    tick_world();
  }
  if (!all_ended()) violate("after a long quiet time not every job has ended:" + states());
  check_trained();
  return violation_;
}

// ---- network

void SimCluster::post(InFlight flight) {
  const bool faulty = now_ - begin_ < options_.fault_time;
  if (faulty && chance(options_.loss)) return;
  const int copies = faulty && chance(options_.repetition) ? 2 : 1;
  for (int i = 0; i < copies; ++i) {
    network_.emplace(now_ + milliseconds_below(faulty ? 400 : 50), flight);
  }
}

void SimCluster::deliver_due() {
  while (!network_.empty() && network_.begin()->first <= now_) {
    const InFlight flight = std::move(network_.extract(network_.begin()).mapped());
    const auto worker = std::find_if(workers_.begin(), workers_.end(), [&](const SimWorker& w) {
      return w.alive && w.peer() == flight.peer;
    });
    // A connection of a process that is gone carries nothing more.
    if (worker == workers_.end() || worker->partitioned_until > now_) continue;
    if (!flight.to_core) {
      on_order(*worker, flight.message);
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
    if (worker.alive && chance(0.004)) {
      trace(worker.name + ": killed");
      kill_worker(worker);
    }
    if (worker.alive && options_.partitions && chance(0.003)) {
      worker.partitioned_until = now_ + milliseconds_below(12'000);
      trace(worker.name + ": cut off");
    }
    if (!worker.ranks.empty() && chance(0.006)) {
      const RankKey victim = worker.ranks.begin()->first;
      end_rank(worker, victim, -1, 9);
    }
  }
  if (core_ && options_.coordinator_crashes && chance(0.006)) {
    crash_core(std::chrono::seconds(6));
    break_connections();
  }
}

// What was under way arrives first, or never.
void SimCluster::break_connections() {
  for (auto& [at, flight] : std::exchange(network_, {})) {
    if (!flight.to_core && chance(0.5)) network_.emplace(now_, std::move(flight));
  }
  deliver_due();
}

void SimCluster::submit_and_cancel() {
  if (!core_) return;
  if (requests_ < static_cast<uint64_t>(options_.job_count) && !core_->workers().empty()) {
    const RequestId request = {++requests_};
    feed(SubmitJob{request, spec_of("job" + std::to_string(request.value))});
  }
  if (std::ssize(accepted_) < options_.job_count &&
      requests_ >= static_cast<uint64_t>(options_.job_count) && chance(0.1)) {
    feed(SubmitJob{{++requests_}, spec_of("again" + std::to_string(requests_))});
  }
  if (accepted_.empty() || !chance(0.003)) return;
  const JobId job = *accepted_.begin();
  if (chance(0.5)) {
    feed(CancelJob{{++requests_}, job, 1000});
  } else {
    ended_.erase(job);
    feed(ResumeJob{{++requests_}, job});
  }
}

void SimCluster::suspend_and_resume() {
  if (!core_ || options_.suspensions + options_.scalings == 0.0) return;
  const bool faulty = now_ - begin_ < options_.fault_time;
  for (const JobId job : std::set<JobId>(accepted_)) {
    if (faulty && options_.scalings > 0.0 && chance(options_.scalings)) {
      feed(ScaleJob{{++requests_}, job, chance(0.5) ? 1 : 2});
    }
    const bool suspended = core_->find_job(job)->record.state == JobState::kSuspended;
    if (suspended && (!faulty || chance(0.05))) {
      feed(ResumeJob{{++requests_}, job});
    } else if (faulty && chance(options_.suspensions)) {
      feed(SuspendJob{{++requests_}, job});
    }
  }
}

void SimCluster::drain_and_undrain() {
  if (!core_ || options_.drains == 0.0) return;
  const bool faulty = now_ - begin_ < options_.fault_time;
  for (const SimWorker& worker : workers_) {
    const Worker* known = core_->find_worker(worker.name);
    if (known == nullptr) continue;
    if (known->record.drain && (!faulty || chance(0.02))) {
      feed(DrainWorker{{++requests_}, worker.name, {}});
    } else if (faulty && chance(options_.drains)) {
      feed(DrainWorker{{++requests_}, worker.name, "maintenance"});
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

// ---- workers

void SimCluster::start_worker(SimWorker& worker) {
  worker.alive = true;
  worker.registered = false;
  worker.incarnation = random_.next() | 1;
  worker.sequence = 0;
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
  post({true, worker.peer(), std::move(message)});
}

void SimCluster::send_register(SimWorker& worker) {
  Register message;
  message.name = worker.name;
  message.incarnation = worker.incarnation;
  message.host = worker.name;
  message.device_count = options_.devices_per_worker;
  for (const auto& [key, rank] : worker.ranks) message.ranks.push_back(rank.status);
  say(worker, message);
}

void SimCluster::tick_worker(SimWorker& worker) {
  for (auto& [key, rank] : worker.ranks) {
    if (rank.status.state != RankState::kStarting || now_ < rank.ready_at) continue;
    rank.status.state = RankState::kReady;
    const auto& [job, epoch, number] = key;
    say(worker, RankReady{job, epoch, number, worker.name + std::to_string(number.value)});
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
      say(worker, RankReady{order.job, order.epoch, order.rank,
                            worker.name + std::to_string(order.rank.value)});
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
  trace(fmt::format("{}: start job {} epoch {} rank {}", worker.name, order.job, order.epoch,
                    order.rank));
  SimRank rank;
  rank.order = order;
  rank.status = {order.job, order.epoch, order.rank, RankState::kStarting, order.restore_step};
  rank.ready_at = now_ + milliseconds_below(1500);
  worker.ranks[key] = std::move(rank);
}

void SimCluster::on_stop(SimWorker& worker, const StopRanks& order) {
  trace(fmt::format("{}: stop job {} epoch {}", worker.name, order.job, order.epoch));
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
  worker.ranks.erase(key);
  worker.exits.emplace(key, exited);
  say(worker, exited);
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
    if (spike) continue;  // until the coordinator ends the attempt; the daemon says it again
    member(at).status.step = step;
    if (!saves) continue;
    SegmentSaved segment = sim_segment(job, epoch, number, step);
    segment.pauses = pauses;
    if (pauses) member(at).paused_at = step;
    ControlMessage message = segment;
    if (step != kSimSteps && chance(0.02))
      message = SaveFailed{job, epoch, number, step, "disk full"};
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
  if (options_.scalings > 0.0) spec.parallelism.microbatches *= 2;  // for two replicas
  if (options_.spikes.empty()) return spec;
  spec.guards.loss_spike.policy = GuardPolicy::kRollback;
  spec.guards.rollback_steps = 3;
  spec.guards.max_rollbacks = 1000;
  return spec;
}

// ---- coordinator

void SimCluster::send(OutgoingMessage out) {
  post({false, out.peer, std::move(out.message)});
}

void SimCluster::check(const Effects& effects) {
  for (const OutgoingMessage& out : effects.messages) {
    if (const auto* order = std::get_if<StartRank>(&out.message)) check_start_order(*order);
  }
  for (const JobEvent& event : effects.events) {
    if (event.sequence != last_event_ + 1) violate("an event number is skipped or used twice");
    last_event_ = event.sequence;
    check_suspended(event);
    check_drained(event);
  }
  for (const StepRecord& step : effects.steps) {
    if (step.epoch != core_->find_job(step.job)->record.epoch) violate("a step of an old epoch");
    if (step.cursor() <= cursors_[step.job]) violate("steps recorded out of order");
    cursors_[step.job] = step.cursor();
  }
  std::set<std::pair<WorkerId, int32_t>> devices;
  for (const auto& [id, job] : core_->jobs()) {
    const JobRecord& record = job.record;
    if (job.placed() && std::ssize(record.placement) != job.world_size()) {
      violate(fmt::format("job {} is placed in part", id));
    }
    if (wants_ranks(record.state) && !job.placed()) violate("a job runs nowhere");
    if (is_final(record.state) && job.placed()) violate("an ended job holds devices");
    for (const RankPlacement& at : record.placement) {
      if (!devices.insert({at.worker, at.device}).second) violate("one device for two ranks");
    }
    if (record.state == JobState::kSucceeded && !checkpoints_[id].contains(kSimSteps)) {
      violate(fmt::format("job {} succeeded without its final checkpoint on disk", id));
    }
    if (const auto ended = ended_.find(id);
        ended != ended_.end() && ended->second != record.state) {
      violate(fmt::format("job {} left its final state", id));
    }
    if (is_final(record.state)) ended_[id] = record.state;
  }
}

// Where a gang has lost ranks the others make no progress, and a silent worker is not waited for.
bool SimCluster::may_still_run(const SimWorker& worker, JobId job, Epoch epoch) const {
  size_t running = 0;
  for (const SimWorker& any : workers_) {
    running += static_cast<size_t>(
        std::count_if(any.ranks.begin(), any.ranks.end(), [&](const auto& rank) {
          return std::get<0>(rank.first) == job && std::get<1>(rank.first) == epoch;
        }));
  }
  const auto known =
      std::find_if(core_->workers().begin(), core_->workers().end(),
                   [&](const auto& entry) { return entry.second.record.name == worker.name; });
  if (known == core_->workers().end()) return false;
  return known->second.state == WorkerState::kLost ||
         (known->second.stale.contains(job) && running < kSimWorldSize);
}

// A job is suspended without devices, and after a pause without having lost a step.
void SimCluster::check_suspended(const JobEvent& event) {
  if (!event.from || event.state != JobState::kSuspended) return;
  const Job& job = *core_->find_job(event.job);
  if (job.placed()) violate(fmt::format("suspended job {} holds devices", event.job));
  const auto& newest = job.record.last_step;
  const bool paused =
      event.from == JobState::kStopping && newest && newest->epoch == job.record.epoch;
  if (paused && (!job.record.checkpoint || job.record.checkpoint->step < newest->step)) {
    violate(fmt::format("job {} is suspended without its step {}", event.job, newest->step));
  }
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
