// A resume that first shows that training is reproducible here: it begins at a checkpoint that some
// recorded steps follow, and every step it trains again must be the recorded one, bit for bit.
#include <algorithm>
#include <bit>
#include <cmath>

#include "comm/base/counted.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/core/failure.h"

namespace penstock {
namespace {

constexpr int64_t kProofStepsMax = 100'000;  // that are kept in memory to compare with
constexpr int64_t kStepsReadMax = 500;       // at a time: workers are heard in between

// The first field of which the replay has other bits, as words; empty: none.
std::string difference(const StepRecord& recorded, const StepRecord& replayed) {
  const std::pair<const char*, double StepRecord::*> fields[] = {
      {"loss", &StepRecord::loss},
      {"gradient norm", &StepRecord::grad_norm},
      {"learning rate", &StepRecord::learning_rate},
      {"prediction loss", &StepRecord::mtp_loss},
      {"balance loss", &StepRecord::balance_loss}};
  for (const auto& [name, field] : fields) {
    const double was = recorded.*field;
    const double is = replayed.*field;
    if (std::bit_cast<uint64_t>(was) == std::bit_cast<uint64_t>(is)) continue;
    if (std::isnan(was) && std::isnan(is)) continue;  // of a step that was left out
    return fmt::format("another {}: {:.17g}, not the {:.17g} of epoch {}", name, is, was,
                       recorded.epoch);
  }
  if (recorded.tokens == replayed.tokens) return {};
  return fmt::format("{} tokens, not the {} of epoch {}", replayed.tokens, recorded.tokens,
                     recorded.epoch);
}

// Whether the replay saves after this step, after which a checkpoint is there. Where we choose the
// interval, we choose it so that it does after the newest (save_interval_of).
bool saves_after(const Job& job, int64_t step) {
  if (job.record.saving) return true;
  const int64_t interval = job.spec.checkpoint.interval;
  return step == job.record.target_steps || (interval > 0 && step % interval == 0);
}

}  // namespace

// Of a ResumeJob; `steps` 0 asks for none.
Status Coordinator::begin_proof(Job& job, int64_t steps) {
  JobRecord& record = job.record;
  if (steps == 0) return {};
  if (steps > kProofStepsMax) {
    return invalid_argument(fmt::format("a proof takes at most {} steps", kProofStepsMax));
  }
  const int64_t recorded = std::max<int64_t>(0, record.highest_step - record.rebalanced_step);
  if (steps > recorded) {
    return failed_precondition(fmt::format(
        "job {} \"{}\" has {} recorded{}, so {} cannot be compared", record.id, record.name,
        counted(recorded, "step"),
        record.rebalanced_step > 0
            ? fmt::format(" since experts or the layout changed at step {}", record.rebalanced_step)
            : "",
        counted(steps, "step")));
  }
  record.proof.emplace();
  record.proof->steps = steps;
  record.proof->epoch = record.epoch;
  record.proof->through = record.highest_step;
  return {};
}

// What is asked for cannot be shown: the job ends, with everything that it saved as it was.
void Coordinator::refuse_proof(Job& job, const CheckpointFound& found) {
  const ProofRecord proof = *job.record.proof;
  int64_t most = 0;  // that some checkpoint allows
  for (const int64_t step : found.steps) {
    if (step >= job.record.rebalanced_step) most = std::max(most, proof.through - step);
  }
  drop_proof(job);
  stop_epoch(
      job, JobState::kStopping, JobState::kFailed, 0, "coordinator",
      {"no_proof",
       fmt::format("no whole checkpoint in {} has from {} to {} recorded steps after it, so the "
                   "replay cannot begin; the oldest has {}",
                   job.record.checkpoint_dir, proof.steps, kProofStepsMax, most)});
}

void Coordinator::place_proof(Job& job, const CheckpointFound& found) {
  JobRecord& record = job.record;
  ProofRecord& proof = *record.proof;
  const bool from_the_start = found.manifest.empty();
  // Initial weights only where nothing was ever saved: a replay must not push out what was, nor
  // take a file system that is not mounted for an empty directory.
  const bool was_saved = record.checkpoint || !found.steps.empty() || !found.refused.empty();
  const bool nothing_fits = from_the_start && (record.rebalanced_step > 0 || was_saved);
  if (nothing_fits || proof.through - found.step > kProofStepsMax) {
    return refuse_proof(job, found);
  }
  record.restore_manifest = found.manifest;
  record.restore_step = found.step;
  record.restored_from_memory = false;
  proof.from = found.step;
  proof.compared = 0;
  proof.tensors = 0;
  proof.digest_step = 0;
  proof.saved_again = 0;
  for (const int64_t step : found.steps) {
    const bool again = step > proof.from && step <= proof.through && saves_after(job, step);
    if (again) proof.digest_step = std::max(proof.digest_step, step);
  }
  job.restore = Restore::kKnown;
  changed(job);
  note(job, "coordinator",
       {"proving",
        fmt::format("trains steps {} to {} again, from {}, and compares them with what "
                    "is recorded",
                    proof.from + 1, proof.through,
                    from_the_start ? "initial weights"
                                   : fmt::format("the checkpoint of step {}", proof.from))});
  read_proof(job, proof.from);
}

// Memory does not survive this process: read when the proof begins, and by a new coordinator, which
// needs only the steps `after` those that were compared.
void Coordinator::read_proof(Job& job, int64_t after) {
  if (!job.record.proof) return;
  job.recorded.clear();
  job.uncompared.clear();
  job.recorded_through = std::max(job.record.proof->from, after);
  read_more(job);
}

void Coordinator::read_more(const Job& job) {
  const ProofRecord& proof = *job.record.proof;
  const int64_t first = job.recorded_through + 1;
  if (first > proof.through) return;
  const int64_t last = std::min(proof.through, first + kStepsReadMax - 1);
  effects_.reads.push_back({job.record.id, proof.epoch, first, last});
}

void Coordinator::on_event(const StepsRead& read) {
  const auto at = jobs_.find(read.job);
  if (at == jobs_.end() || !at->second.record.proof) return;
  Job& job = at->second;
  const ProofRecord& proof = *job.record.proof;
  // Of a replay that has begun anew since.
  if (read.epoch != proof.epoch || read.first != job.recorded_through + 1) return;
  for (const StepRecord& step : read.steps) job.recorded[step.step] = step;
  job.recorded_through = read.last;
  if (!read.status.ok()) {
    note(job, "coordinator", {"proof_unreadable", read.status.message()});
    job.recorded_through = proof.through;
  }
  read_more(job);
  const auto& waiting = job.uncompared;  // while RECOVERING: of an attempt that is over
  while (job.record.state == JobState::kRunning && !waiting.empty() &&
         waiting.front().step <= job.recorded_through) {
    const StepRecord step = waiting.front();
    job.uncompared.pop_front();
    compare_step(job, step);
  }
}

void Coordinator::compare_step(Job& job, const StepRecord& step) {
  if (!job.record.proof) return;
  if (step.step > job.recorded_through && step.step <= job.record.proof->through) {
    return job.uncompared.push_back(step);
  }
  if (const auto recorded = job.recorded.find(step.step); recorded != job.recorded.end()) {
    const std::string other = difference(recorded->second, step);
    if (!other.empty()) {
      return fail_proof(job, fmt::format("step {}, trained again from step {}, has {}", step.step,
                                         job.record.proof->from, other));
    }
    ++job.record.proof->compared;
    job.recorded.erase(recorded);
  }
  conclude_proof(job);
}

// Until the outcome is known a replay commits nothing: what another host trained may not be what a
// resume begins at, nor push out what was saved. Its checkpoints of recorded steps are compared and
// removed. Of those after them, the newest waits, and is committed when the proof is made.
bool Coordinator::waits_for_proof(Job& job, int64_t step) {
  if (!job.record.proof) return false;
  ProofRecord& proof = *job.record.proof;
  if (step < proof.through || step == proof.digest_step) return false;
  // Ranks save one after the other: the one to be compared, if it is not here by now, was left out.
  if (!job.commit_in_flight()) proof.saved_again = proof.digest_step;
  return true;
}

void Coordinator::compare_checkpoint(Job& job, const CheckpointDone& done) {
  const bool equal = done.tensors_equal > 0 && done.difference.empty();
  tell_outcome(job, done.step, equal, equal ? "" : "a replay commits nothing before it is proved");
  // Where a rank has failed meanwhile the replay begins anew, and compares it then.
  if (!job.record.proof || job.record.state != JobState::kRunning) return;
  job.record.proof->saved_again = done.step;
  if (!done.difference.empty()) {
    return fail_proof(job, fmt::format("the checkpoint of step {}, saved again, has {}", done.step,
                                       done.difference));
  }
  job.record.proof->tensors += done.tensors_equal;
  changed(job);
}

void Coordinator::fail_proof(Job& job, std::string message) {
  Failure failure;
  failure.reason = {kCauseNotReproduced, std::move(message)};
  failure.fatal = true;
  drop_proof(job);
  fail(job, std::move(failure));
}

// Undecided, or without success: what was trained for it is not the job's past. Steps beyond the
// recorded ones, which may have been trained while a checkpoint was compared, have not happened.
void Coordinator::drop_proof(Job& job) {
  if (!job.record.proof) return;
  job.record.highest_step = job.record.proof->through;
  job.record.proof.reset();
  job.recorded.clear();
  job.uncompared.clear();
}

// Once every recorded step was trained again, and the checkpoint among them saved again.
void Coordinator::conclude_proof(Job& job) {
  JobRecord& record = job.record;
  if (!record.proof || record.state != JobState::kRunning) return;
  const ProofRecord proof = *record.proof;
  const auto& newest = record.last_step;
  const bool trained = newest && newest->epoch == record.epoch && newest->step >= proof.through &&
                       job.uncompared.empty();
  if (!trained || proof.saved_again < proof.digest_step) return;
  if (proof.compared == 0) {
    return fail_proof(job, fmt::format("nothing is recorded of steps {} to {} to compare with",
                                       proof.from + 1, proof.through));
  }
  std::string text = fmt::format(
      "steps {} to {} were trained again, and every loss and gradient "
      "norm is equal bit for bit",
      proof.from + 1, proof.through);
  const int64_t unknown = proof.through - proof.from - proof.compared;
  if (unknown > 0)
    text += fmt::format(", but for {} that no record was left of", counted(unknown, "step"));
  text += proof.tensors > 0 ? fmt::format("; so are the digests of {} saved again",
                                          counted(proof.tensors, "tensor"))
                            : "; no checkpoint was saved again to compare";
  record.proof.reset();
  job.recorded.clear();
  changed(job);
  note(job, "coordinator", {"proved", std::move(text)});
  if (record.saving) send_save_interval(job);
  for (auto round = job.rounds.rbegin(); round != job.rounds.rend(); ++round) {
    const bool waits = std::ssize(round->second.segments) == job.world_size();
    if (waits && !round->second.committing) return commit_round(job, round->first);
  }
}

}  // namespace penstock
