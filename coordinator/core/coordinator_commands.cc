// What clients ask for: submit, cancel, resume, remove. (suspend: coordinator_pauses.cc)
#include <algorithm>

#include "comm/base/counted.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/plan/schedule.h"

namespace penstock {

namespace {

// Whether a job may go on by another spec: what it computes must stay, how is free.
Status check_successor(const JobSpec& now, const JobSpec& next) {
  const std::pair<const char*, bool> sections[] = {
      {"metadata.name", now.name == next.name},
      {"model", now.model == next.model},
      {"data", now.data == next.data},
      {"optimizer", now.optimizer == next.optimizer},
      {"training", now.training == next.training},
      {"checkpoint.dir", now.checkpoint.dir == next.checkpoint.dir},
      {"checkpoint.init_from", now.checkpoint.init_from == next.checkpoint.init_from}};
  for (const auto& [name, same] : sections) {
    if (same) continue;
    return invalid_argument(
        fmt::format("{} is not the job's: only parallelism, recovery, guards and when checkpoints "
                    "are saved and kept may change in a resume; submit a new job for anything else",
                    name));
  }
  std::vector<int64_t> steps = {1};
  for (const JobSpec* spec : {&now, &next}) {
    for (const auto& level : spec->parallelism.microbatch_levels) steps.push_back(level.from_step);
  }
  for (const int64_t step : steps) {
    const int64_t wanted = now.tokens_at(step) / now.data.seq_length;
    const int64_t given = next.tokens_at(step) / next.data.seq_length;
    if (wanted == given) continue;
    return invalid_argument(
        fmt::format("parallelism gives step {} {}, the job's has {}: microbatches x "
                    "micro_batch_size x expert x data must stay what it was",
                    step, counted(given, "sequence"), wanted));
  }
  return {};
}

}  // namespace

// Of a new job (`resumed` 0), or of one that goes on: its own directory is no other job's.
Status Coordinator::check_submission(const JobSpec& spec, JobId resumed) const {
  if (const Result<std::vector<Program>> programs = make_programs(spec.parallelism);
      !programs.ok()) {
    return programs.status();
  }
  for (const JobId id : open_jobs_) {
    const JobRecord& record = jobs_.at(id).record;
    if (id != resumed && record.name == spec.name) {
      return already_exists(
          fmt::format("job {} is named \"{}\" too and is {}; choose another name (submit --name), "
                      "or cancel it first",
                      id, spec.name, job_state_name(record.state)));
    }
  }
  for (const auto& [id, job] : jobs_) {
    const JobRecord& other = job.record;
    const bool in_use = !is_final(other.state) || other.checkpoint || job.removing.value != 0;
    if (id == resumed || spec.checkpoint.dir.empty() ||
        other.checkpoint_dir != spec.checkpoint.dir || !in_use) {
      continue;
    }
    return already_exists(
        fmt::format("checkpoint.dir {} is where job {} \"{}\" keeps its checkpoints; give each job "
                    "a directory of its own, or resume that job",
                    spec.checkpoint.dir, id, other.name));
  }
  int64_t device_count = 0;
  int64_t worker_count = 0;
  for (const auto& [id, worker] : workers_) {
    const bool forgotten =
        worker.state == WorkerState::kLost && now_ - worker.last_seen > config_.forget_worker_after;
    if (forgotten) continue;
    device_count += worker.record.device_count;
    ++worker_count;
  }
  const ParallelismSpec& grid = spec.parallelism;
  if (grid.world_size() > device_count) {
    return invalid_argument(fmt::format(
        "parallelism needs pipeline {} x expert {} x data {} = {} ranks, one device each, but "
        "the cluster has {} on {}; start more workers or make the grid smaller",
        grid.pipeline, grid.expert, grid.data, grid.world_size(), counted(device_count, "device"),
        counted(worker_count, "known worker")));
  }
  return {};
}

void Coordinator::on_event(const SubmitJob& submit) {
  const JobId id = {last_job_.value + 1};
  JobSpec spec = submit.spec;
  if (spec.name.empty()) spec.name = fmt::format("job-{}", id);
  if (const Status refused = check_submission(spec, {}); !refused.ok()) {
    effects_.answers.push_back({submit.request, refused, {}});
    return;
  }
  last_job_ = id;
  Job& job = jobs_[id];
  job.spec = std::move(spec);
  job.record.id = id;
  job.record.name = job.spec.name;
  job.record.created = now_;
  job.record.target_steps = job.spec.training.steps;
  job.record.checkpoint_dir = job.spec.checkpoint.dir.empty()
                                  ? fmt::format("{}/{}", config_.checkpoint_root, id)
                                  : job.spec.checkpoint.dir;
  if (job.spec.checkpoint.automatic) job.record.saving.emplace();
  effects_.specs.emplace_back(id, to_json(job.spec));
  transition(job, JobState::kQueued, "user", {"submitted", "submitted"});
  effects_.answers.push_back({submit.request, {}, id});
}

void Coordinator::on_event(const CancelJob& cancel) {
  const auto found = jobs_.find(cancel.job);
  if (found == jobs_.end()) {
    effects_.answers.push_back(
        {cancel.request, not_found(fmt::format("no job {}", cancel.job)), {}});
    return;
  }
  Job& job = found->second;
  if (is_final(job.record.state)) {
    effects_.answers.push_back(
        {cancel.request,
         failed_precondition(fmt::format("job {} \"{}\" has ended: it is {}", job.record.id,
                                         job.record.name, job_state_name(job.record.state))),
         {}});
    return;
  }
  if (job.record.state != JobState::kStopping) {
    stop_epoch(job, JobState::kStopping, JobState::kCancelled, cancel.grace_ms, "user",
               {"cancelled", "cancelled by the user"});
  } else {
    if (job.record.outcome == JobState::kSuspended) {
      job.record.outcome = JobState::kCancelled;
      job.record.reason = {"cancelled", "cancelled by the user"};
      note(job, "user", job.record.reason);
      changed(job);
    }
    if (cancel.grace_ms < job.stop_grace_ms) {
      job.stop_grace_ms = cancel.grace_ms;
      for (const WorkerId worker : job.awaiting) send_stop(job, worker);
    }
  }
  effects_.answers.push_back({cancel.request, {}, job.record.id});
}

Status Coordinator::check_resume(const Job& job, const ResumeJob& resume) const {
  if (!resume.spec) return check_submission(job.spec, job.record.id);
  PENSTOCK_TRY(check_successor(job.spec, *resume.spec));
  if (resume.prove_steps > 0) {
    return invalid_argument(
        "steps are proved in the layout that trained them; resume without prove, or without a "
        "spec");
  }
  return check_submission(*resume.spec, job.record.id);
}

// Any layout loads what another one saved. Sums are taken in another order from here on, or other
// steps are left out, so what is recorded is no measure for a replay any more.
void Coordinator::adopt_spec(Job& job, const JobSpec& spec) {
  JobRecord& record = job.record;
  const bool computes_otherwise =
      spec.parallelism != job.spec.parallelism || spec.guards != job.spec.guards;
  if (computes_otherwise) record.rebalanced_step = record.highest_step;
  if (!spec.checkpoint.automatic) record.saving.reset();
  if (spec.checkpoint.automatic && !record.saving) record.saving.emplace();
  job.spec = spec;
  effects_.specs.emplace_back(record.id, to_json(spec));
}

void Coordinator::on_event(const ResumeJob& resume) {
  const auto found = jobs_.find(resume.job);
  const auto refuse = [&](Status status) {
    effects_.answers.push_back({resume.request, std::move(status), {}});
  };
  if (found == jobs_.end()) return refuse(not_found(fmt::format("no job {}", resume.job)));
  Job& job = found->second;
  JobRecord& record = job.record;
  const bool waits = record.state == JobState::kFailed || record.state == JobState::kCancelled ||
                     record.state == JobState::kSuspended;
  if (!waits) {
    return refuse(failed_precondition(
        fmt::format("job {} \"{}\" is {}; only a SUSPENDED, FAILED or CANCELLED job can be resumed",
                    record.id, record.name, job_state_name(record.state))));
  }
  if (job.removing.value != 0) {
    return refuse(
        failed_precondition(fmt::format("job {} \"{}\" is being removed", record.id, record.name)));
  }
  if (const Status refused = check_resume(job, resume); !refused.ok()) return refuse(refused);
  if (const Status refused = begin_proof(job, resume.prove_steps); !refused.ok()) {
    return refuse(refused);
  }
  if (resume.spec) adopt_spec(job, *resume.spec);
  record.failures = 0;
  record.failures_without_step = 0;
  record.replacements = 0;
  record.guards.rollbacks = 0;
  record.last_failure.reset();
  job.restore = Restore::kUnknown;
  job.place_after = now_;
  transition(
      job, JobState::kQueued, "user",
      {"resumed",
       fmt::format("resumed{}; {}", resume.spec ? " with " + layout_text(job.spec.parallelism) : "",
                   record.checkpoint ? fmt::format("the newest checkpoint known is of step {}",
                                                   record.checkpoint->step)
                                     : "no checkpoint is known, so it starts over")});
  effects_.answers.push_back({resume.request, {}, record.id});
}

void Coordinator::on_event(const RemoveJob& remove) {
  const auto refuse = [&](Status status) {
    effects_.answers.push_back({remove.request, std::move(status), {}});
  };
  const auto found = jobs_.find(remove.job);
  if (found == jobs_.end()) return refuse(not_found(fmt::format("no job {}", remove.job)));
  Job& job = found->second;
  const JobRecord& record = job.record;
  if (!is_final(record.state)) {
    return refuse(failed_precondition(fmt::format("job {} \"{}\" is {}; cancel it first", record.id,
                                                  record.name, job_state_name(record.state))));
  }
  if (job.removing.value != 0) {
    return refuse(failed_precondition(
        fmt::format("job {} \"{}\" is being removed already", record.id, record.name)));
  }
  if (!remove.checkpoints) return erase_job(record.id, remove.request, false);
  for (const auto& [id, other] : jobs_) {
    if (id == record.id || other.record.checkpoint_dir != record.checkpoint_dir) continue;
    // It may have segments there that no manifest names yet.
    return refuse(failed_precondition(
        fmt::format("checkpoint.dir {} is also where job {} \"{}\" keeps its checkpoints; remove "
                    "that job first, or job {} without its checkpoints",
                    record.checkpoint_dir, id, other.record.name, record.id)));
  }
  job.removing = remove.request;
  RemoveCheckpoints removal{record.id, record.checkpoint_dir};
  if (record.checkpoint) removal.newest_step = record.checkpoint->step;
  effects_.removals.push_back(std::move(removal));
}

// The record goes last: a coordinator that dies before still knows the job, whose removal can then
// be asked for again.
void Coordinator::on_event(const CheckpointsRemoved& removed) {
  const auto found = jobs_.find(removed.job);
  if (found == jobs_.end() || found->second.removing.value == 0) return;
  const RequestId request = std::exchange(found->second.removing, RequestId{});
  if (removed.status.ok()) return erase_job(removed.job, request, true);
  // Said here as well: whoever asked may have stopped waiting.
  note(found->second, "coordinator", {"removal_failed", removed.status.message()});
  effects_.answers.push_back({request, removed.status, {}});
}

void Coordinator::erase_job(JobId id, RequestId request, bool checkpoints) {
  const JobRecord& record = jobs_.at(id).record;
  note_cluster("user", {"job_removed", fmt::format("job {} \"{}\", which was {}, is removed{}", id,
                                                   record.name, job_state_name(record.state),
                                                   checkpoints ? ", and its checkpoints" : "")});
  effects_.removed_jobs.push_back(id);
  effects_.last_job = last_job_;
  effects_.answers.push_back({request, {}, id});
  changed_jobs_.erase(id);
  relaxed_jobs_.erase(id);
  jobs_.erase(id);
}

}  // namespace penstock
