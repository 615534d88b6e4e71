#include "coordinator/core/coordinator.h"

#include <algorithm>
#include <charconv>

#include "comm/base/check.h"
#include "comm/base/counted.h"

namespace penstock {

std::vector<Record> records_of(const Effects& effects) {
  std::vector<Record> records;
  for (const auto& [job, spec_json] : effects.specs) records.push_back(spec_record(job, spec_json));
  if (effects.last_job) records.push_back(last_job_record(*effects.last_job));
  for (const JobRecord& job : effects.jobs) records.push_back(record_of(job));
  for (const JobRecord& job : effects.relaxed_jobs) records.push_back(record_of(job));
  for (const SeatsRecord& seats : effects.seats) records.push_back(record_of(seats));
  for (const DataRecord& data : effects.data) records.push_back(record_of(data));
  for (const WorkerRecord& worker : effects.workers) records.push_back(record_of(worker));
  for (const JobEvent& event : effects.events) {
    for (Record& record : records_of(event)) records.push_back(std::move(record));
  }
  for (const StepRecord& step : effects.steps) records.push_back(record_of(step));
  for (const EvaluationRecord& evaluation : effects.evaluations) {
    records.push_back(record_of(evaluation));
  }
  return records;
}

Result<Effects> Coordinator::start(Instant now, const StoredState& stored) {
  now_ = now;
  last_tick_ = now;
  PENSTOCK_TRY(load(stored));
  for (auto& [id, job] : jobs_) resume_watch(job);
  note_cluster("coordinator",
               {"coordinator_started", fmt::format("coordinator started with {} not ended and {}",
                                                   counted(std::ssize(open_jobs_), "job"),
                                                   counted(std::ssize(workers_), "known worker"))});
  for (const JobId id : std::set<JobId>(open_jobs_)) settle(jobs_.at(id));
  schedule_needed_ = true;
  return finish_step();
}

Status Coordinator::load(const StoredState& stored) {
  event_sequence_ = stored.last_event_sequence;
  for (const Record& record : stored.records) {
    const auto in_record = [&](const Status& status) { return status.with_context(record.key); };
    if (const std::optional<JobId> id = job_of_spec_key(record.key)) {
      Result<JobSpec> spec = parse_job_spec(record.value, record.key);
      if (!spec.ok()) return data_loss(spec.status().message());
      jobs_[*id].spec = *std::move(spec);
    } else if (record.key.starts_with(kJobPrefix)) {
      Result<JobRecord> job = decode_job(record.value);
      if (!job.ok()) return in_record(job.status());
      jobs_[job->id].record = *std::move(job);
    } else if (record.key.starts_with(kSeatsPrefix)) {
      Result<SeatsRecord> seats = decode_seats(record.value);
      if (!seats.ok()) return in_record(seats.status());
      jobs_[seats->job].seats = std::move(seats->seats);
    } else if (record.key.starts_with(kDataPrefix)) {
      Result<DataRecord> data = decode_data(record.value);
      if (!data.ok()) return in_record(data.status());
      jobs_[data->job].data = std::move(data->data);
    } else if (record.key == kLastJobKey) {
      const Result<JobId> last = decode_last_job(record.value);
      if (!last.ok()) return in_record(last.status());
      last_job_ = *last;
    } else if (record.key.starts_with(kWorkerPrefix)) {
      Result<WorkerRecord> worker = decode_worker(record.value);
      if (!worker.ok()) return in_record(worker.status());
      worker_by_name_[worker->name] = worker->id;
      Worker& known = workers_[worker->id];
      known.record = *worker;
      known.last_seen = now_;
      if (worker->lost) known.state = WorkerState::kLost;
    } else if (record.key.starts_with(kEvaluationPrefix)) {
      const Result<EvaluationRecord> evaluation = decode_evaluation(record.value);
      if (!evaluation.ok()) return in_record(evaluation.status());
      std::deque<EvaluationRecord>& kept = jobs_[evaluation->job].evaluations;
      kept.push_back(*evaluation);
      if (kept.size() > kEvaluationsMax) kept.pop_front();
    }
  }
  if (!jobs_.empty()) last_job_ = std::max(last_job_, jobs_.rbegin()->first);
  for (const auto& [id, job] : jobs_) {
    const bool whole = job.record.id == id && job.spec.training.steps > 0;
    const bool placement_fits =
        !job.placed() || std::ssize(job.record.placement) == job.world_size();
    if (!whole || !placement_fits) {
      return data_loss(fmt::format("job {} has lost its record or its spec", id));
    }
    if (const Status seats = check_expert_seats(job.seats, job.spec.model); !seats.ok()) {
      return data_loss(fmt::format("the stored seats of job {}: {}", id, seats.message()));
    }
    for (const RankPlacement& at : job.record.placement) {
      if (!workers_.contains(at.worker)) {
        return data_loss(
            fmt::format("job {} is placed on worker {}, whose record is missing", id, at.worker));
      }
    }
  }
  return {};
}

// Takes up a job from the records: what its workers say will show what is still running.
void Coordinator::resume_watch(Job& job) {
  if (!is_final(job.record.state)) open_jobs_.insert(job.record.id);
  if (!job.placed()) return;
  hold_devices(job);
  job.ranks.assign(static_cast<size_t>(job.world_size()), {});
  job.epoch_began = now_;
  job.ordered_at = now_;
  heard_of(job);
  const auto& newest = job.record.last_step;
  read_proof(job, newest && newest->epoch == job.record.epoch ? newest->step : 0);
  if (!wants_ranks(job.record.state)) await_stops(job);
}

Effects Coordinator::step(Instant now, const Event& event) {
  now_ = now;
  std::visit([this](const auto& given) { on_event(given); }, event);
  return finish_step();
}

Effects Coordinator::finish_step() {
  if (std::exchange(schedule_needed_, false)) schedule();
  for (const JobId id : changed_jobs_) {
    relaxed_jobs_.erase(id);
    effects_.jobs.push_back(jobs_.at(id).record);
  }
  for (const JobId id : relaxed_jobs_) effects_.relaxed_jobs.push_back(jobs_.at(id).record);
  changed_jobs_.clear();
  relaxed_jobs_.clear();
  return std::exchange(effects_, {});
}

const Job* Coordinator::find_job(JobId id) const {
  const auto job = jobs_.find(id);
  return job == jobs_.end() ? nullptr : &job->second;
}

const Worker* Coordinator::find_worker(WorkerId id) const {
  const auto worker = workers_.find(id);
  return worker == workers_.end() ? nullptr : &worker->second;
}

const Worker* Coordinator::find_worker(const std::string& name) const {
  const auto known = worker_by_name_.find(name);
  return known == worker_by_name_.end() ? nullptr : find_worker(known->second);
}

const Job* Coordinator::find_job(const std::string& id_or_name) const {
  uint64_t id = 0;
  const char* end = id_or_name.data() + id_or_name.size();
  const auto parsed = std::from_chars(id_or_name.data(), end, id);
  if (parsed.ec == std::errc() && parsed.ptr == end) {
    if (const Job* job = find_job(JobId{id})) return job;
  }
  for (auto job = jobs_.rbegin(); job != jobs_.rend(); ++job) {
    if (job->second.record.name == id_or_name) return &job->second;
  }
  return nullptr;
}

std::vector<int32_t> Coordinator::free_devices(WorkerId id) const {
  const Worker& worker = workers_.at(id);
  std::vector<bool> held(static_cast<size_t>(worker.record.device_count), false);
  for (const HostedRank& hosted : worker.hosted) {
    if (static_cast<size_t>(hosted.device) < held.size()) held[hosted.device] = true;
  }
  std::vector<int32_t> free;
  for (size_t device = 0; device < held.size(); ++device) {
    if (!held[device]) free.push_back(static_cast<int32_t>(device));
  }
  return free;
}

// The job, when it exists, is placed, and `epoch` is its current one.
Job* Coordinator::current_epoch(JobId id, Epoch epoch) {
  const auto job = jobs_.find(id);
  if (job == jobs_.end() || !job->second.placed()) return nullptr;
  return job->second.record.epoch == epoch ? &job->second : nullptr;
}

// The rank, when `worker` is where the current epoch placed it.
RankView* Coordinator::hosted_rank(Job& job, Rank rank, WorkerId worker) {
  if (rank.value < 0 || rank.value >= std::ssize(job.record.placement)) return nullptr;
  if (job.record.placement[rank.value].worker != worker) return nullptr;
  return &job.ranks[rank.value];
}

void Coordinator::send(WorkerId worker, ControlMessage message) {
  const Worker& to = workers_.at(worker);
  if (to.state == WorkerState::kUp) effects_.messages.push_back({to.peer, std::move(message)});
}

std::string Coordinator::worker_name(WorkerId id) const {
  return workers_.at(id).record.name;
}

std::set<WorkerId> Coordinator::hosts(const Job& job) const {
  std::set<WorkerId> hosts;
  for (const RankPlacement& at : job.record.placement) hosts.insert(at.worker);
  return hosts;
}

void Coordinator::append_event(JobEvent event) {
  event.sequence = ++event_sequence_;
  event.at = now_;
  effects_.events.push_back(std::move(event));
}

JobEvent Coordinator::event_of(const Job& job, std::string actor, std::optional<Rank> rank) const {
  JobEvent event;
  event.actor = std::move(actor);
  event.job = job.record.id;
  event.job_name = job.record.name;
  event.epoch = job.record.epoch;
  event.rank = rank;
  return event;
}

void Coordinator::note(const Job& job, std::string actor, Reason reason, std::optional<Rank> rank) {
  JobEvent event = event_of(job, std::move(actor), rank);
  event.state = job.record.state;
  event.reason = std::move(reason);
  append_event(std::move(event));
}

void Coordinator::note_cluster(std::string actor, Reason reason) {
  JobEvent event;
  event.actor = std::move(actor);
  event.reason = std::move(reason);
  append_event(std::move(event));
}

}  // namespace penstock
