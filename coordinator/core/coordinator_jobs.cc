// The state machine of jobs: transitions, placement, epochs, failure, stopping.
#include <algorithm>

#include "comm/base/check.h"
#include "comm/base/counted.h"
#include "comm/run/layout.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/core/failure.h"
#include "coordinator/core/placement.h"
#include "coordinator/plan/schedule.h"

namespace penstock {
namespace {

// Ranks that finished are about to exit by themselves.
constexpr int64_t kFinishedGraceMs = 10'000;

}  // namespace

void Coordinator::transition(Job& job, JobState to, std::string actor, Reason reason,
                             std::optional<Rank> rank) {
  JobEvent event = event_of(job, std::move(actor), rank);
  event.from = job.record.state;
  event.state = to;
  event.reason = reason;
  append_event(std::move(event));

  job.record.state = to;
  job.record.reason = std::move(reason);
  if (is_final(to)) {
    job.record.finished = now_;
    job.record.rebalance = false;
    job.record.suspend = false;
    job.record.scale_to = 0;
    drop_proof(job);
    drop_held(job, {});
    job.loads.clear();
    open_jobs_.erase(job.record.id);
  } else {
    if (to == JobState::kSuspended) drop_held(job, {});
    job.record.finished.reset();
    open_jobs_.insert(job.record.id);
  }
  changed(job);
  schedule_needed_ = true;
}

// ---- placing

// Recovering jobs first, then the queue, each in order of submission. A job that the cluster could
// run but not now holds back those behind it, so that small jobs cannot starve a large one; a job
// that even the idle cluster could not run now (workers are lost) does not.
void Coordinator::schedule() {
  std::vector<Job*> waiting;
  for (const JobState state : {JobState::kRecovering, JobState::kQueued}) {
    for (const JobId id : open_jobs_) {
      if (Job& job = jobs_.at(id); job.record.state == state) waiting.push_back(&job);
    }
  }
  int64_t devices_up = 0;
  for (const auto& [id, worker] : workers_) {
    if (worker.takes_ranks() || is_being_checked(worker)) devices_up += worker.record.device_count;
  }
  const Job* blocker = nullptr;
  for (Job* job : waiting) {
    if (!ready_to_place(*job)) continue;
    if (blocker) {
      wait(*job, {"waiting_in_queue",
                  fmt::format("waits behind job {} \"{}\", which needs {}", blocker->record.id,
                              blocker->record.name, counted(blocker->world_size(), "device"))});
      continue;
    }
    auto placement = job->record.restored_from_memory
                         ? held_placement(*job, job->record.restore_step)
                         : place(job->spec.parallelism, free_on_workers());
    if (!placement) placement = place_narrower(*job);
    if (placement) {
      start_epoch(*job, *std::move(placement));
      continue;
    }
    wait(*job, {"waiting_for_devices", why_no_room(*job)});
    if (job->world_size() <= devices_up) blocker = job;
  }
}

std::string Coordinator::why_no_room(const Job& job) const {
  int64_t devices = 0;
  int64_t drained = 0;
  int64_t quarantined = 0;
  int64_t checked = 0;
  size_t free = 0;
  for (const auto& [id, worker] : workers_) {
    if (worker.state != WorkerState::kUp) continue;
    int64_t& others = worker.is_trusted()        ? checked
                      : worker.record.quarantine ? quarantined
                                                 : drained;
    (worker.takes_ranks() ? devices : others) += worker.record.device_count;
  }
  const auto more = [](int64_t count, const char* where) {
    return count == 0 ? "" : fmt::format("; {} more on {}", counted(count, "device"), where);
  };
  for (const FreeDevices& worker : free_on_workers()) free += worker.devices.size();
  return fmt::format("needs {}; of the {} on workers that are up, {} free{}{}{}",
                     counted(job.world_size(), "device"), counted(devices, "device"),
                     free == 1 ? "1 is" : fmt::format("{} are", free),
                     more(drained, "drained workers"), more(quarantined, "workers in quarantine"),
                     more(checked, "workers that are being checked"));
}

void Coordinator::wait(Job& job, Reason reason) {
  if (job.record.reason == reason) return;
  if (job.record.reason.code != reason.code) note(job, "coordinator", reason);
  job.record.reason = std::move(reason);
  changed(job);
}

bool Coordinator::ready_to_place(Job& job) {
  if (job.placed() || suspend_unplaced(job)) return false;
  scale_unplaced(job);
  if (now_ < job.place_after) return false;
  if (job.record.epoch.value == 0) {
    job.restore = Restore::kKnown;  // nothing can have been saved yet, and nothing can run
  } else if (std::any_of(workers_.begin(), workers_.end(), [&](const auto& entry) {
               const Worker& worker = entry.second;
               return worker.state == WorkerState::kExpected ||
                      (worker.state == WorkerState::kUp && !is_silent(worker) &&
                       worker.stale.contains(job.record.id));
             })) {
    return false;  // a rank of an older epoch may still run there
  }
  if (awaits_check(job)) return false;
  // Until the start, what is held may become unreachable, or its devices be taken.
  const bool held =
      (!job.held.empty() || !job.copies.empty()) && job.restore != Restore::kSearching;
  if (held && !restore_from_held(job) && job.record.restored_from_memory) {
    job.restore = Restore::kUnknown;
  }
  if (suspend_unplaced(job)) return false;
  scale_unplaced(job);
  if (job.restore == Restore::kUnknown) {
    const bool refused_by_rank =
        job.record.last_failure && job.record.last_failure->reason.code == kCauseDataCorrupt;
    job.restore = Restore::kSearching;
    FindCheckpoint find{job.record.id, job.record.checkpoint_dir, refused_by_rank};
    find.number = ++job.searches;
    find.rolled_back = job.record.guards.rolled_back;
    if (job.record.guards.rolling_back) {
      find.before = find.rolled_back.back().steps;
      find.rolled_back.pop_back();
    }
    if (const auto& proof = job.record.proof) {
      find.steps_within = {job.record.rebalanced_step, proof->through - proof->steps};
    }
    effects_.finds.push_back(std::move(find));
  }
  return job.restore == Restore::kKnown;
}

void Coordinator::on_event(const CheckpointFound& found) {
  const auto at = jobs_.find(found.job);
  if (at == jobs_.end() || at->second.restore != Restore::kSearching) return;
  Job& job = at->second;
  if (found.number != job.searches) return;  // it was asked anew since
  JobRecord& record = job.record;
  job.restore = Restore::kUnknown;
  const bool waits = record.state == JobState::kQueued || record.state == JobState::kRecovering;
  if (!waits) return;
  schedule_needed_ = true;
  if (!found.status.ok()) {
    job.place_after = now_ + config_.backoff_first;
    wait(job, {"checkpoints_unreadable", found.status.message()});
    return;
  }
  for (const std::string& refused : found.refused) {
    note(job, "coordinator", {"checkpoint_refused", refused});
  }
  if (record.proof) return place_proof(job, found);
  const auto give_up = [&](Reason reason) {
    stop_epoch(job, JobState::kStopping, JobState::kFailed, 0, "coordinator", std::move(reason));
  };
  if (found.manifest.empty() && !found.refused.empty()) {
    return give_up(
        {"no_usable_checkpoint", fmt::format("no checkpoint in {} can be restored: {}",
                                             record.checkpoint_dir, found.refused.front())});
  }
  const bool data_is_to_blame = record.last_failure &&
                                record.last_failure->reason.code == kCauseDataCorrupt &&
                                found.manifest == record.restore_manifest;
  if (data_is_to_blame) return give_up(record.last_failure->reason);
  const bool newest_gone = record.checkpoint && found.step < record.checkpoint->step &&
                           std::find(found.steps.begin(), found.steps.end(),
                                     record.checkpoint->step) == found.steps.end();
  if (found.refused.empty() && newest_gone) {
    // A file system that is not mounted looks like an empty directory: training from the start
    // again must not be what follows.
    const std::string gone =
        fmt::format("the checkpoint of step {}, which was committed, is not in {}",
                    record.checkpoint->step, record.checkpoint_dir);
    if (found.manifest.empty()) {
      job.place_after = now_ + config_.backoff_first;
      return wait(job, {"checkpoint_missing",
                        gone + "; mount or restore that directory, or cancel the job"});
    }
    note(job, "coordinator",
         {"checkpoint_missing", fmt::format("{}; going on from step {}", gone, found.step)});
  }
  record.restore_manifest = found.manifest;
  record.restore_step = found.step;
  record.restored_from_memory = false;
  if (found.manifest.empty()) {
    record.checkpoint.reset();
  } else if (!record.checkpoint || record.checkpoint->manifest != found.manifest) {
    record.checkpoint.emplace();
    record.checkpoint->step = found.step;
    record.checkpoint->manifest = found.manifest;
  }
  settle_rollback(job, found);
  if (record.checkpoint && record.checkpoint->step >= record.target_steps) {
    // Committed, but the coordinator went down before it could say so.
    return stop_epoch(job, JobState::kStopping, JobState::kSucceeded, 0, "coordinator",
                      {"succeeded", fmt::format("trained {}; the final checkpoint is committed",
                                                counted(record.target_steps, "step"))});
  }
  job.restore = Restore::kKnown;
  changed(job);
}

// `drained_too`: those that are being drained, as long as something is needed of them.
std::vector<FreeDevices> Coordinator::free_on_workers(bool drained_too) const {
  std::vector<FreeDevices> free;
  for (const auto& [id, worker] : workers_) {
    const bool needed =
        drained_too && worker.state == WorkerState::kUp && !worker.record.drain_done;
    if ((worker.takes_ranks() || needed) && worker.stale.empty() && !is_silent(worker)) {
      free.push_back({id, free_devices(id)});
    }
  }
  return free;
}

void Coordinator::hold_devices(const Job& job) {
  for (int32_t rank = 0; rank < std::ssize(job.record.placement); ++rank) {
    const RankPlacement& at = job.record.placement[rank];
    workers_.at(at.worker).hosted.push_back({job.record.id, Rank{rank}, at.device});
  }
}

void Coordinator::release_devices(Job& job) {
  PENSTOCK_CHECK(job.rounds.empty());  // given up when the attempt was, and commits are over
  for (const WorkerId id : hosts(job)) {
    std::erase_if(workers_.at(id).hosted,
                  [&](const HostedRank& hosted) { return hosted.job == job.record.id; });
  }
  job.record.placement.clear();
  job.ranks.clear();
  job.mirror = {};
  forget_pace(job);
  job.failed_rounds.clear();
  changed(job);
  schedule_needed_ = true;
}

void Coordinator::start_epoch(Job& job, std::vector<RankPlacement> placement) {
  PENSTOCK_CHECK(!job.placed() && job.awaiting.empty() && job.restore == Restore::kKnown);
  JobRecord& record = job.record;
  record.placement = std::move(placement);
  drop_held(job, hosts(job));  // of the epoch before
  ++record.epoch.value;
  hold_devices(job);
  job.ranks.assign(record.placement.size(), {});
  if (!record.started && !job.data.empty()) {  // nothing was trained on what was found before
    job.data.clear();
    effects_.data.push_back({record.id, {}});
  }
  job.recent_steps.clear();
  job.pause_after = {};
  job.saves = {};
  choose_interval(job);
  job.epoch_began = now_;
  job.ordered_at = now_;
  heard_of(job);
  std::string where;
  for (const WorkerId worker : hosts(job)) {
    where += (where.empty() ? "" : ", ") + worker_name(worker);
  }
  transition(
      job, JobState::kPlacing, "coordinator",
      {"placed", fmt::format("{} on {}", counted(std::ssize(record.placement), "rank"), where)});
  transition(job, JobState::kStarting, "coordinator",
             {"starting", "starting from " + start_source(job)});
  for (int32_t rank = 0; rank < std::ssize(record.placement); ++rank) send_start(job, Rank{rank});
}

void Coordinator::send_start(const Job& job, Rank rank) {
  const JobRecord& record = job.record;
  const RankPlacement& at = record.placement[rank.value];
  const int64_t pipeline_index = grid_position(job.spec.parallelism, rank).pipeline_index;
  StartRank order;
  order.job = record.id;
  order.epoch = record.epoch;
  order.rank = rank;
  order.device = at.device;
  order.spec_json = to_json(job.spec);
  order.program = make_program(job.spec.parallelism, pipeline_index).value();
  order.checkpoint_dir = record.checkpoint_dir;
  order.restore_manifest = record.restore_manifest;
  order.restore_step = record.restore_step;
  order.from_memory = record.restored_from_memory;
  if (at.state_from.value != 0) order.state_from = workers_.at(at.state_from).state_place;
  // That worker has not registered with this coordinator yet: repeated when it has.
  if (at.state_from.value != 0 && order.state_from.address.empty()) return;
  order.saved_step = record.checkpoint ? record.checkpoint->step : 0;
  order.first_unreported_step = record.highest_step + 1;
  order.seats = seats_for(job, pipeline_index);
  if (record.saving) order.save_interval = save_interval_of(job);
  order.left_out = left_out_of(job);
  send(at.worker, std::move(order));
}

// STARTING, LOADING, RUNNING follow from what is known of the ranks.
void Coordinator::advance(Job& job) {
  const auto all = [&](auto condition) {
    return std::all_of(job.ranks.begin(), job.ranks.end(), condition);
  };
  if (job.record.state == JobState::kStarting && all([](const RankView& r) { return r.seen; })) {
    transition(job, JobState::kLoading, "coordinator",
               {"loading", "every rank process runs and loads"});
  }
  if (job.record.state == JobState::kLoading &&
      all([](const RankView& r) { return r.address.has_value(); })) {
    begin_training(job);
  }
}

void Coordinator::begin_training(Job& job) {
  heard_of(job);
  forget_pace(job);
  if (!job.record.started) job.record.started = now_;
  job.ordered_at = now_;
  transition(job, JobState::kRunning, "coordinator", {"running", "every rank is ready and trains"});
  for (const WorkerId worker : hosts(job)) send_begin(job, worker);
  pause_when_wanted(job);
}

void Coordinator::send_begin(const Job& job, WorkerId worker) {
  BeginTraining order{job.record.id, job.record.epoch, {}};
  for (const RankView& rank : job.ranks) order.addresses.push_back(rank.address.value());
  send(worker, std::move(order));
}

// ---- failing and stopping

void Coordinator::fail(Job& job, Failure failure) {
  JobRecord& record = job.record;
  failure.step = record.last_step ? record.last_step->step : record.restore_step;
  if (!wants_ranks(record.state)) {
    // The first report of a failure may come from a rank that only lost its peer. The cause arrives
    // later.
    const bool stands_for_cause = record.last_failure &&
                                  record.last_failure->reason.code == kCausePeerLost &&
                                  failure.reason.code != kCausePeerLost;
    const bool failing =
        record.state == JobState::kRecovering ||
        (record.state == JobState::kStopping && record.outcome == JobState::kFailed);
    if (!job.placed() || !failing || !stands_for_cause) return;
    const Reason cause = failure.reason;
    const std::optional<Rank> rank = failure.rank;
    const bool fatal = failure.fatal;
    record.last_failure = std::move(failure);
    if (fatal && record.state == JobState::kRecovering) {
      record.outcome = JobState::kFailed;
      return transition(job, JobState::kStopping, "worker " + record.last_failure->worker, cause,
                        rank);
    }
    note(job, "worker " + record.last_failure->worker, cause, rank);
    record.reason = cause;
    return changed(job);
  }
  // Of a replay the final checkpoint may be from before it: then there is something to fail at.
  const bool replayed = record.proof || failure.reason.code == kCauseNotReproduced;
  if (!replayed && record.checkpoint && record.checkpoint->step >= record.target_steps) {
    return stop_epoch(
        job, JobState::kStopping, JobState::kSucceeded, 0, "coordinator",
        {"succeeded", fmt::format("trained {}; a failure after the final checkpoint "
                                  "changed nothing: {}",
                                  counted(record.target_steps, "step"), failure.reason.message)});
  }
  const bool no_fault =
      failure.reason.code == kCauseClusterRestarted || failure.reason.code == kCauseWorkerLeft;
  if (!no_fault) {
    ++record.failures;
    ++record.failures_without_step;
    if (record.saving && !failure.fatal) ++record.saving->measured.failure_count;
  }
  const std::string actor = failure.worker.empty() ? "coordinator" : "worker " + failure.worker;
  const std::optional<Rank> rank = failure.rank;
  const Reason cause = failure.reason;
  const bool fatal = failure.fatal;
  record.last_failure = std::move(failure);
  const int64_t restarts_max = job.spec.recovery.max_restarts;
  if (fatal) {
    return stop_epoch(job, JobState::kStopping, JobState::kFailed, 0, actor, cause, rank);
  }
  if (record.failures > restarts_max) {
    return stop_epoch(job, JobState::kStopping, JobState::kFailed, 0, actor,
                      {"restart_budget",
                       fmt::format("failure {} with recovery.max_restarts {}: {}", record.failures,
                                   restarts_max, cause.message),
                       cause.log_tail},
                      rank);
  }
  ++record.restarts;
  job.place_after = now_ + backoff(job);
  stop_epoch(job, JobState::kRecovering, JobState::kFailed, 0, actor, cause, rank);
}

Duration Coordinator::backoff(const Job& job) const {
  Duration wait = Duration::zero();
  for (int64_t i = 1; i < job.record.failures_without_step && wait < config_.backoff_most; ++i) {
    wait = wait == Duration::zero() ? config_.backoff_first : 2 * wait;
  }
  return std::min(wait, config_.backoff_most);
}

// Fences the current epoch: from here on nothing of it is accepted, and the job goes on
// (RECOVERING: a new start; STOPPING: `outcome`) once every worker has confirmed that its ranks are
// gone.
void Coordinator::stop_epoch(Job& job, JobState state, JobState outcome, int64_t grace_ms,
                             std::string actor, Reason reason, std::optional<Rank> rank) {
  job.record.outcome = outcome;
  job.restore = Restore::kUnknown;
  std::erase_if(job.rounds, [](const auto& round) { return !round.second.committing; });
  const bool nothing_runs = !job.placed();
  transition(job, nothing_runs && state == JobState::kStopping ? outcome : state, std::move(actor),
             std::move(reason), rank);
  if (nothing_runs) return;
  job.stop_grace_ms = grace_ms;
  job.ordered_at = now_;
  await_stops(job);
  for (const WorkerId worker : job.awaiting) send_stop(job, worker);
  settle(job);
}

// A lost worker cannot confirm; its ranks are stopped before it gets anything new when it is back.
void Coordinator::await_stops(Job& job) {
  job.awaiting.clear();
  for (const WorkerId id : hosts(job)) {
    Worker& worker = workers_.at(id);
    if (worker.state == WorkerState::kLost) {
      worker.stale[job.record.id] = job.record.epoch;
    } else {
      job.awaiting.insert(id);
    }
  }
}

void Coordinator::send_stop(const Job& job, WorkerId worker) {
  // A reason may quote paths and what a rank said; one beyond the bound would be refused whole.
  send(worker,
       StopRanks{job.record.id, job.record.epoch, job.stop_grace_ms,
                 job.record.reason.message.substr(0, kNameBytesMax), wants_held_state(job)});
}

void Coordinator::worker_stopped(Job& job, WorkerId worker) {
  if (job.awaiting.erase(worker) > 0) settle(job);
}

void Coordinator::settle(Job& job) {
  const bool stopping =
      job.record.state == JobState::kStopping || job.record.state == JobState::kRecovering;
  if (!stopping || !job.placed() || !job.awaiting.empty() || job.commit_in_flight()) return;
  release_devices(job);
  if (job.record.state == JobState::kStopping) {
    transition(job, job.record.outcome, "coordinator", job.record.reason);
  }
}

void Coordinator::check_finished(Job& job) {
  const bool all_finished =
      !job.ranks.empty() && std::all_of(job.ranks.begin(), job.ranks.end(),
                                        [](const RankView& rank) { return rank.finished; });
  if (job.record.state != JobState::kRunning || !all_finished || job.commit_in_flight()) return;
  const JobRecord& record = job.record;
  if (record.checkpoint && record.checkpoint->step >= record.target_steps) {
    return stop_epoch(job, JobState::kStopping, JobState::kSucceeded, kFinishedGraceMs,
                      "coordinator",
                      {"succeeded", fmt::format("trained {}; the final checkpoint is committed",
                                                counted(record.target_steps, "step"))});
  }
  const auto failed = job.failed_rounds.find(record.target_steps);
  stop_epoch(job, JobState::kStopping, JobState::kFailed, kFinishedGraceMs, "coordinator",
             {"final_checkpoint",
              fmt::format("every step is trained, but the final checkpoint could not be saved{}{}; "
                          "resume the job to train on from the checkpoint before it",
                          failed == job.failed_rounds.end() ? "" : ": ",
                          failed == job.failed_rounds.end() ? "" : failed->second)});
}

}  // namespace penstock
