// What ranks report through their daemons: readiness, steps, checkpoints, ends.
#include <algorithm>

#include "comm/base/byte_text.h"
#include "comm/base/exit_codes.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/core/failure.h"

namespace penstock {
namespace {

constexpr int64_t kStepMax = (int64_t{1} << 32) - 1;  // what a cursor can hold

// The newest step of this epoch that is committed, or about to be; -1: none.
int64_t newest_saved_step(const Job& job) {
  const auto& checkpoint = job.record.checkpoint;
  int64_t newest = checkpoint && checkpoint->epoch == job.record.epoch ? checkpoint->step : -1;
  for (const auto& [step, round] : job.rounds) {
    if (round.committing) newest = std::max(newest, step);
  }
  return newest;
}

std::string overtaken(int64_t newer_step) {
  return fmt::format("overtaken by the checkpoint of step {}", newer_step);
}

}  // namespace

void Coordinator::on_message(Worker& worker, const RankReady& message) {
  Job* job = current_epoch(message.job, message.epoch);
  RankView* rank = job ? hosted_rank(*job, message.rank, worker.record.id) : nullptr;
  if (!rank || !wants_ranks(job->record.state)) return;
  if (job->data.empty() && !message.data.empty()) {
    job->data = message.data;
    effects_.data.push_back({job->record.id, job->data});
  } else if (auto failure = data_changed(job->data, message, worker.record.name)) {
    return fail(*job, *std::move(failure));
  }
  rank->seen = true;
  rank->missing_since.reset();
  rank->missing_beats = 0;
  rank->address = message.address;
  if (rank->state == RankState::kStarting) rank->state = RankState::kReady;
  heard_of(*job);
  advance(*job);
}

void Coordinator::on_message(Worker& worker, const RankExited& message) {
  Job* job = current_epoch(message.job, message.epoch);
  if (!job) {  // an attempt that is over: the order to stop it is also the acknowledgement
    return send(worker.record.id, StopRanks{message.job, message.epoch, 0, "this attempt is over"});
  }
  RankView* rank = hosted_rank(*job, message.rank, worker.record.id);
  if (!rank) return;
  if (!leaves_sound_state(message)) job->untrusted.insert(message.rank);
  const bool clean = message.exit_code == 0 && message.signal == 0;
  if (clean || rank->finished) {
    rank->finished = true;
    return check_finished(*job);
  }
  if (!wants_ranks(job->record.state) && was_ordered(message)) return;
  const auto& last_step = job->record.last_step;
  const bool trained = job->record.state == JobState::kRunning ||
                       (last_step && last_step->epoch == job->record.epoch);
  RankPhase phase = RankPhase::kTraining;
  if (!trained) {
    const bool restores = job->record.restored_from_memory || !job->record.restore_manifest.empty();
    phase = restores ? RankPhase::kRestoring : RankPhase::kLoading;
  }
  Failure failure = failure_of(message, worker.record.name, phase);
  // Of an attempt that nobody here stops: its daemon is asked to end.
  if (was_ordered(message)) failure.reason.code = kCauseWorkerLeft;
  if (failure.reason.code == kCauseDiverged) {
    const auto& checkpoint = job->record.checkpoint;
    failure.reason.message +=
        checkpoint ? fmt::format("; the last good checkpoint is of step {}", checkpoint->step)
                   : "; there is no checkpoint from before";
  }
  if (failure.reason.code == kCausePeerLost) {
    for (const WorkerId host : hosts(*job)) {
      if (is_silent(workers_.at(host))) failure = failure_of_silent(workers_.at(host));
    }
  }
  blame_host(*job, std::move(failure));
}

void Coordinator::on_message(Worker& worker, const RanksStopped& message) {
  const auto stale = worker.stale.find(message.job);
  if (stale != worker.stale.end() && stale->second <= message.epoch) {
    worker.stale.erase(stale);
    schedule_needed_ = true;
  }
  if (Job* job = current_epoch(message.job, message.epoch)) {
    if (wants_held_state(*job)) keep_held(*job, worker.record.id, message);
    worker_stopped(*job, worker.record.id);
  }
  let_go_of_held(worker, message);
}

void Coordinator::on_message(Worker& worker, const StepReport& message) {
  Job* job = current_epoch(message.job, message.epoch);
  if (!job || !hosted_rank(*job, Rank{0}, worker.record.id)) return;
  JobRecord& record = job->record;
  // Also what was on its way when the attempt failed: what daemons hold of it is of use up to the
  // newest step on record. Not while steps are taken back or experts move: what comes late then is
  // of a training that the next attempt does not continue.
  const bool late = !job->awaiting.empty() && wants_held_state(*job);
  if (record.state != JobState::kRunning && !late) return;
  const bool in_epoch = record.last_step && record.last_step->epoch == message.epoch;
  const int64_t newest = in_epoch ? record.last_step->step : record.restore_step;
  if (message.step <= newest || message.step > std::min(record.target_steps, kStepMax)) return;
  if (message.guard.action == GuardPolicy::kRollback) return roll_back(*job, message);
  StepRecord step;
  step.job = record.id;
  step.epoch = message.epoch;
  step.step = message.step;
  step.loss = message.loss;
  step.grad_norm = message.grad_norm;
  step.learning_rate = message.learning_rate;
  step.tokens = message.tokens;
  step.step_seconds = message.step_seconds;
  step.expert_load_max_ratio = message.expert_load_max_ratio;
  step.mtp_loss = message.mtp_loss;
  step.balance_loss = message.balance_loss;
  step.checkpoint_seconds = message.checkpoint_seconds;
  step.replayed = message.step <= record.highest_step;
  step.in_proof = record.proof && message.step <= record.proof->through;
  step.finished = {message.finished_at_ns};
  step.guard = message.guard;
  record.highest_step = std::max(record.highest_step, message.step);
  record.failures_without_step = 0;
  record.last_step = step;
  const bool left_out =  // by a rollback: took no time
      step.guard.signal == GuardSignal::kNone && step.guard.action == GuardPolicy::kSkip;
  if (!left_out) job->recent_steps.push_back(step);
  if (job->recent_steps.size() > kRecentStepsMax) job->recent_steps.pop_front();
  heard_of(*job);
  effects_.steps.push_back(step);
  relaxed_jobs_.insert(record.id);
  if (!left_out) measure_step(*job, step);
  note_guard(*job, step);
  compare_step(*job, step);
  keep_mirroring(*job);
}

void Coordinator::on_message(Worker& worker, const EvaluationReport& message) {
  Job* job = current_epoch(message.job, message.epoch);
  if (!job || job->record.state != JobState::kRunning) return;
  if (!hosted_rank(*job, Rank{0}, worker.record.id)) return;
  if (message.step < 0 || message.step > std::min(job->record.target_steps, kStepMax)) return;
  const bool repeated = !job->evaluations.empty() &&
                        job->evaluations.back().epoch == message.epoch &&
                        job->evaluations.back().step >= message.step;
  if (repeated) return;
  const EvaluationRecord evaluation{message.job,  message.epoch,  message.step,
                                    message.loss, message.tokens, now_};
  job->evaluations.push_back(evaluation);
  if (job->evaluations.size() > kEvaluationsMax) job->evaluations.pop_front();
  heard_of(*job);
  effects_.evaluations.push_back(evaluation);
}

void Coordinator::on_message(Worker& worker, const SegmentSaved& message) {
  Job* job = current_epoch(message.job, message.epoch);
  if (!job || job->record.state != JobState::kRunning) return;
  if (!hosted_rank(*job, message.rank, worker.record.id)) return;
  JobRecord& record = job->record;
  const auto answer = [&](bool committed, const std::string& reason) {
    send(worker.record.id,
         CheckpointOutcome{record.id, record.epoch, message.step, committed, reason});
  };
  if (record.checkpoint && record.checkpoint->epoch == record.epoch &&
      record.checkpoint->step == message.step) {
    return answer(true, {});
  }
  if (const auto failed = job->failed_rounds.find(message.step);
      failed != job->failed_rounds.end()) {
    return answer(false, failed->second);
  }
  if (record.proof && message.step <= record.proof->saved_again) return answer(true, {});
  if (message.step < 0 || message.step > record.target_steps) return;
  if (const int64_t newest = newest_saved_step(*job); message.step < newest) {
    // Committing it now would make it the newest again.
    return answer(false, overtaken(newest));
  }
  CheckpointRound& round = job->rounds[message.step];
  if (round.committing) return;
  if (round.segments.empty()) round.opened = now_;
  SegmentSaved& segment = round.segments[message.rank] = message;
  segment.slices.clear();
  round.pauses |= message.pauses;
  heard_of(*job);
  if (std::ssize(round.segments) < job->world_size()) return;
  if (waits_for_proof(*job, message.step)) return conclude_proof(*job);
  commit_round(*job, message.step);
}

// REQUIRES: every segment of it is there.
void Coordinator::commit_round(Job& job, int64_t step) {
  const JobRecord& record = job.record;
  CheckpointRound& round = job.rounds.at(step);
  round.committing = true;
  CommitCheckpoint commit;
  commit.job = record.id;
  commit.epoch = record.epoch;
  commit.step = step;
  commit.directory = record.checkpoint_dir;
  commit.spec_json = to_json(job.spec);
  commit.layout = layout_text(job.spec.parallelism);
  commit.keep_last = job.spec.checkpoint.keep_last;
  commit.keep_every = job.spec.checkpoint.keep_every;
  commit.compare = record.proof.has_value();
  commit.at = now_;
  for (const auto& [rank, saved] : round.segments) commit.segments.push_back(saved);
  effects_.commits.push_back(std::move(commit));
}

void Coordinator::on_message(Worker& worker, const SaveFailed& message) {
  Job* job = current_epoch(message.job, message.epoch);
  if (!job || job->record.state != JobState::kRunning) return;
  if (!hosted_rank(*job, message.rank, worker.record.id)) return;
  if (message.step < 0 || message.step > job->record.target_steps) return;
  const auto round = job->rounds.find(message.step);
  if (round != job->rounds.end() && round->second.committing) return;
  if (const auto failed = job->failed_rounds.find(message.step);
      failed != job->failed_rounds.end()) {
    return send(worker.record.id,
                CheckpointOutcome{message.job, message.epoch, message.step, false, failed->second});
  }
  fail_round(*job, message.step,
             fmt::format("rank {} on {}: {}", message.rank, worker.record.name, message.reason));
}

// Rounds below a committed step will not be completed: what they wait for was lost.
void Coordinator::drop_overtaken_rounds(Job& job, int64_t committed_step) {
  std::erase_if(job.rounds, [&](const auto& entry) {
    const auto& [step, round] = entry;
    if (step >= committed_step || round.committing) return false;
    tell_outcome(job, step, false, overtaken(committed_step));
    return true;
  });
}

void Coordinator::fail_round(Job& job, int64_t step, const std::string& reason) {
  job.rounds.erase(step);
  job.failed_rounds[step] = reason;
  std::string kept = "there is no earlier one";
  if (job.record.checkpoint)
    kept = fmt::format("the one of step {} stays", job.record.checkpoint->step);
  note(job, "coordinator",
       {"checkpoint_failed",
        fmt::format("the checkpoint of step {} could not be saved ({}); {}", step, reason, kept)});
  tell_outcome(job, step, false, reason);
  on_save_failed(job, reason);
  if (auto& proof = job.record.proof) proof->saved_again = std::max(proof->saved_again, step);
  conclude_proof(job);  // it may have waited for that checkpoint
}

void Coordinator::tell_outcome(Job& job, int64_t step, bool committed, const std::string& reason) {
  job.saves.on_failure(step);  // of one that was committed the meter has taken what it cost
  for (const WorkerId worker : hosts(job)) {
    send(worker, CheckpointOutcome{job.record.id, job.record.epoch, step, committed, reason});
  }
  if (job.record.saving) send_save_interval(job);
}

void Coordinator::on_event(const CheckpointDone& done) {
  // A new epoch waits for commits in flight, so the epoch is still the current one.
  Job* job = current_epoch(done.job, done.epoch);
  if (!job) return;
  const auto round = job->rounds.find(done.step);
  if (round == job->rounds.end() || !round->second.committing) return;
  heard_of(*job);
  const bool pauses = round->second.pauses;
  if (!done.status.ok()) {
    fail_round(*job, done.step, done.status.message());
  } else if (done.compared) {
    job->rounds.erase(round);
    drop_overtaken_rounds(*job, done.step);
    compare_checkpoint(*job, done);
  } else {
    job->rounds.erase(round);
    drop_overtaken_rounds(*job, done.step);
    job->record.checkpoint = done.checkpoint;
    job->record.checkpoint->step = done.step;
    job->record.checkpoint->epoch = done.epoch;
    job->record.checkpoint->committed = now_;
    changed(*job);
    note(*job, "coordinator",
         {"checkpoint_committed",
          fmt::format("checkpoint of step {}, {}", done.step,
                      format_bytes(static_cast<double>(done.checkpoint.bytes)))});
    measure_commit(*job, done.step);
    tell_outcome(*job, done.step, true, {});
    if (pauses) {
      on_paused(*job, done.step);
    } else {
      rebalance_at_checkpoint(*job, done.step);
      grow_at_checkpoint(*job);
    }
  }
  conclude_proof(*job);
  check_finished(*job);
  settle(*job);
}

// Known, and nothing more: a start that wants this checkpoint finds out what it needs of it.
void Coordinator::on_event(const CheckpointDamaged& damaged) {
  const Job* job = find_job(damaged.job);
  if (job != nullptr) note(*job, "coordinator", {"checkpoint_damaged", damaged.damage});
}

void Coordinator::on_message(Worker& worker, const RankFinished& message) {
  Job* job = current_epoch(message.job, message.epoch);
  RankView* rank = job ? hosted_rank(*job, message.rank, worker.record.id) : nullptr;
  if (!rank) return;
  rank->finished = true;
  rank->state = RankState::kFinished;
  rank->step = std::max(rank->step, message.step);
  check_finished(*job);
}

void Coordinator::on_message(Worker& worker, const LogChunk& message) {
  // Output may arrive after its epoch was stopped, and says why; only a rank that was never placed
  // here is refused.
  const auto job = jobs_.find(message.job);
  if (job == jobs_.end() || message.epoch > job->second.record.epoch) return;
  if (message.rank.value < 0 || message.rank.value >= job->second.world_size()) return;
  if (Job* current = current_epoch(message.job, message.epoch);
      current && !hosted_rank(*current, message.rank, worker.record.id)) {
    return;
  }
  effects_.log_chunks.push_back(message);
}

}  // namespace penstock
