// Draining: a worker that is to have no ranks, for maintenance. Its jobs pause and move, or wait
// for room elsewhere; it gets nothing new until it is undrained. On record, so that neither a
// restart of this process nor one of the daemon forgets it.
//
// A daemon that is asked to end is drained likewise, and released when it is idle; that is not on
// record, since the daemon says it again and again.
#include <algorithm>

#include "comm/base/counted.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/core/failure.h"

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

// Without ranks, and without anything that is still needed of ranks that ran there.
bool Coordinator::is_idle(const Worker& worker) const {
  if (worker.state != WorkerState::kUp || !worker.hosted.empty() || !worker.stale.empty()) {
    return false;
  }
  const WorkerId id = worker.record.id;
  return std::none_of(open_jobs_.begin(), open_jobs_.end(), [&](const JobId job) {
    const auto& held = jobs_.at(job).held;
    return std::any_of(held.begin(), held.end(),
                       [&](const auto& entry) { return entry.second.worker == id; });
  });
}

void Coordinator::conclude_drain(Worker& worker) {
  release_when_idle(worker);
  if (!worker.record.drain || worker.record.drain_done || !is_idle(worker)) return;
  worker.record.drain_done = true;
  effects_.workers.push_back(worker.record);
  note_cluster("coordinator",
               {"worker_drained", fmt::format("worker {} is idle, and stays so until penstock "
                                              "undrain {}",
                                              worker.record.name, worker.record.name)});
}

void Coordinator::release_when_idle(const Worker& worker) {
  if (worker.leaving && is_idle(worker)) send(worker.record.id, WorkerReleased{worker.record.id});
}

// Its daemon was asked to end: as a drain, until then.
void Coordinator::on_message(Worker& worker, const WorkerLeaving& message) {
  if (message.incarnation != worker.record.incarnation) return;
  if (message.left) return on_left(worker);
  if (!worker.leaving) {
    worker.leaving = true;
    schedule_needed_ = true;
    std::set<JobId> moving;
    for (const HostedRank& hosted : worker.hosted) moving.insert(hosted.job);
    note_cluster("worker " + worker.record.name,
                 {"worker_leaving",
                  fmt::format("worker {} is asked to end; {} on it", worker.record.name,
                              moving.empty() ? "nothing runs"
                                             : counted(std::ssize(moving), "job") + " has ranks")});
    for (const JobId id : moving) pause_when_wanted(jobs_.at(id));
  }
  release_when_idle(worker);
}

// None of its ranks runs any more: nothing is to be waited for.
void Coordinator::on_left(Worker& worker) {
  const std::string& name = worker.record.name;
  worker.state = WorkerState::kLost;
  worker.record.lost = true;
  worker.stale.clear();
  effects_.workers.push_back(worker.record);
  note_cluster("worker " + name,
               {"worker_left", fmt::format("worker {} has ended, as it was asked to", name)});
  for (const JobId id : std::set<JobId>(open_jobs_)) {
    Job& job = jobs_.at(id);
    if (!hosts(job).contains(worker.record.id)) continue;
    Failure failure;
    failure.reason = {kCauseWorkerLeft,
                      fmt::format("worker {} was ended before the job had saved", name)};
    failure.worker = name;
    fail(job, std::move(failure));
    worker_stopped(job, worker.record.id);
  }
  schedule_needed_ = true;
}

// Of the workers of a job the first that is to have no ranks.
const Worker* Coordinator::drained_host(const Job& job) const {
  for (const WorkerId id : hosts(job)) {
    const Worker& worker = workers_.at(id);
    if (worker.record.drain || worker.record.quarantine || worker.leaving) return &worker;
  }
  return nullptr;
}

std::string Coordinator::drained_words(const Worker& worker) {
  if (const auto& quarantine = worker.record.quarantine; quarantine && !worker.record.drain) {
    return fmt::format("worker {}, which is in quarantine ({})", worker.record.name,
                       quarantine->reason.message);
  }
  if (!worker.record.drain) {
    return fmt::format("worker {}, which is asked to end", worker.record.name);
  }
  const std::string& reason = *worker.record.drain;
  return fmt::format("worker {}, which is drained{}", worker.record.name,
                     reason.empty() ? "" : " (" + reason + ")");
}

}  // namespace penstock
