#include "tests/simulation/core_invariants.h"

#include <fmt/format.h>

#include <algorithm>

#include "coordinator/core/failure.h"

namespace penstock {
namespace {

// Jobs are looked at after every event; of very many all after every so many, and those that
// changed after each.
constexpr size_t kJobsLookedAtAlways = 8;
constexpr uint64_t kLookAtAllEvery = 64;
constexpr size_t kRoundsMax = 8;  // jobs of the simulations save a few times
constexpr Duration kBackoffFirst = std::chrono::seconds(1);
constexpr Duration kBackoffMost = std::chrono::seconds(30);

bool is_legal(JobState from, JobState to, const std::string& code) {
  using enum JobState;
  const bool ends = to == kStopping || is_final(to);
  const bool rests = ends || to == kSuspended;
  switch (from) {
    case kQueued:
      return rests || to == kPlacing || (to == kQueued && code == "submitted");
    case kPlacing:
      return to == kStarting;
    case kStarting:
      return to == kLoading || to == kRecovering || to == kStopping;
    case kLoading:
      return to == kRunning || to == kRecovering || to == kStopping;
    case kRunning:
      return to == kRecovering || to == kStopping;
    case kRecovering:
      // A rank may have found what is to be rolled back just before another one failed.
      return rests || to == kPlacing || (to == kRecovering && code == kRollingBack);
    case kStopping:
      return is_final(to) || to == kSuspended;
    case kSucceeded:
      return false;
    case kFailed:
    case kCancelled:
      return to == kQueued && code == "resumed";
    case kSuspended:
      return ends || (to == kQueued && code == "resumed");
  }
  return false;
}

bool is_failure(const std::string& code) {
  static const std::set<std::string> kPlanned = {
      kRebalancing, kRollingBack,           kDraining,       kScaling,
      kPauseOver,   kCauseClusterRestarted, kCauseWorkerLeft};
  return !kPlanned.contains(code);
}

// As coordinator.h promises it: none after the first failure without a step, then twice as long
// each time.
Duration backoff_after(int64_t failures_without_step) {
  if (failures_without_step < 2) return Duration::zero();
  Duration wait = kBackoffFirst;
  for (int64_t i = 2; i < failures_without_step && wait < kBackoffMost; ++i) wait *= 2;
  return std::min(wait, kBackoffMost);
}

}  // namespace

void CoreInvariants::violate(std::string what) {
  if (violation_.empty()) violation_ = std::move(what);
}

std::string CoreInvariants::after_event(Instant now, const Event* event, const Coordinator& core,
                                        const Effects& effects) {
  event_ = event;
  if (const auto* done = event == nullptr ? nullptr : std::get_if<CheckpointDone>(event)) {
    jobs_[done->job].commits_on_way.erase({done->epoch, done->step});
  }
  note_crash(core);
  check_answers(core, effects);
  check_events(now, core, effects);
  check_steps(core, effects);
  check_commits(core, effects);
  check_orders(core, effects);
  check_jobs(core, effects);
  check_failed_save(core);
  check_exit(core, effects);
  check_incarnations(now, core);
  return violation_;
}

std::string CoreInvariants::after_restart(const Coordinator& core) {
  // Which daemons were replaced is on no record: one may come late, and the living one come back.
  incarnations_.clear();
  answered_.clear();  // requests are of a client's connection, which broke
  for (auto& [id, history] : jobs_) {
    const Job* const job = core.find_job(id);
    if (job == nullptr) {
      violate(fmt::format("job {} is gone after a restart", id));
      return violation_;
    }
    const JobRecord& record = job->record;
    history.failed_at.reset();
    history.commits.clear();
    history.commits_on_way.clear();
    history.crashed.clear();
    history.cursor = record.last_step ? record.last_step->cursor() : 0;
    history.failures_without_step =
        std::min(history.failures_without_step, record.failures_without_step);
    history.failures_counted = record.failures_without_step;
    if (record.epoch < history.epoch) violate(fmt::format("job {} forgot its epoch", id));
  }
  return violation_;
}

// The event, when it is what a worker that is up says of a rank that it hosts in this epoch.
template <typename Message>
const Message* CoreInvariants::said_by_host(const Coordinator& core) const {
  const auto* event = event_ == nullptr ? nullptr : std::get_if<WorkerMessage>(event_);
  const auto* said = event == nullptr ? nullptr : std::get_if<Message>(&event->message);
  const Job* const job = said == nullptr ? nullptr : core.find_job(said->job);
  if (job == nullptr || job->record.epoch != said->epoch || !job->placed()) return nullptr;
  const size_t index = static_cast<size_t>(said->rank.value);
  const Worker& host = core.workers().at(job->record.placement.at(index).worker);
  return host.peer == event->peer && host.state == WorkerState::kUp ? said : nullptr;
}

// ---- what clients were told

void CoreInvariants::check_answers(const Coordinator& core, const Effects& effects) {
  for (const Answer& answer : effects.answers) {
    if (!answered_.insert(answer.request).second) violate("a request is answered twice");
    if (!answer.status.ok() || event_ == nullptr) continue;
    if (std::holds_alternative<SubmitJob>(*event_)) {
      if (answer.job <= last_job_) violate(fmt::format("job id {} is used twice", answer.job));
      last_job_ = answer.job;
      jobs_[answer.job];
    } else if (std::holds_alternative<CancelJob>(*event_)) {
      jobs_[answer.job].cancelled = true;
    } else if (std::holds_alternative<SuspendJob>(*event_)) {
      jobs_[answer.job].suspend = core.find_job(answer.job)->record.state != JobState::kSuspended;
    } else if (const auto* scale = std::get_if<ScaleJob>(event_)) {
      jobs_[answer.job].width = scale->data;
    } else if (std::holds_alternative<ResumeJob>(*event_)) {
      JobHistory& history = jobs_[answer.job];
      history.failures = 0;
      history.suspend = false;
      history.cancelled = false;
      history.ended.reset();
      history.failures_without_step = 0;
      history.failures_counted = 0;
      history.failed_at.reset();
    }
  }
  for (const JobId removed : effects.removed_jobs) {
    const auto history = jobs_.find(removed);
    if (history == jobs_.end() || !history->second.ended) {
      violate(fmt::format("job {} is removed before it ended", removed));
    }
    if (core.find_job(removed) != nullptr) violate(fmt::format("job {} stays", removed));
    jobs_.erase(removed);
    placements_.erase(removed);
  }
}

// ---- events and steps

void CoreInvariants::check_events(Instant now, const Coordinator& core, const Effects& effects) {
  for (const JobEvent& event : effects.events) {
    if (event.sequence != last_event_ + 1) {
      violate(fmt::format("event {} follows event {}", event.sequence, last_event_));
    }
    last_event_ = event.sequence;
    if (event.from) check_transition(now, core, event);
    if (event.reason.code == "scale_dropped") jobs_[event.job].width.reset();
    if (event.from && event.state == JobState::kSuspended) check_suspended(core, event);
  }
}

// A job is suspended without devices, and after a pause without having lost a step.
void CoreInvariants::check_suspended(const Coordinator& core, const JobEvent& event) {
  const Job& job = *core.find_job(event.job);
  if (job.placed()) violate(fmt::format("suspended job {} holds devices", event.job));
  const auto& newest = job.record.last_step;
  const bool paused =
      event.from == JobState::kStopping && newest && newest->epoch == job.record.epoch;
  if (paused && (!job.record.checkpoint || job.record.checkpoint->step < newest->step)) {
    violate(fmt::format("job {} is suspended without its step {}", event.job, newest->step));
  }
}

void CoreInvariants::check_transition(Instant now, const Coordinator& core, const JobEvent& event) {
  JobHistory& history = jobs_[event.job];
  const std::string& code = event.reason.code;
  if (!is_legal(*event.from, *event.state, code)) {
    violate(fmt::format("job {} goes from {} to {} ({})", event.job, job_state_name(*event.from),
                        job_state_name(*event.state), code));
  }
  if (*event.state == JobState::kRecovering && is_failure(code)) {
    ++history.failures_without_step;
    ++history.failures_counted;
    ++history.failures;
    const Job& job = *core.find_job(event.job);
    const auto& newest = job.record.checkpoint;
    if (newest && newest->step >= job.record.target_steps && !job.record.proof) {
      violate(fmt::format("job {} fails after its final checkpoint: {}", event.job,
                          event.reason.message));
    }
    history.failed_at = now;
  }
  if (is_final(*event.state) || *event.state == JobState::kSuspended) history.suspend = false;
  if (is_final(*event.state)) history.width.reset();
  if (*event.state != JobState::kPlacing) return;
  if (event.epoch.value != history.epoch.value + 1) {
    violate(fmt::format("job {} starts epoch {} after epoch {}", event.job, event.epoch,
                        history.epoch));
  }
  history.epoch = event.epoch;
  history.order.reset();
  check_placing(now, *core.find_job(event.job));
}

void CoreInvariants::check_placing(Instant now, const Job& job) {
  const JobHistory& history = jobs_[job.record.id];
  const JobId id = job.record.id;
  const Duration wait = backoff_after(history.failures_without_step);
  if (history.failed_at && now - *history.failed_at < wait) {
    violate(fmt::format("job {} starts {:.1f} s after failure {} without a step", id,
                        to_seconds(now - *history.failed_at), history.failures_without_step));
  }
  if (!history.commits_on_way.empty()) {
    violate(fmt::format("job {} starts while its checkpoint of step {} is being committed", id,
                        history.commits_on_way.begin()->second));
  }
  check_promises(job);
}

// What users asked for is done before the next start; only what is in memory is saved first.
void CoreInvariants::check_promises(const Job& job) {
  if (job.record.restored_from_memory) return;
  JobHistory& history = jobs_[job.record.id];
  if (history.suspend) {
    violate(fmt::format("job {} starts, though it was to be suspended", job.record.id));
  }
  if (history.width && *history.width != job.spec.parallelism.data) {
    violate(fmt::format("job {} starts with data {}, though {} was asked for", job.record.id,
                        job.spec.parallelism.data, *history.width));
  }
  history.width.reset();
}

void CoreInvariants::check_steps(const Coordinator& core, const Effects& effects) {
  for (const StepRecord& step : effects.steps) {
    JobHistory& history = jobs_[step.job];
    if (step.epoch != core.find_job(step.job)->record.epoch) {
      violate(fmt::format("job {}: a step of epoch {} is recorded in epoch {}", step.job,
                          step.epoch, core.find_job(step.job)->record.epoch));
    }
    if (step.cursor() <= history.cursor) {
      violate(fmt::format("job {}: step {} is recorded out of order", step.job, step.step));
    }
    history.cursor = step.cursor();
    history.failures_without_step = 0;
    history.failures_counted = 0;
  }
}

// ---- what is ordered

void CoreInvariants::check_commits(const Coordinator& core, const Effects& effects) {
  for (const CommitCheckpoint& commit : effects.commits) {
    const Job& job = *core.find_job(commit.job);
    const JobRecord& record = job.record;
    if (commit.epoch != record.epoch || record.state != JobState::kRunning) {
      violate(fmt::format("job {} commits for epoch {} in epoch {}, {}", commit.job, commit.epoch,
                          record.epoch, job_state_name(record.state)));
    }
    std::set<Rank> ranks;
    for (const SegmentSaved& segment : commit.segments) {
      ranks.insert(segment.rank);
      const bool of_it =
          segment.job == commit.job && segment.epoch == commit.epoch && segment.step == commit.step;
      if (!of_it) violate(fmt::format("job {} commits a strange segment", commit.job));
    }
    if (std::ssize(ranks) != job.world_size()) {
      violate(fmt::format("job {} commits step {} with segments of {} ranks", commit.job,
                          commit.step, ranks.size()));
    }
    JobHistory& history = jobs_[commit.job];
    if (!history.commits.insert({commit.epoch, commit.step}).second) {
      violate(fmt::format("job {} commits step {} twice", commit.job, commit.step));
    }
    history.commits_on_way.insert({commit.epoch, commit.step});
    const auto& newest = record.checkpoint;
    if (newest && newest->epoch == record.epoch && commit.step <= newest->step) {
      violate(fmt::format("job {} commits step {} after step {}", commit.job, commit.step,
                          newest->step));
    }
  }
}

void CoreInvariants::check_orders(const Coordinator& core, const Effects& effects) {
  const size_t most = 16 + 8 * (core.workers().size() + placements_.size() * kRoundsMax);
  if (effects.messages.size() > most) {
    violate(fmt::format("one event sends {} messages", effects.messages.size()));
  }
  for (const OutgoingMessage& out : effects.messages) {
    if (const auto* start = std::get_if<StartRank>(&out.message)) {
      check_start(*core.find_job(start->job), *start);
    } else if (const auto* begin = std::get_if<BeginTraining>(&out.message)) {
      check_begin(*core.find_job(begin->job), *begin);
    }
  }
}

// A rank that crashed may have written anything, and what others have of it came from it.
void CoreInvariants::note_crash(const Coordinator& core) {
  const auto* exited = said_by_host<RankExited>(core);
  if (exited == nullptr || leaves_sound_state(*exited)) return;
  jobs_[exited->job].crashed.insert(exited->epoch);
}

// Nobody waits any longer for the other ranks' parts of it.
void CoreInvariants::check_failed_save(const Coordinator& core) {
  const auto* failed = said_by_host<SaveFailed>(core);
  if (failed == nullptr) return;
  const Job& job = *core.find_job(failed->job);
  if (job.record.state == JobState::kRunning && job.rounds.contains(failed->step)) {
    violate(fmt::format("job {} waits for its checkpoint of step {}, which rank {} could not save",
                        failed->job, failed->step, failed->rank));
  }
}

void CoreInvariants::check_start(const Job& job, const StartRank& order) {
  const JobRecord& record = job.record;
  if (order.epoch != record.epoch || !wants_ranks(record.state)) {
    return violate(fmt::format("job {}: rank {} is ordered for epoch {} in epoch {}, {}", order.job,
                               order.rank, order.epoch, record.epoch,
                               job_state_name(record.state)));
  }
  const bool after_crash = jobs_[order.job].crashed.contains(Epoch{order.epoch.value - 1});
  if (order.from_memory && after_crash) {
    violate(fmt::format("job {}: epoch {} goes on from memory after a rank of it crashed",
                        order.job, order.epoch));
  }
  std::optional<StartRank>& first = jobs_[order.job].order;
  if (!first) {
    first = order;
    return;
  }
  const bool alike = order.restore_step == first->restore_step &&
                     order.restore_manifest == first->restore_manifest &&
                     order.from_memory == first->from_memory && order.left_out == first->left_out &&
                     order.saved_step >= first->saved_step;
  if (!alike)
    violate(fmt::format("job {}: ranks of epoch {} go on differently", order.job, order.epoch));
}

void CoreInvariants::check_begin(const Job& job, const BeginTraining& order) {
  if (order.epoch != job.record.epoch || job.record.state != JobState::kRunning) {
    violate(fmt::format("job {}: training of epoch {} begins in epoch {}, {}", order.job,
                        order.epoch, job.record.epoch, job_state_name(job.record.state)));
  }
  if (std::ssize(order.addresses) != job.world_size()) {
    violate(fmt::format("job {} begins with {} addresses", order.job, order.addresses.size()));
  }
}

// ---- workers

// The end of a rank ends its attempt at once.
void CoreInvariants::check_exit(const Coordinator& core, const Effects& effects) {
  const auto* said = event_ == nullptr ? nullptr : std::get_if<WorkerMessage>(event_);
  const auto* exited = said == nullptr ? nullptr : std::get_if<RankExited>(&said->message);
  if (exited == nullptr || (exited->exit_code == 0 && exited->signal == 0)) return;
  const Job* const job = core.find_job(exited->job);
  if (job == nullptr || job->record.epoch != exited->epoch) return;
  if (!wants_ranks(job->record.state)) return;
  if (job->ranks.at(static_cast<size_t>(exited->rank.value)).finished) return;
  const bool asked_who_it_is =
      std::any_of(effects.messages.begin(), effects.messages.end(), [&](const auto& out) {
        const auto* answer = std::get_if<Registered>(&out.message);
        return out.peer == said->peer && answer != nullptr && answer->worker.value == 0;
      });
  if (asked_who_it_is) return;
  violate(fmt::format("rank {} of job {} has ended, and the job is {}", exited->rank, exited->job,
                      job_state_name(job->record.state)));
}

// A daemon that another one took the place of never comes back, and with it went its ranks and what
// it held.
void CoreInvariants::check_incarnations(Instant now, const Coordinator& core) {
  const auto* said = event_ == nullptr ? nullptr : std::get_if<WorkerMessage>(event_);
  const auto* registration = said == nullptr ? nullptr : std::get_if<Register>(&said->message);
  const Worker* const worker =
      registration == nullptr ? nullptr : core.find_worker(registration->name);
  if (worker == nullptr) return;
  std::vector<uint64_t>& known = incarnations_[worker->record.id];
  const uint64_t current = worker->record.incarnation;
  if (!known.empty() && known.back() == current) return;
  if (std::find(known.begin(), known.end(), current) != known.end()) {
    violate(fmt::format("worker {} is its daemon of before again", worker->record.name));
  }
  known.push_back(current);
  for (const auto& [id, job] : core.jobs()) {
    const auto of_it = [&](const auto& at) { return at.worker == worker->record.id; };
    const auto& placement = job.record.placement;
    const bool hosts = std::any_of(placement.begin(), placement.end(), of_it);
    if (known.size() > 1 && hosts && wants_ranks(job.record.state) && job.epoch_began != now) {
      violate(fmt::format("job {} is {} with ranks of a daemon that is gone", id,
                          job_state_name(job.record.state)));
    }
    const bool holds = std::any_of(job.held.begin(), job.held.end(),
                                   [&](const auto& held) { return of_it(held.second); });
    if (holds) violate(fmt::format("job {} relies on the memory of a daemon that is gone", id));
  }
}

// ---- jobs as they are

void CoreInvariants::check_jobs(const Coordinator& core, const Effects& effects) {
  const bool few = core.jobs().size() <= kJobsLookedAtAlways;
  if (few || ++looks_ % kLookAtAllEvery == 0) {
    for (const auto& [id, job] : core.jobs()) check_job(core, job);
    return;
  }
  for (const JobRecord& record : effects.jobs) {
    if (const Job* job = core.find_job(record.id)) check_job(core, *job);
  }
}

void CoreInvariants::check_job(const Coordinator& core, const Job& job) {
  const JobRecord& record = job.record;
  const JobId id = record.id;
  JobHistory& history = jobs_[id];
  if (history.ended && *history.ended != record.state) {
    violate(fmt::format("job {} was {} and is {}", id, job_state_name(*history.ended),
                        job_state_name(record.state)));
  }
  if (is_final(record.state)) history.ended = record.state;
  const bool ends = is_final(record.state) || record.state == JobState::kStopping;
  if (history.cancelled && !ends) {
    violate(fmt::format("job {} is cancelled and {}", id, job_state_name(record.state)));
  }
  if (record.epoch != history.epoch) {
    violate(fmt::format("job {} is in epoch {}, which was never placed", id, record.epoch));
  }
  const int64_t restarts_max = job.spec.recovery.max_restarts;
  const bool goes_on = !ends && std::max(record.failures, history.failures) > restarts_max;
  if (goes_on || record.failures > restarts_max + 1) {
    violate(fmt::format("job {} goes on after {} failures, with max_restarts {}", id,
                        record.failures, restarts_max));
  }
  const bool counts_too_many =
      record.failures > history.failures || record.failures_without_step > history.failures_counted;
  if (!ends && counts_too_many) {
    violate(fmt::format("job {} has {} failures on record, {} without a step, of {} and {}", id,
                        record.failures, record.failures_without_step, history.failures,
                        history.failures_counted));
  }
  check_placement(core, job);
  check_bounds(core, job);
}

void CoreInvariants::check_placement(const Coordinator& core, const Job& job) {
  const JobRecord& record = job.record;
  if (job.placed() && std::ssize(record.placement) != job.world_size()) {
    violate(fmt::format("job {} is placed in part", record.id));
  }
  if (wants_ranks(record.state) && !job.placed()) violate("a job runs nowhere");
  if (is_final(record.state) && job.placed()) violate("an ended job holds devices");
  if (job.placed() && job.ranks.size() != record.placement.size()) violate("a gang has no ranks");
  for (const RankPlacement& at : record.placement) {
    const Worker* const worker = core.find_worker(at.worker);
    if (worker == nullptr || at.device >= worker->record.device_count) {
      violate(fmt::format("job {} is placed where no device is", record.id));
    } else if (wants_ranks(record.state) && worker->state == WorkerState::kLost) {
      violate(fmt::format("job {} is {} on {}, which is lost", record.id,
                          job_state_name(record.state), worker->record.name));
    }
  }
  std::vector<RankPlacement>& known = placements_[record.id];
  if (known == record.placement) return;
  for (const RankPlacement& at : known) {
    if (devices_[{at.worker, at.device}] == record.id) devices_.erase({at.worker, at.device});
  }
  for (const RankPlacement& at : record.placement) {
    const auto [holder, is_free] = devices_.try_emplace({at.worker, at.device}, record.id);
    if (is_free) continue;
    const Job* const other = core.find_job(holder->second);
    const bool holds = holder->second == record.id ||
                       (other != nullptr &&
                        std::find(other->record.placement.begin(), other->record.placement.end(),
                                  at) != other->record.placement.end());
    if (holds) violate(fmt::format("device {} of worker {} is given twice", at.device, at.worker));
    holder->second = record.id;
  }
  known = record.placement;
}

void CoreInvariants::check_bounds(const Coordinator& core, const Job& job) {
  const JobRecord& record = job.record;
  const bool bounded =
      job.rounds.size() <= kRoundsMax && job.failed_rounds.size() <= kRoundsMax &&
      job.recent_steps.size() <= kRecentStepsMax && job.evaluations.size() <= kEvaluationsMax &&
      std::ssize(job.held) <= job.world_size() && job.awaiting.size() <= core.workers().size() &&
      (record.proof || (job.recorded.empty() && job.uncompared.empty()));
  if (!bounded) violate(fmt::format("job {} keeps more and more", record.id));
  for (const auto& [step, round] : job.rounds) {
    const auto& newest = record.checkpoint;
    const bool overtaken = newest && newest->epoch == record.epoch && step < newest->step;
    if (overtaken && !round.committing) {
      violate(fmt::format("job {} still waits for the checkpoint of step {}", record.id, step));
    }
  }
  const bool idle = !job.placed() && record.state != JobState::kRecovering;
  const bool saves = !job.rounds.empty() || !job.failed_rounds.empty();
  if ((!job.placed() && saves) || (idle && !(job.held.empty() && job.awaiting.empty()))) {
    violate(fmt::format("job {} is {} and keeps what was of an attempt", record.id,
                        job_state_name(record.state)));
  }
}

}  // namespace penstock
