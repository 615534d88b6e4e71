// Recovery from memory: what daemons hold of a failed attempt's ranks, and whether it will do.
#include <algorithm>

#include "coordinator/core/coordinator.h"
#include "coordinator/core/failure.h"

namespace penstock {

// Whether the recovery under way may go on from what the daemons hold: of a failure of processes or
// hosts, not one of the data, nor a restart that means to change something. A start from memory
// that failed before its first step is not tried twice.
bool Coordinator::wants_held_state(const Job& job) {
  const JobRecord& record = job.record;
  const bool failed = record.state == JobState::kRecovering && record.last_failure &&
                      record.reason.code == record.last_failure->reason.code;
  if (!failed || !job.spec.recovery.from_memory || record.proof) return false;
  // What was trained last is damaged, or may be, or is to be taken back.
  if (record.reason.code == kCauseDataCorrupt || record.reason.code == kCauseSilentCorruption ||
      record.guards.rolling_back) {
    return false;
  }
  if (record.reason.code == kCauseWorkerLeft) return false;  // and its memory with it
  const bool stepped = record.last_step && record.last_step->epoch == record.epoch;
  return stepped || !record.restored_from_memory;
}

// What a worker of the placement says it holds of the attempt that it stopped, others' ranks
// included.
void Coordinator::keep_held(Job& job, WorkerId worker, const RanksStopped& message) {
  forget_held(job, worker);
  for (const HeldRank& held : message.held) {
    if (hosted_rank(job, held.rank, worker)) job.held[held.rank] = {worker, held.steps};
  }
  for (const HeldRank& copy : message.copies) {
    if (copy.rank.value < job.world_size()) {
      job.copies[copy.rank].push_back({worker, copy.steps});
    }
  }
  // A rank that left nothing crashed: what others have of it came from it, too.
  for (int32_t rank = 0; rank < std::ssize(job.record.placement); ++rank) {
    const bool ran_here = job.record.placement[rank].worker == worker;
    if (ran_here && !job.held.contains(Rank{rank})) job.untrusted.insert(Rank{rank});
  }
}

void Coordinator::forget_held(Job& job, WorkerId worker) {
  std::erase_if(job.held, [&](const auto& held) { return held.second.worker == worker; });
  for (auto& [rank, copies] : job.copies) {
    std::erase_if(copies, [&](const HeldAt& copy) { return copy.worker == worker; });
  }
}

// Also a worker that is being drained: what is held there is saved first, and then moves.
Coordinator::Usable Coordinator::usable_workers() const {
  Usable usable;
  for (FreeDevices& worker : free_on_workers(true)) {
    usable[worker.worker] = std::move(worker.devices);
  }
  return usable;
}

// Who has a copy of that state, the rank's own worker first.
std::optional<WorkerId> Coordinator::copy_of(const Job& job, Rank rank, int64_t step,
                                             const Usable& usable) {
  const auto copies = job.copies.find(rank);
  if (copies == job.copies.end() || job.untrusted.contains(rank)) return std::nullopt;
  const auto own = job.held.find(rank);
  std::optional<WorkerId> found;
  for (const HeldAt& copy : copies->second) {
    if (!copy.holds(step) || !usable.contains(copy.worker)) continue;
    if (own != job.held.end() && copy.worker == own->second.worker) return copy.worker;
    found = copy.worker;
  }
  return found;
}

// The newest step that every rank's state is held of, or copied, and that is of use: recorded, so
// that none is missing between the records of two attempts; not the last, whose checkpoint only a
// rank that trained it saves; and no older than the newest checkpoint.
std::optional<int64_t> Coordinator::held_step(const Job& job, const Usable& usable) {
  const JobRecord& record = job.record;
  const int64_t least = std::max<int64_t>(1, record.checkpoint ? record.checkpoint->step : 0);
  const int64_t most = std::min(record.highest_step, record.target_steps - 1);
  const auto is_held = [&](Rank rank, int64_t step) {
    const auto held = job.held.find(rank);
    const bool here =
        held != job.held.end() && usable.contains(held->second.worker) && held->second.holds(step);
    return here || copy_of(job, rank, step, usable);
  };
  std::set<int64_t> candidates;  // of rank 0
  if (const auto held = job.held.find(Rank{0}); held != job.held.end()) {
    candidates.insert(held->second.steps.begin(), held->second.steps.end());
  }
  if (const auto copies = job.copies.find(Rank{0}); copies != job.copies.end()) {
    for (const HeldAt& copy : copies->second) {
      candidates.insert(copy.steps.begin(), copy.steps.end());
    }
  }
  for (auto step = candidates.rbegin(); step != candidates.rend(); ++step) {
    if (*step < least || *step > most) continue;
    bool everywhere = true;
    for (int32_t rank = 0; everywhere && rank < job.world_size(); ++rank) {
      everywhere = is_held(Rank{rank}, *step);
    }
    if (everywhere) return *step;
  }
  return std::nullopt;
}

// Every rank where its state is; those whose worker is gone with their copy, or anywhere else.
// Nothing: devices are taken. REQUIRES: `step` is held_step().
std::optional<std::vector<RankPlacement>> Coordinator::held_placement(Job& job,
                                                                      int64_t step) const {
  Usable free = usable_workers();
  job.copied_from.clear();
  std::vector<RankPlacement> placement(job.world_size());
  const auto take = [&](Rank rank, WorkerId worker) {
    std::vector<int32_t>& devices = free[worker];
    if (devices.empty()) return false;
    placement[rank.value] = {worker, devices.front()};
    devices.erase(devices.begin());
    return true;
  };
  for (int32_t number = 0; number < job.world_size(); ++number) {
    const Rank rank{number};
    const auto held = job.held.find(rank);
    const bool stays = held != job.held.end() && free.contains(held->second.worker);
    if (!stays || !held->second.holds(step)) {
      const std::optional<WorkerId> copy = copy_of(job, rank, step, free);
      if (!copy) return std::nullopt;
      job.copied_from[rank] = {*copy, !stays};
    }
    if (stays && !take(rank, held->second.worker)) return std::nullopt;
  }
  for (const auto& [rank, copy] : job.copied_from) {
    if (!copy.rescued) continue;
    if (workers_.at(copy.worker).takes_ranks() && take(rank, copy.worker)) continue;
    std::optional<WorkerId> roomiest;
    for (const auto& [worker, devices] : free) {
      if (!workers_.at(worker).takes_ranks()) continue;
      if (!roomiest || devices.size() > free.at(*roomiest).size()) roomiest = worker;
    }
    if (!roomiest || !take(rank, *roomiest)) return std::nullopt;
  }
  for (const auto& [rank, copy] : job.copied_from) placement[rank.value].state_from = copy.worker;
  return placement;
}

// For the event of the start.
std::string Coordinator::start_source(const Job& job) const {
  const JobRecord& record = job.record;
  if (record.restored_from_memory) {
    return fmt::format("the state of step {}, which the workers held in memory{}",
                       record.restore_step, copies_used(job));
  }
  if (!record.restore_manifest.empty()) {
    return fmt::format("the checkpoint of step {}", record.restore_step);
  }
  const std::string& folder = job.spec.checkpoint.init_from;
  return folder.empty() ? "initial weights" : "the weights in " + folder;
}

// Where the state of ranks is from whose workers are gone.
std::string Coordinator::copies_used(const Job& job) const {
  constexpr int kNamedMax = 8;
  std::string text;
  int count = 0;
  for (const auto& [rank, copy] : job.copied_from) {
    if (!copy.rescued) continue;
    if (++count > kNamedMax) continue;
    text += fmt::format("{} rank {} from a copy in the memory of {}", text.empty() ? ":" : ",",
                        rank, worker_name(copy.worker));
  }
  if (count > kNamedMax) text += fmt::format(", and {} more ranks so", count - kNamedMax);
  return text;
}

// False: the job is to go on from a checkpoint. What is held stays for as long as nothing could
// start anyway for want of devices: a worker that is restarted may bring them.
// REQUIRES: nothing of the job is placed, and no older epoch can run.
bool Coordinator::restore_from_held(Job& job) {
  const std::optional<int64_t> step = held_step(job, usable_workers());
  if (!step || !held_placement(job, *step)) {
    job.copied_from.clear();
    const bool may_come = step && !job.record.suspend && job.record.scale_to == 0 &&
                          !place(job.spec.parallelism, free_on_workers());
    if (!may_come) drop_held(job, {});
    return false;
  }
  JobRecord& record = job.record;
  record.restored_from_memory = true;
  record.restore_manifest.clear();
  record.restore_step = *step;
  job.restore = Restore::kKnown;
  changed(job);
  return true;
}

// A daemon says again what it holds after every new connection: the order to let go of it may have
// been lost, with the connection or with the coordinator that knew of it.
void Coordinator::let_go_of_held(const Worker& worker, const RanksStopped& message) {
  if (!message.holds_any()) return;
  const WorkerId id = worker.record.id;
  if (const auto at = jobs_.find(message.job); at != jobs_.end()) {
    const Job& job = at->second;
    bool needed = std::any_of(job.held.begin(), job.held.end(),
                              [&](const auto& held) { return held.second.worker == id; });
    for (const auto& [rank, copies] : job.copies) {
      needed |= std::any_of(copies.begin(), copies.end(),
                            [&](const HeldAt& copy) { return copy.worker == id; });
    }
    // An attempt that runs there, or is about to say what it left, is told by its own orders.
    const bool of_newest = message.epoch == job.record.epoch && !wants_ranks(job.record.state);
    if (needed || (hosts(job).contains(id) && !of_newest)) return;
  }
  send(id, StopRanks{message.job, message.epoch, 0, "its state is not needed", false});
}

// Nobody needs it any more. The workers in `kept` hear so by what they are told to start, one that
// is away when it is back.
void Coordinator::drop_held(Job& job, const std::set<WorkerId>& kept) {
  std::set<WorkerId> holders;
  for (const auto& [rank, held] : job.held) holders.insert(held.worker);
  for (const auto& [rank, copies] : job.copies) {
    for (const HeldAt& copy : copies) holders.insert(copy.worker);
  }
  job.held.clear();
  job.copies.clear();
  job.untrusted.clear();
  for (const WorkerId worker : holders) {
    if (kept.contains(worker)) continue;
    if (Worker& holder = workers_.at(worker); holder.state != WorkerState::kUp) {
      holder.stale[job.record.id] = job.record.epoch;
    }
    send(worker, StopRanks{job.record.id, job.record.epoch, 0, "its state is not needed", false});
  }
}

}  // namespace penstock
