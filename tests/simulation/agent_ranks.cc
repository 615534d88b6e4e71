// Rank processes of the simulated cluster: what they do, how they end, what is left of them.
#include <signal.h>

#include <algorithm>

#include "tests/simulation/agent_cluster.h"

namespace penstock {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr ExitStatus kKilled{-1, SIGKILL};

constexpr double kSickCrashes = 0.02;  // per tick and rank

ExitStatus ended_with(ExitCode code) {
  return {static_cast<int>(code), 0};
}

}  // namespace

// ---- what the daemon does to them

// The promise: of one job no two epochs can make progress, and none runs beside another but where
// the coordinator has lost a worker.
Result<int32_t> AgentCluster::spawn(Worker& worker, const StartRank& start) {
  const RankKey key = {start.job, start.epoch, start.rank};
  if (faulty_ && chance(options_.failed_spawns)) {
    count(Fault::kSpawnFailed);
    started_.insert(key);
    ended_[key] = now_;
    trace(worker.name, "cannot start {}", to_string(key));
    return resource_exhausted("too many processes");
  }
  trace(worker.name, "starts {}", to_string(key));
  for (const Worker& other : workers_) {
    for (const auto& [running, process] : other.processes) {
      if (process.ends) continue;
      // An order may reach a worker long after it was given up, too.
      const Worker& of_older = running.epoch < start.epoch ? other : worker;
      if (running.job == start.job && running.epoch != start.epoch &&
          must_be_stopped(of_older, start.job)) {
        violate(fmt::format("{} starts on {} while {} runs on {}", to_string(key), worker.name,
                            to_string(running), other.name));
      }
      if (running.job == start.job && running.epoch < start.epoch &&
          can_progress(running.job, running.epoch)) {
        violate(fmt::format("{} starts while every rank of epoch {} still trains", to_string(key),
                            running.epoch));
      }
      if (&other == &worker && process.device == start.device) {
        violate("two ranks on one device of " + worker.name);
      }
    }
  }
  Process process;
  process.pid = ++last_pid_;
  process.device = start.device;
  process.moved_at_ns = now_ns();
  process.hello_at_ns = within(milliseconds(300));
  worker.processes[key] = process;
  started_.insert(key);
  return process.pid;
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

// Every step needs every rank.
bool AgentCluster::can_progress(JobId job, Epoch epoch) const {
  size_t running = 0;
  for (const Worker& worker : workers_) {
    for (const auto& [key, process] : worker.processes) {
      running += key.job == job && key.epoch == epoch && !process.ends && !process.hangs();
    }
  }
  return running == kSimWorldSize;
}

// ---- their lease

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
    trace(worker.name, "the lease of {} is over", to_string(key));
    process.ends = ended_with(ExitCode::kUnreachable);
  }
}

