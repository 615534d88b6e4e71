// Draining: a worker that is to have no ranks, for maintenance. Its jobs pause and move, or wait
// for room elsewhere; it gets nothing new until it is undrained. On record, so that neither a
// restart of this process nor one of the daemon forgets it.
#include <algorithm>

#include "comm/base/counted.h"
#include "coordinator/core/coordinator.h"

namespace penstock {

void Coordinator::on_event(const DrainWorker& drain) {
  const auto named = worker_by_name_.find(drain.worker);
  if (named == worker_by_name_.end()) {
    effects_.answers.push_back(
        {drain.request, not_found(fmt::format("no worker is named \"{}\"", drain.worker)), {}});
    return;
  }
  Worker& worker = workers_.at(named->second);
  effects_.answers.push_back({drain.request, {}, {}});
  if (drain.reason == worker.record.drain) return;  // as it is
  const bool was_drained = worker.record.drain.has_value();
  worker.record.drain = drain.reason;
  worker.record.drain_done = worker.record.drain_done && drain.reason.has_value();
  effects_.workers.push_back(worker.record);
  schedule_needed_ = true;
  if (!drain.reason) {
    return note_cluster("user", {"worker_undrained",
                                 fmt::format("worker {} takes ranks again", worker.record.name)});
  }
  std::set<JobId> moving;
  for (const HostedRank& hosted : worker.hosted) moving.insert(hosted.job);
  note_cluster("user",
               {"worker_draining",
                fmt::format("worker {} is to be drained{}; {} on it", worker.record.name,
                            drain.reason->empty() ? "" : ": " + *drain.reason,
                            moving.empty() ? "nothing runs"
                                           : counted(std::ssize(moving), "job") + " has ranks")});
  if (was_drained) return;
  for (const JobId id : moving) pause_when_wanted(jobs_.at(id));
  conclude_drain(worker);
}

// Idle, and without anything that is still needed of ranks that ran there.
void Coordinator::conclude_drain(Worker& worker) {
  if (!worker.record.drain || worker.record.drain_done) return;
  if (worker.state != WorkerState::kUp || !worker.hosted.empty() || !worker.stale.empty()) return;
  const WorkerId id = worker.record.id;
  const bool holds_state = std::any_of(open_jobs_.begin(), open_jobs_.end(), [&](const JobId job) {
    const auto& held = jobs_.at(job).held;
    return std::any_of(held.begin(), held.end(),
                       [&](const auto& entry) { return entry.second.worker == id; });
  });
  if (holds_state) return;
  worker.record.drain_done = true;
  effects_.workers.push_back(worker.record);
  note_cluster("coordinator",
               {"worker_drained", fmt::format("worker {} is idle, and stays so until penstock "
                                              "undrain {}",
                                              worker.record.name, worker.record.name)});
}

// Of the workers of a job the first that is being drained.
const Worker* Coordinator::drained_host(const Job& job) const {
  for (const WorkerId id : hosts(job)) {
    const Worker& worker = workers_.at(id);
    if (worker.record.drain) return &worker;
  }
  return nullptr;
}

std::string Coordinator::drained_words(const Worker& worker) {
  const std::string& reason = *worker.record.drain;
  return fmt::format("worker {}, which is drained{}", worker.record.name,
                     reason.empty() ? "" : " (" + reason + ")");
}

}  // namespace penstock
