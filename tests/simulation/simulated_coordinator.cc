#include "tests/simulation/simulated_coordinator.h"

#include <algorithm>

#include "tests/run/spec_text.h"

namespace penstock {
namespace {

std::string manifest_path(JobId job, int64_t step, Epoch epoch) {
  return fmt::format("/sim/{}/{}-{}", job, step, epoch);
}

bool taken_back(const std::vector<Rollback>& rollbacks, int64_t step, Epoch epoch) {
  return std::any_of(rollbacks.begin(), rollbacks.end(), [&](const Rollback& rollback) {
    return epoch <= rollback.epoch && step >= rollback.steps.first;
  });
}

// As coordinator/driver/checkpoint_threads.cc finds it, of whole checkpoints; 0: none.
int64_t step_to_restore(const std::map<int64_t, Epoch>& whole, const FindCheckpoint& find) {
  int64_t newest = 0;
  int64_t oldest = 0;
  for (const auto& [step, epoch] : whole) {
    if (taken_back(find.rolled_back, step, epoch)) continue;
    if (find.before && step >= find.before->last) continue;
    if (oldest == 0) oldest = step;
    if (!find.before || step < find.before->first) newest = step;
  }
  return newest > 0 || !find.before ? newest : oldest;
}

// Without what a crash may cost the newest of (Effects::relaxed_jobs).
JobRecord durable_part(JobRecord record) {
  record.last_step.reset();
  record.highest_step = 0;
  record.failures_without_step = 0;
  if (record.saving) record.saving->measured = {};
  if (record.proof) record.proof->compared = 0;
  return record;
}

}  // namespace

JobSpec sim_spec(const std::string& name) {
  static const JobSpec kSpec = parse_job_spec(kValidSpec, "sim").value();
  JobSpec spec = kSpec;
  spec.name = name;
  spec.training.steps = kSimSteps;
  spec.checkpoint.interval = kSimCheckpointInterval;
  spec.recovery.max_restarts = 1000;
  return spec;
}

StepReport sim_report(JobId job, Epoch epoch, int64_t step) {
  StepReport report{.job = job, .epoch = epoch, .step = step};
  report.loss = 1.0 / static_cast<double>(step);
  report.tokens = 8;
  report.step_seconds = 0.2;
  return report;
}

SegmentSaved sim_segment(JobId job, Epoch epoch, Rank rank, int64_t step) {
  return {.job = job,
          .epoch = epoch,
          .rank = rank,
          .step = step,
          .file = "s",
          .footer_digest = {},
          .slices = {}};
}

void SimulatedCoordinator::violate(const std::string& what) {
  if (!violation_.empty()) return;
  violation_ = fmt::format("at {:.2f} s: {}", to_seconds(now_ - begin_), what);
  trace("", "VIOLATED: {}", what);
}

// ---- faults

void SimulatedCoordinator::coordinator_faults() {
  if (!core_) return;
  if (chance(coordinator_faults_.crashes)) return crash_core(true);
  if (!chance(coordinator_faults_.stalls)) return;
  count(Fault::kCoordinatorStalled);
  core_stalled_until_ = now_ + below(coordinator_faults_.longest_stall);
  trace("coordinator", "stopped for {:.1f} s", to_seconds(core_stalled_until_ - now_));
}

Instant SimulatedCoordinator::core_disturbed_until() const {
  return std::max(core_back_at_, core_stalled_until_);
}

void SimulatedCoordinator::crash_core(bool between_events) {
  trace("coordinator", "crashed{}", between_events ? "" : " within an event");
  count(Fault::kCoordinatorCrashed);
  if (between_events) check_store();
  core_.reset();
  core_back_at_ = now_ + below(coordinator_faults_.longest_down);
  core_stalled_until_ = {};
  const size_t kept = random_.below(unsynced_.size() + 1);
  counts_.of(Fault::kRecordLost) += static_cast<int64_t>(unsynced_.size() - kept);
  for (size_t i = 0; i < kept; ++i) store_[unsynced_[i].key] = unsynced_[i].value;
  unsynced_.clear();
  // A commit under way may have reached the disk, but nobody hears of it.
  for (const auto& [at, event] : disk_results_) {
    const auto* done = std::get_if<CheckpointDone>(&event);
    if (done == nullptr || !done->status.ok()) continue;
    count(Fault::kCommitUnheard);
    if (!chance(0.5)) continue;
    checkpoints_[done->job][done->step] = done->epoch;
    damaged_.erase({done->job, done->step});
  }
  disk_results_.clear();
  disk_free_at_.clear();
  on_core_crash();
}

// What the core knows of its jobs and may not forget is on the disk, synced.
void SimulatedCoordinator::check_store() {
  for (const auto& [id, job] : core_->jobs()) {
    const auto stored = store_.find(job_key(id));
    if (stored == store_.end() || !store_.contains(spec_key(id))) {
      violate(fmt::format("job {} or its spec is not in the store", id));
      continue;
    }
    const Record written = record_of(durable_part(decode_job(stored->second).value()));
    const Record known = record_of(durable_part(job.record));
    if (written.value != known.value) {
      violate(fmt::format("the store has job {} as {}, the coordinator has it as {}", id,
                          written.value, known.value));
    }
    const Record seats = record_of(SeatsRecord{id, job.seats});
    const Record data = record_of(DataRecord{id, job.data});
    for (const Record& record : {seats, data}) {
      const auto kept = store_.find(record.key);
      const bool empty = record.key == seats.key ? job.seats.layers.empty() : job.data.empty();
      if (kept == store_.end() ? !empty : kept->second != record.value) {
        violate(fmt::format("the store has not what the coordinator knows under {}", record.key));
      }
    }
  }
  for (const auto& [id, worker] : core_->workers()) {
    const Record known = record_of(worker.record);
    const auto stored = store_.find(known.key);
    if (stored == store_.end() || stored->second != known.value) {
      violate(fmt::format("the store has worker {} otherwise than the coordinator", id));
    }
  }
}

// ---- the core

void SimulatedCoordinator::start_core() {
  StoredState stored;
  uint64_t events = 0;
  for (const auto& [key, value] : store_) {
    const bool is_state =
        std::any_of(std::begin(kStatePrefixes), std::end(kStatePrefixes),
                    [&](const std::string_view prefix) { return key.starts_with(prefix); });
    if (is_state) stored.records.push_back({key, value});
    if (!key.starts_with(kEventPrefix)) continue;
    if (key != std::string(kEventPrefix) + key_number(++events)) {
      violate(fmt::format("event {} is missing in the store", events));
    }
  }
  if (events < events_told_) {
    violate(fmt::format("of {} events that were told the store has {}", events_told_, events));
  }
  stored.last_event_sequence = events;
  CoreConfig config;
  config.checkpoint_root = "/sim";
  config.checkpoint_timeout = std::chrono::seconds(60);  // well within the quiet time
  core_.emplace(config);
  Result<Effects> effects = core_->start(now_, stored);
  if (!effects.ok()) {
    return violate("restart from records: " + effects.status().to_string());
  }
  for (const JobId job : std::set<JobId>(accepted_)) {
    if (core_->find_job(job)) continue;
    // Its removal may be on record, and the crash have come before the answer.
    if (!removals_asked_.contains(job)) violate(fmt::format("acknowledged job {} is lost", job));
    accepted_.erase(job);
  }
  if (const std::string broken = invariants_.after_restart(*core_); !broken.empty()) {
    violate(broken);
  }
  apply(nullptr, *std::move(effects));
}

void SimulatedCoordinator::feed(const Event& event) {
  if (!core_) return;
  ++counts_.core_events;
  if (const auto* done = std::get_if<CheckpointDone>(&event); done && done->status.ok()) {
    checkpoints_[done->job][done->step] = done->epoch;
    damaged_.erase({done->job, done->step});
  }
  if (const auto* found = std::get_if<CheckpointFound>(&event)) {
    const Event answer = look_for(finds_.at({found->job, found->number}));
    return apply(&answer, core_->step(now_, answer));
  }
  apply(&event, core_->step(now_, event));
}

void SimulatedCoordinator::feed_disk_results() {
  while (core_hears() && !disk_results_.empty() && disk_results_.begin()->first <= now_) {
    feed(disk_results_.extract(disk_results_.begin()).mapped());
  }
}

void SimulatedCoordinator::apply(const Event* event, Effects effects) {
  const bool crashes = faulty_ && chance(coordinator_faults_.crashes_in_event);
  if (crashes) count(Fault::kCrashedInEvent);
  if (crashes && chance(0.5)) return crash_core(false);
  write(effects);
  for (const JobEvent& told : effects.events) {
    if (told.reason.code == kRebalancing) ++counts_.rebalances;
    trace("coordinator", "job {} epoch {} {}: {}", told.job, told.epoch, told.reason.code,
          told.reason.message);
  }
  if (const std::string broken = invariants_.after_event(now_, event, *core_, effects);
      !broken.empty()) {
    violate(broken);
  }
  check(effects);
  check_health(effects);
  for (const OutgoingMessage& out : effects.messages) {
    if (const auto* start = std::get_if<StartRank>(&out.message)) check_start(*start);
  }
  if (crashes) return crash_core(true);
  act(std::move(effects));
}

void SimulatedCoordinator::write(const Effects& effects) {
  for (Record& record : records_of(effects)) unsynced_.push_back(std::move(record));
  for (const StepRecord& step : effects.steps) {
    const std::string key = record_of(step).key;
    const bool written = std::any_of(unsynced_.rbegin(), unsynced_.rend(),
                                     [&](const Record& record) { return record.key == key; });
    if (!written) violate(fmt::format("job {}: step {} is not written", step.job, step.step));
  }
  if (!effects.must_sync()) return;
  for (const JobId job : effects.removed_jobs) {
    for (const std::string& prefix : prefixes_of(job)) {
      std::erase_if(store_, [&](const auto& entry) { return entry.first.starts_with(prefix); });
      std::erase_if(unsynced_, [&](const auto& entry) { return entry.key.starts_with(prefix); });
    }
  }
  for (Record& record : unsynced_) store_[record.key] = std::move(record.value);
  unsynced_.clear();
}

void SimulatedCoordinator::act(Effects effects) {
  if (!effects.events.empty()) events_told_ = effects.events.back().sequence;
  for (const Answer& answer : effects.answers) {
    if (answer.status.ok() && answer.job.value != 0) accepted_.insert(answer.job);
  }
  for (const JobId removed : effects.removed_jobs) accepted_.erase(removed);
  for (OutgoingMessage& out : effects.messages) send(std::move(out));
  for (const CommitCheckpoint& commit : effects.commits) {
    CheckpointDone done;
    done.job = commit.job;
    done.epoch = commit.epoch;
    done.step = commit.step;
    done.checkpoint.manifest = manifest_path(commit.job, commit.step, commit.epoch);
    const bool may_fail = commit.step != kSimSteps || coordinator_faults_.last_commit_fails;
    if (may_fail && faulty_ && chance(coordinator_faults_.commit_failures)) {
      count(Fault::kCommitFailed);
      done.status = resource_exhausted("disk full");
    }
    emit_from_disk(commit.job, std::chrono::milliseconds(1000), done);
  }
  for (const FindCheckpoint& find : effects.finds) {
    CheckpointFound found;
    found.job = find.job;
    found.number = find.number;
    finds_[{find.job, find.number}] = find;
    emit_from_disk(find.job, std::chrono::milliseconds(300), found);
  }
  // Of the checkpoint directory: nothing is kept here that would have to go.
  for (const RemoveCheckpoints& removal : effects.removals) {
    emit_from_disk(removal.job, std::chrono::milliseconds(300),
                   CheckpointsRemoved{removal.job, {}});
  }
}

// ---- the checkpoint disk

void SimulatedCoordinator::emit_from_disk(JobId job, Duration longest, Event event) {
  Instant& free_at = disk_free_at_[job];
  free_at = std::max(now_, free_at) + below(longest);
  disk_results_.emplace(free_at, std::move(event));
}

// The newest may turn out damaged, where an older one is whole.
CheckpointFound SimulatedCoordinator::look_for(const FindCheckpoint& find) {
  const std::map<int64_t, Epoch>& saved = checkpoints_[find.job];
  const auto whole = [&] {
    std::map<int64_t, Epoch> left = saved;
    std::erase_if(left, [&](const auto& at) { return damaged_.contains({find.job, at.first}); });
    return left;
  };
  CheckpointFound found;
  found.job = find.job;
  found.number = find.number;
  found.step = step_to_restore(whole(), find);
  if (found.step > 0 && faulty_ && chance(coordinator_faults_.damage)) {
    damaged_.insert({find.job, found.step});
    if (const int64_t older = step_to_restore(whole(), find); older > 0) {
      count(Fault::kCheckpointDamaged);
      found.step = older;
    } else {
      damaged_.erase({find.job, found.step});
    }
  }
  for (const auto& [step, epoch] : saved) {
    found.steps.push_back(step);
    if (damaged_.contains({find.job, step}) && step > found.step) {
      found.refused.push_back(fmt::format("step {}: a block is damaged", step));
    }
  }
  if (found.step > 0) found.manifest = manifest_path(find.job, found.step, saved.at(found.step));
  return found;
}

// A start forgets no checkpoint: it is from the newest whole one that no rollback took back, or
// from what daemons hold of a step that is no older than the newest it has heard of.
void SimulatedCoordinator::check_start(const StartRank& order) {
  const JobRecord& record = core_->find_job(order.job)->record;
  int64_t newest = 0;
  for (const auto& [step, epoch] : checkpoints_[order.job]) {
    const bool usable = !damaged_.contains({order.job, step}) &&
                        !taken_back(record.guards.rolled_back, step, epoch);
    // Of a repeated order: what this very epoch has saved meanwhile.
    if (usable && epoch < order.epoch) newest = step;
  }
  if (order.from_memory) {
    const auto& known = record.checkpoint;
    newest = known && known->epoch < order.epoch ? known->step : 0;
  }
  const bool right =
      order.from_memory ? order.restore_step >= newest : order.restore_step == newest;
  if (!right) {
    violate(fmt::format("job {} epoch {} starts from step {}, though step {} is saved", order.job,
                        order.epoch, order.restore_step, newest));
  }
}

// ---- jobs

void SimulatedCoordinator::suspend_and_resume(double suspensions, double resumptions) {
  if (suspensions == 0.0) return;
  for (const JobId id : std::set<JobId>(accepted_)) {
    if (!core_hears()) return;
    const Job* const job = core_->find_job(id);
    if (job == nullptr) continue;
    if (job->record.state == JobState::kSuspended) {
      if (faulty_ && !chance(resumptions)) continue;
      ++counts_.suspensions;
      feed(ResumeJob{{++requests_}, id});
    } else if (faulty_ && chance(suspensions)) {
      feed(SuspendJob{{++requests_}, id});
    }
  }
}

void SimulatedCoordinator::count_restarts() {
  if (!core_) return;
  for (const auto& [id, job] : core_->jobs()) counts_.restarts += job.record.restarts;
}

bool SimulatedCoordinator::all_jobs(int count, const std::function<bool(JobState)>& passes) const {
  return core_ && std::ssize(accepted_) >= count &&
         std::all_of(accepted_.begin(), accepted_.end(),
                     [&](JobId job) { return passes(core_->find_job(job)->record.state); });
}

std::string SimulatedCoordinator::states() const {
  if (!core_) return " no coordinator";
  std::string states;
  for (const auto& [id, job] : core_->jobs()) {
    states += fmt::format(" job {} {} epoch {}: {};", id, job_state_name(job.record.state),
                          job.record.epoch, job.record.reason.message);
  }
  return states;
}

}  // namespace penstock
