// Hangs: when a job has been silent for too long, its hosts are asked what its ranks do, and what
// they say gives the verdict.
//
// Silence counts only while this coordinator listened: it begins anew when the coordinator starts,
// when a worker registers, and is not counted while ticks are late. It only leads to a question;
// the verdict rests on what every rank was found doing. Where a host is silent too the question
// comes early: if all the others wait for that host's ranks, it is cut off from them as well, and
// nothing is gained by waiting for the end of its lease.
#include <algorithm>

#include "comm/base/counted.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/core/failure.h"
#include "coordinator/core/hang_verdict.h"

namespace penstock {
namespace {

// Of the slowest of the recent steps.
constexpr int kStepFactor = 5;

Duration several_steps(const Job& job) {
  double slowest_seconds = 0.0;
  for (const StepRecord& step : job.recent_steps) {
    slowest_seconds = std::max(slowest_seconds, step.step_seconds);
  }
  // A figure of a rank's: bounded, so that it stays a duration.
  const std::chrono::duration<double> slowest(std::min(slowest_seconds, 86'400.0));
  return std::chrono::duration_cast<Duration>(kStepFactor * slowest);
}

HangLimits limits_of(const Job& job) {
  const Duration least = std::chrono::seconds(job.spec.recovery.hang_timeout);
  HangLimits limits;
  limits.stopped = std::max(least, several_steps(job));
  limits.slow = std::max(kSlowPhaseFactor * least, limits.stopped);
  limits.training = job.recent_steps.empty() ? limits.slow : limits.stopped;
  return limits;
}

}  // namespace

// Something of the job has come: it moves.
void Coordinator::heard_of(Job& job) {
  job.heard_at = now_;
  job.inquiry.reset();
  job.ask_after = {};
}

void Coordinator::watch_for_hang(Job& job) {
  if (!wants_ranks(job.record.state) || job.spec.recovery.hang_timeout == 0) return;
  if (job.inquiry) {
    if (now_ - job.inquiry->asked_at >= two_beats()) conclude_inquiry(job);
    return;
  }
  const Duration silence = now_ - job.heard_at;
  if (silence < patience_of(job) || now_ < job.ask_after) return;
  job.inquiry.emplace();
  job.inquiry->request = ++job.inquiries;
  job.inquiry->asked_at = now_;
  effects_.log.push_back(
      {LogLevel::kInfo, fmt::format("no report of job {} \"{}\" for {:.1f} s: asking {} what its "
                                    "ranks do",
                                    job.record.id, job.record.name, to_seconds(silence),
                                    counted(std::ssize(hosts(job)), "host"))});
  for (const WorkerId worker : hosts(job)) {
    job.inquiry->awaiting.insert(worker);
    send(worker, InspectRanks{job.record.id, job.record.epoch, job.inquiry->request});
  }
}

void Coordinator::on_message(Worker& worker, const RanksInspected& message) {
  Job* job = current_epoch(message.job, message.epoch);
  if (!job || !job->inquiry || job->inquiry->request != message.request) return;
  // One that was long on its way says what was, not what is.
  if (now_ - job->inquiry->asked_at > two_beats()) return;
  for (const RankActivity& activity : message.ranks) {
    if (hosted_rank(*job, activity.rank, worker.record.id)) {
      job->inquiry->answers[activity.rank] = activity;
    }
  }
  job->inquiry->awaiting.erase(worker.record.id);
  // Of a host that is silent no answer will come.
  const std::set<WorkerId>& awaiting = job->inquiry->awaiting;
  const bool over = std::all_of(awaiting.begin(), awaiting.end(),
                                [&](WorkerId other) { return is_silent(workers_.at(other)); });
  if (over) conclude_inquiry(*job);
}

void Coordinator::conclude_inquiry(Job& job) {
  const HangInquiry inquiry = *std::exchange(job.inquiry, std::nullopt);
  std::vector<const RankActivity*> ranks;
  std::vector<std::string> names;
  std::vector<bool> unheard;
  for (int32_t rank = 0; rank < std::ssize(job.record.placement); ++rank) {
    const auto answer = inquiry.answers.find(Rank{rank});
    ranks.push_back(answer == inquiry.answers.end() ? nullptr : &answer->second);
    const WorkerId worker = job.record.placement[rank].worker;
    names.push_back(worker_name(worker));
    unheard.push_back(is_silent(workers_.at(worker)));
  }
  const std::optional<HangVerdict> hung = find_hung(ranks, names, limits_of(job));
  const auto unreachable = find_unreachable(ranks, names, unheard, patience_of(job));
  const std::optional<HangVerdict>& verdict = hung ? hung : unreachable;
  if (!verdict) {
    job.ask_after = now_ + std::max(two_beats(), patience_of(job) / 4);
    return;
  }
  Failure failure;
  failure.rank = verdict->rank;
  failure.worker = names[verdict->rank.value];
  failure.reason = {hung ? kCauseRankHung : kCauseWorkerLost, verdict->message, verdict->log_tail};
  // To stop a process is somebody's doing, as to kill it.
  failure.host_suspect = hung && ranks[verdict->rank.value]->process == ProcessState::kDiskSleep;
  blame_host(job, std::move(failure));
}

// How long nothing may be heard of the job before its hosts are asked.
Duration Coordinator::patience_of(const Job& job) const {
  const Duration usual = limits_of(job).stopped;
  const std::set<WorkerId> placed_on = hosts(job);
  const bool all_heard = std::none_of(placed_on.begin(), placed_on.end(), [&](WorkerId worker) {
    return is_silent(workers_.at(worker));
  });
  if (all_heard || job.recent_steps.empty()) return usual;
  const Duration silent_after = config_.silent_beats * config_.heartbeat_interval;
  return std::min(usual, std::max(silent_after, several_steps(job)));
}

}  // namespace penstock
