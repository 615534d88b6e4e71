#include "tests/coordinator/sim_cluster.h"

#include <algorithm>

#include "comm/base/exit_codes.h"
#include "tests/run/spec_text.h"

namespace penstock {
namespace {

constexpr Duration kTick = std::chrono::milliseconds(200);
constexpr Duration kBeat = std::chrono::seconds(1);
constexpr int64_t kSteps = 12;
constexpr int64_t kCheckpointInterval = 4;

JobSpec sim_spec(const std::string& name) {
  JobSpec spec = parse_job_spec(kValidSpec, "sim").value();
  spec.name = name;
  spec.training.steps = kSteps;
  spec.checkpoint.interval = kCheckpointInterval;
  spec.recovery.max_restarts = 1000;
  return spec;
}

std::string manifest_path(JobId job, int64_t step) {
  return "/sim/" + std::to_string(job.value) + "/" + std::to_string(step);
}

}  // namespace

SimCluster::SimCluster(const SimOptions& options) : options_(options), random_(options.seed, 0) {
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
  const auto all_ended = [&] {
    return core_ && std::ssize(acknowledged_) >= options_.job_count &&
           std::all_of(acknowledged_.begin(), acknowledged_.end(),
                       [&](JobId job) { return is_final(core_->find_job(job)->record.state); });
  };
  while (now_ < end && violation_.empty()) {
    if (now_ >= faults_end && all_ended()) break;
    now_ = now_ + kTick;
    if (now_ < faults_end) faults();
    submit_and_cancel();
    tick_world();
  }
  if (!violation_.empty()) return violation_;
  if (!all_ended()) {
    std::string states;
    if (core_) {
      for (const auto& [id, job] : core_->jobs()) {
        states += fmt::format(" job {} {} epoch {}: {};", id, job_state_name(job.record.state),
                              job.record.epoch, job.record.reason.message);
      }
    }
    violate("after a long quiet time not every job has ended:" + states);
  }
  return violation_;
}

int64_t SimCluster::recoveries() const {
  int64_t count = 0;
  for (const auto& [id, job] : core_->jobs()) count += job.record.restarts;
  return count;
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
  if (!core_ && now_ >= core_back_at_) start_core();
  deliver_due();
  while (core_ && !disk_results_.empty() && disk_results_.begin()->first <= now_) {
    feed(disk_results_.extract(disk_results_.begin()).mapped());
  }
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
  if (core_ && options_.coordinator_crashes && chance(0.006)) crash_core();
}

void SimCluster::submit_and_cancel() {
  if (!core_) return;
  if (requests_ < static_cast<uint64_t>(options_.job_count) && !core_->workers().empty()) {
    const RequestId request = {++requests_};
    feed(SubmitJob{request, sim_spec("job" + std::to_string(request.value))});
  }
  if (std::ssize(acknowledged_) < options_.job_count &&
      requests_ >= static_cast<uint64_t>(options_.job_count) && chance(0.1)) {
    feed(SubmitJob{{++requests_}, sim_spec("again" + std::to_string(requests_))});
  }
  if (acknowledged_.empty() || !chance(0.003)) return;
  const JobId job = *acknowledged_.begin();
  if (chance(0.5)) {
    feed(CancelJob{{++requests_}, job, 1000});
  } else {
    ended_.erase(job);
    feed(ResumeJob{{++requests_}, job});
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
      say(worker, RankFinished{job, epoch, number, kSteps});
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
      if (meant && outcome->step == kSteps) rank.final_answered = true;
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
  size_t world = 0;
  for (SimWorker& worker : workers_) {
    for (auto& [key, rank] : worker.ranks) {
      if (std::get<0>(key) != job || std::get<1>(key) != epoch) continue;
      members.emplace_back(&worker, key);
      all_begun &= rank.begun;
      world = 4;
    }
  }
  const auto member = [](const auto& at) -> SimRank& { return at.first->ranks.at(at.second); };
  if (members.size() < world) {
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
  if (step > kSteps) {
    for (const auto& at : members) {
      SimRank& rank = member(at);
      if (rank.final_answered) rank.status.state = RankState::kFinished;
    }
    return;
  }
  if (!chance(0.5)) return;
  const bool saves = step % kCheckpointInterval == 0 || step == kSteps;
  for (const auto& at : members) {
    member(at).status.step = step;
    const Rank number = std::get<2>(at.second);
    if (number.value == 0) {
      StepReport report;
      report.job = job;
      report.epoch = epoch;
      report.step = step;
      report.loss = 1.0 / static_cast<double>(step);
      report.tokens = 8;
      report.step_seconds = 0.2;
      say(*at.first, report);
    }
    if (!saves) continue;
    SegmentSaved saved;
    saved.job = job;
    saved.epoch = epoch;
    saved.rank = number;
    saved.step = step;
    saved.file = "s";
    ControlMessage message = saved;
    if (step != kSteps && chance(0.02)) message = SaveFailed{job, epoch, number, step, "disk full"};
    at.first->segments[{at.second, step}] = message;
    say(*at.first, message);
  }
}

// ---- coordinator

void SimCluster::start_core() {
  StoredState stored;
  for (const auto& [key, value] : store_) {
    for (const std::string_view prefix :
         {kJobPrefix, kSpecPrefix, kWorkerPrefix, kEvaluationPrefix}) {
      if (key.starts_with(prefix)) stored.records.push_back({key, value});
    }
    if (key.starts_with(kEventPrefix)) stored.last_event_sequence = decode_event(value)->sequence;
  }
  CoreConfig config;
  config.checkpoint_root = "/sim";
  core_.emplace(config);
  Result<Effects> effects = core_->start(now_, stored);
  if (!effects.ok()) return violate("restart from records: " + effects.status().to_string());
  for (const JobId job : acknowledged_) {
    if (!core_->find_job(job)) violate(fmt::format("acknowledged job {} is lost", job));
  }
  apply(*std::move(effects));
}

// What was synced survives; of what came after, any prefix may.
void SimCluster::crash_core() {
  trace("core: crash");
  core_.reset();
  core_back_at_ = now_ + milliseconds_below(6000);
  const size_t kept = random_.below(unsynced_.size() + 1);
  for (size_t i = 0; i < kept; ++i) store_[unsynced_[i].key] = unsynced_[i].value;
  unsynced_.clear();
  // Its connections break: what was under way arrives first, or never.
  for (auto& [at, flight] : std::exchange(network_, {})) {
    if (!flight.to_core && chance(0.5)) network_.emplace(now_, std::move(flight));
  }
  deliver_due();
  // A commit under way may have reached the disk, but nobody hears of it.
  for (const auto& [at, event] : disk_results_) {
    const auto* done = std::get_if<CheckpointDone>(&event);
    if (done && done->status.ok() && chance(0.5)) disk_[done->job][done->step] = done->epoch;
  }
  disk_results_.clear();
}

void SimCluster::feed(const Event& event) {
  ++core_steps_;
  if (const auto* done = std::get_if<CheckpointDone>(&event); done && done->status.ok()) {
    disk_[done->job][done->step] = done->epoch;
  }
  Event given = event;
  if (auto* found = std::get_if<CheckpointFound>(&given)) {
    const auto& steps = disk_[found->job];
    if (!steps.empty()) {
      found->step = steps.rbegin()->first;
      found->manifest = manifest_path(found->job, found->step);
    }
  }
  apply(core_->step(now_, given));
}

void SimCluster::apply(Effects effects) {
  for (Record& record : records_of(effects)) unsynced_.push_back(std::move(record));
  if (effects.must_sync()) {
    for (Record& record : unsynced_) store_[record.key] = std::move(record.value);
    unsynced_.clear();
  }
  check(effects);
  for (OutgoingMessage& out : effects.messages) post({false, out.peer, std::move(out.message)});
  for (const CommitCheckpoint& commit : effects.commits) {
    CheckpointDone done;
    done.job = commit.job;
    done.epoch = commit.epoch;
    done.step = commit.step;
    if (chance(0.05) && commit.step != kSteps) done.status = resource_exhausted("disk full");
    done.checkpoint.manifest = manifest_path(commit.job, commit.step);
    emit_from_disk(milliseconds_below(1000), done);
  }
  for (const FindCheckpoint& find : effects.finds) {
    CheckpointFound found;
    found.job = find.job;
    emit_from_disk(milliseconds_below(300), found);
  }
  for (const Answer& answer : effects.answers) {
    if (answer.status.ok()) acknowledged_.insert(answer.job);
  }
}

// One thread does the disk's work, in order.
void SimCluster::emit_from_disk(Duration takes, Event event) {
  disk_free_at_ = std::max(now_, disk_free_at_) + takes;
  disk_results_.emplace(disk_free_at_, std::move(event));
}

void SimCluster::violate(const std::string& what) {
  if (!violation_.empty()) return;
  violation_ = fmt::format("at {:.1f} s: {}", to_seconds(now_ - begin_), what);
  for (const std::string& line : trace_) violation_ += "\n  " + line;
}

void SimCluster::trace(const std::string& line) {
  trace_.push_back(fmt::format("{:.1f} s {}", to_seconds(now_ - begin_), line));
  if (trace_.size() > 60) trace_.pop_front();
}

void SimCluster::check(const Effects& effects) {
  for (const OutgoingMessage& out : effects.messages) {
    if (const auto* order = std::get_if<StartRank>(&out.message)) check_start_order(*order);
  }
  for (const JobEvent& event : effects.events) {
    trace(fmt::format("core: job {} epoch {} {}: {}", event.job, event.epoch, event.reason.code,
                      event.reason.message));
    if (event.sequence != last_event_ + 1) violate("an event number is skipped or used twice");
    last_event_ = event.sequence;
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
    if (record.state == JobState::kSucceeded && !disk_[id].contains(kSteps)) {
      violate(fmt::format("job {} succeeded without its final checkpoint on disk", id));
    }
    if (const auto ended = ended_.find(id);
        ended != ended_.end() && ended->second != record.state) {
      violate(fmt::format("job {} left its final state", id));
    }
    if (is_final(record.state)) ended_[id] = record.state;
  }
}

// When an epoch starts, no rank of an older one is left but on workers that nobody can reach.
void SimCluster::check_start_order(const StartRank& order) {
  if (order.epoch < started_[order.job]) violate("an epoch lower than one that was started");
  if (order.epoch == started_[order.job]) return;  // repeated, or another rank's
  started_[order.job] = order.epoch;
  for (const SimWorker& worker : workers_) {
    for (const auto& [key, rank] : worker.ranks) {
      const auto& [job, epoch, number] = key;
      if (job != order.job || epoch >= order.epoch) continue;
      const bool lost =
          std::any_of(core_->workers().begin(), core_->workers().end(), [&](const auto& known) {
            return known.second.record.name == worker.name &&
                   known.second.state == WorkerState::kLost;
          });
      if (!lost) {
        violate(fmt::format("job {} starts epoch {} while rank {} of epoch {} runs on {}", job,
                            order.epoch, number, epoch, worker.name));
      }
    }
  }
}

}  // namespace penstock