Status AgentCluster::to_rank(Worker& worker, const RankKey& key, const ControlMessage& message) {
  const auto found = worker.processes.find(key);
  if (found == worker.processes.end() || !found->second.bound) return unavailable("no such rank");
  Process& process = found->second;
  if (process.hangs()) return {};  // into its queue, for ever
  process.moved_at_ns = now_ns();
  if (const auto* start = std::get_if<StartRank>(&message)) {
    process.order = *start;
    process.step = start->restore_step;
    process.ready_at_ns = within(seconds(1));
    if (!restore(worker, *start, process)) process.ends = ended_with(ExitCode::kNotFound);
  } else if (const auto* begin = std::get_if<BeginTraining>(&message)) {
    process.begin = *begin;
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

// SIGTERM is heeded some time later, or not at all; a process that is stopped hears only SIGKILL.
void AgentCluster::signal(Worker& worker, const RankKey& key, int number) {
  const auto found = worker.processes.find(key);
  if (found == worker.processes.end() || found->second.ends) return;
  Process& process = found->second;
  if (number == SIGKILL) {
    process.ends = kKilled;
  } else if (!process.hangs() && chance(0.8)) {
    process.gives_up_at_ns = within(milliseconds(500));
  }
}

// ---- what is left of them

// From what the daemon holds or from a checkpoint; false: what it was told to begin with is not
// there.
bool AgentCluster::restore(Worker& worker, const StartRank& start, Process& process) {
  Held& held = worker.memory[{start.job, start.rank}];
  held.epoch = start.epoch;
  if (start.from_memory) {
    ++counts_.memory_starts;
    if (!start.state_from.address.empty()) {
      if (!fetch(start, &process.trained)) return false;
      held.steps = {{start.restore_step, process.trained}};
      return true;
    }
    const auto state = held.steps.find(start.restore_step);
    if (state == held.steps.end()) return false;
    process.trained = state->second;
    held.steps = {{start.restore_step, process.trained}};
    return true;
  }
  held.steps.clear();
  if (start.restore_step == 0) return true;
  const Epoch saver = checkpoints_.at(start.job).at(start.restore_step);
  process.trained = saved_.at({start.job, saver, start.restore_step});
  return true;
}

// The state it was writing is lost, and all of a process that ended in a way nobody understands.
void AgentCluster::leave_memory(Worker& worker, const RankKey& key, const ExitStatus& status) {
  const auto left = worker.memory.find({key.job, key.rank});
  if (left == worker.memory.end()) return;
  Held& held = left->second;
  if (!leaves_sound_state(status.exit_code, status.signal)) {
    held.steps.clear();
    std::erase_if(worker.copies.kept, [&](const auto& entry) {
      return std::get<JobId>(entry.first) == key.job && std::get<Rank>(entry.first) == key.rank;
    });
  } else if (status.signal == SIGKILL && held.steps.size() > 1 && chance(0.3)) {
    held.steps.erase(std::prev(held.steps.end()));
  }
}

// ---- what they do

void AgentCluster::rank_faults(Worker& worker) {
  for (auto& [key, process] : worker.processes) {
    if (process.ends) continue;
    if (chance(options_.rank_kills)) {
      count(Fault::kRankKilled);
      process.ends = kKilled;
    } else if (chance(is_sick(worker) ? kSickCrashes : options_.rank_crashes)) {
      count(Fault::kRankCrashed);
      process.ends = chance(0.5) ? ended_with(ExitCode::kFailure) : ExitStatus{-1, SIGABRT};
    } else if (chance(options_.rank_hangs) && !process.hangs()) {
      count(Fault::kRankHung);
      const bool loads = process.order && !process.ready;
      const bool trains = process.begin && process.step < kSimSteps;
      process.stuck = (loads || trains) && chance(0.5);
      process.stopped = !process.stuck;
      trace(worker.name, "{} is {}", to_string(key), process.stuck ? "stuck" : "stopped");
    } else if (chance(options_.rank_slowness)) {
      count(Fault::kRankSlow);
      process.slow_until_ns = within(options_.longest_slow);
      trace(worker.name, "{} is slow", to_string(key));
    }
  }
}

void AgentCluster::hear_ranks(Worker& worker) {
  while (!worker.inbox.empty()) {
    const auto [key, message] = std::move(worker.inbox.front());
    worker.inbox.pop_front();
    ++counts_.worker_events;
    worker.agent->on_rank_message(now_ns(), key, message);
  }
}

void AgentCluster::advance_processes(Worker& worker) {
  std::vector<RankKey> keys;
  for (const auto& [key, process] : worker.processes) keys.push_back(key);
  for (const RankKey& key : keys) {
    Process& process = worker.processes.at(key);
    const bool gives_up = process.gives_up_at_ns && now_ns() >= *process.gives_up_at_ns;
    if (gives_up && !process.ends && !process.hangs()) {
      process.ends = ended_with(ExitCode::kPreempted);
    }
    if (process.ends) {
      const ExitStatus status = *process.ends;
      trace(worker.name, "{} has ended, code {} signal {}", to_string(key), status.exit_code,
            status.signal);
      worker.processes.erase(key);
      ended_[key] = now_;
      leave_memory(worker, key, status);
      ++counts_.worker_events;
      worker.agent->on_rank_exit(now_ns(), key, status, "sim");
      continue;
    }
    if (process.hangs()) continue;
    if (!process.bound && now_ns() >= process.hello_at_ns) {
      if (!worker.agent->accepts({key.job, key.epoch, key.rank, process.pid})) continue;
      process.bound = true;
      ++counts_.worker_events;
      worker.agent->on_rank_bound(key);
    }
    if (process.order && !process.ready && now_ns() >= process.ready_at_ns) {
      process.ready = true;
      process.moved_at_ns = now_ns();
      worker.inbox.emplace_back(key, RankReady{key.job, key.epoch, key.rank, process.address()});
    }
  }
}

// What trains waits for a rank of its gang that does not move, if there is one.
RankActivity AgentCluster::inspect(const Worker& worker, const RankKey& key) const {
  const Process& process = worker.processes.at(key);
  const int64_t since_moved_ms = (now_ns() - process.moved_at_ns) / 1'000'000;
  RankActivity activity{
      .rank = key.rank,
      .process = process.stopped ? ProcessState::kStopped : ProcessState::kSleeping,
      .recorded = process.bound,
      .state = {.phase = FlightPhase::kLoading},
      .quiet_ms = since_moved_ms};
  if (process.ready) activity.state.phase = FlightPhase::kReady;
  if (!process.begin || process.stopped) return activity;
  activity.state.phase =
      process.step < kSimSteps ? FlightPhase::kTraining : FlightPhase::kCommitting;
  if (process.stuck) {
    activity.process = ProcessState::kRunning;
    return activity;
  }
  activity.quiet_ms = 0;
  if (now_ns() < process.slow_until_ns) return activity;
  for (int32_t rank = 0; rank < static_cast<int32_t>(kSimWorldSize); ++rank) {
    const Process* const peer = find_process({key.job, key.epoch, Rank{rank}});
    if (peer == nullptr || !(peer->hangs() || now_ns() < peer->slow_until_ns)) continue;
    activity.state.peer = rank;
    activity.quiet_ms = since_moved_ms;
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

// ---- training

void AgentCluster::train_gangs() {
  std::map<std::pair<JobId, Epoch>, std::vector<Member>> gangs;
  for (Worker& worker : workers_) {
    for (const auto& [key, process] : worker.processes) {
      if (!process.ends) gangs[{key.job, key.epoch}].emplace_back(&worker, key);
    }
  }
  for (const auto& [attempt, gang] : gangs) train(gang);
}

// One step of a gang that is whole; the members of another notice that a peer is gone.
void AgentCluster::train(const std::vector<Member>& gang) {
  const bool whole = gang.size() == kSimWorldSize;
  if (!whole) lose_peers(gang);
  finish(gang);
  const auto any = [&](auto condition) {
    return std::any_of(gang.begin(), gang.end(),
                       [&](const Member& member) { return condition(process_of(member)); });
  };
  if (any([](const Process& process) { return process.paused_at >= 0; })) return;
  const bool all_train = std::all_of(gang.begin(), gang.end(), [&](const Member& member) {
    const Process& process = process_of(member);
    return process.begin && !process.hangs() && !process.waits &&
           now_ns() >= process.slow_until_ns && process.step < kSimSteps;
  });
  if (!whole || !all_train || !chance(0.3)) return;
  check_gang(gang);
  const int64_t step = process_of(gang[0]).step + 1;
  const bool left_out = contains(process_of(gang[0]).order->left_out, step);
  const bool spike = options_.spikes.contains(step) && !left_out;
  if (spike) count(Fault::kLossSpike);
  const bool pauses = step < kSimSteps && !left_out && !spike &&
                      any([](const Process& process) { return process.pause; });
  for (const Member& member : gang) take_step(member, step, spike, pauses);
}

void AgentCluster::lose_peers(const std::vector<Member>& gang) {
  for (const Member& member : gang) {
    Process& process = process_of(member);
    const bool lost_a_peer = process.begin && process.step < kSimSteps && !process.hangs();
    if (lost_a_peer && chance(0.2)) process.ends = ended_with(ExitCode::kPeerLost);
  }
}

void AgentCluster::finish(const std::vector<Member>& gang) {
  for (const Member& member : gang) {
    Process& process = process_of(member);
    if (process.ends || process.step < kSimSteps || !process.final_committed) continue;
    if (process.hangs()) continue;
    const RankKey& key = member.second;
    member.first->inbox.emplace_back(key, RankFinished{key.job, key.epoch, key.rank, kSimSteps});
    process.ends = ExitStatus{0, 0};
  }
}

// The members of a gang began alike, know each other, and have the same state: that of every step
// so far but those that are to be left out.
void AgentCluster::check_gang(const std::vector<Member>& gang) {
  const Process& first = process_of(gang[0]);
  Trained expected = 0;
  for (int64_t step = 1; step <= first.step; ++step) {
    if (!contains(first.order->left_out, step)) expected |= Trained{1} << step;
  }
  for (const Member& member : gang) {
    const Process& process = process_of(member);
    const auto& [job, epoch, rank] = member.second;
    const StartRank& order = *process.order;
    if (order.seats != first.order->seats) {
      violate(fmt::format("ranks of job {} seat experts differently", job));
    }
    if (order.restore_step != first.order->restore_step ||
        order.from_memory != first.order->from_memory || process.step != first.step) {
      violate(fmt::format("ranks of job {} go on from different steps", job));
    }
    if (order.left_out != first.order->left_out) {
      violate(fmt::format("ranks of job {} leave out different steps", job));
    }
    if (process.trained != expected) {
      violate(fmt::format("rank {} of job {} has trained {:b} when it has to have trained {:b}",
                          rank, job, process.trained, expected));
    }
    for (const Member& peer : gang) {
      const auto number = static_cast<size_t>(peer.second.rank.value);
      if (process.begin->addresses.at(number) != process_of(peer).address()) {
        violate(fmt::format("rank {} of job {} epoch {} looks for rank {} at {}, not at {}", rank,
                            job, epoch, number, process.begin->addresses[number],
                            process_of(peer).address()));
      }
    }
  }
}

void AgentCluster::take_step(const Member& member, int64_t step, bool spike, bool pauses) {
  const auto& [job, epoch, rank] = member.second;
  Process& process = process_of(member);
  const bool left_out = contains(process.order->left_out, step);
  const auto say = [&](ControlMessage message) {
    member.first->inbox.emplace_back(member.second, std::move(message));
  };
  process.moved_at_ns = now_ns();
  StepReport report = sim_report(job, epoch, step);
  if (left_out) report.guard.action = GuardPolicy::kSkip;
  if (spike) report.guard = {GuardSignal::kLossSpike, GuardPolicy::kRollback, 9.0, 1.0, 2.0};
  if (rank.value == 0) say(report);
  process.waits = spike;
  if (spike) return;
  process.step = step;
  if (!left_out) process.trained |= Trained{1} << step;
  std::map<int64_t, Trained>& held = member.first->memory[{job, rank}].steps;
  held[step] = process.trained;
  if (held.size() > 2) held.erase(held.begin());
  take_copy(*member.first, job, rank);
  say(RankProgress{.job = job, .epoch = epoch, .rank = rank, .step = step});
  if (pauses) process.paused_at = step;
  const bool saves =
      (step % kSimCheckpointInterval == 0 && !left_out) || step == kSimSteps || pauses;
  if (!saves) return;
  if (rank.value == 0 && options_.rebalance_threshold > 0.0) say(uneven_loads(member.second, step));
  saved_[{job, epoch, step}] = process.trained;
  if (step != kSimSteps && faulty_ && chance(0.01)) {
    count(Fault::kSaveFailed);
    return say(SaveFailed{job, epoch, rank, step, "disk full"});
  }
  SegmentSaved segment = sim_segment(job, epoch, rank, step);
  segment.pauses = pauses;
  say(segment);
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

}  // namespace penstock
