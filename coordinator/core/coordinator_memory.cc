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

// What a worker of the placement says it holds of the attempt that it stopped.
void Coordinator::keep_held(Job& job, WorkerId worker, const std::vector<HeldRank>& ranks) {
  for (const HeldRank& held : ranks) {
    if (hosted_rank(job, held.rank, worker)) job.held[held.rank] = {worker, held.steps};
  }
}

// The newest step that every rank's state is held of, and that is of use: recorded, so that none is
// missing between the records of two attempts; not the last, whose checkpoint only a rank that
// trained it saves; and no older than the newest checkpoint.
std::optional<int64_t> Coordinator::held_step(const Job& job) {
  const JobRecord& record = job.record;
  if (std::ssize(job.held) != job.world_size()) return std::nullopt;
  const int64_t least = std::max<int64_t>(1, record.checkpoint ? record.checkpoint->step : 0);
  const int64_t most = std::min(record.highest_step, record.target_steps - 1);
  const std::vector<int64_t>& candidates = job.held.begin()->second.steps;
  std::optional<int64_t> newest;
  for (const int64_t step : candidates) {
    const bool everywhere = std::all_of(job.held.begin(), job.held.end(), [&](const auto& entry) {
      const std::vector<int64_t>& steps = entry.second.steps;
      return std::find(steps.begin(), steps.end(), step) != steps.end();
    });
    if (everywhere && step >= least && step <= most) newest = std::max(newest.value_or(0), step);
  }
  return newest;
}

// Every rank where its state is; nullopt: some worker is away, or its devices are taken. Also on a
// worker that is being drained: what is held there is saved first, and then moves.
std::optional<std::vector<RankPlacement>> Coordinator::held_placement(const Job& job) const {
  std::map<WorkerId, std::vector<int32_t>> free;
  for (FreeDevices& worker : free_on_workers(true)) free[worker.worker] = std::move(worker.devices);
  std::vector<RankPlacement> placement;
  for (const auto& [rank, held] : job.held) {
    std::vector<int32_t>& devices = free[held.worker];
    if (devices.empty()) return std::nullopt;
    placement.push_back({held.worker, devices.front()});
    devices.erase(devices.begin());
  }
  return placement;
}

// REQUIRES: nothing of the job is placed, and no older epoch can run.
bool Coordinator::restore_from_held(Job& job) {
  const std::optional<int64_t> step = held_step(job);
  if (!step || !held_placement(job)) {
    drop_held(job, {});
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
  if (message.held.empty()) return;
  const WorkerId id = worker.record.id;
  if (const auto at = jobs_.find(message.job); at != jobs_.end()) {
    const Job& job = at->second;
    const bool needed = std::any_of(job.held.begin(), job.held.end(),
                                    [&](const auto& held) { return held.second.worker == id; });
    if (needed || hosts(job).contains(id)) return;  // an attempt that runs there says it, too
  }
  send(id, StopRanks{message.job, message.epoch, 0, "its state is not needed", false});
}

// Nobody needs it any more. The workers in `kept` hear so by what they are told to start, one that
// is away when it is back.
void Coordinator::drop_held(Job& job, const std::set<WorkerId>& kept) {
  std::set<WorkerId> holders;
  for (const auto& [rank, held] : job.held) holders.insert(held.worker);
  job.held.clear();
  for (const WorkerId worker : holders) {
    if (kept.contains(worker)) continue;
    if (Worker& holder = workers_.at(worker); holder.state != WorkerState::kUp) {
      holder.stale[job.record.id] = job.record.epoch;
    }
    send(worker, StopRanks{job.record.id, job.record.epoch, 0, "its state is not needed", false});
  }
}

}  // namespace penstock
