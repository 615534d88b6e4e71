// Slow ranks: how long each rank computes, as its daemon counts it up in every heartbeat, cut into
// windows; what coordinator/core/slow_ranks.h makes of them, as events; and, where the spec asks
// for it, the move of the job off the host that slows it down.
//
// All of it is learned anew by a coordinator that starts, and by an epoch that begins.
#include <algorithm>
#include <limits>

#include "comm/base/counted.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/core/placement.h"
#include "coordinator/plan/expert_placement.h"

namespace penstock {
namespace {

constexpr int64_t kWindowSteps = 5;

std::string share(double value) {
  return fmt::format("{:.0f}%", 100.0 * value);
}

// As far as is known, the load of the busiest rank of an expert group over the mean.
double imbalance_of(const Job& job) {
  const int64_t ranks = job.spec.parallelism.expert;
  if (ranks == 1) return 1.0;
  if (!job.loads.empty()) return largest_imbalance(job.loads, job.seats, ranks);
  const double of_experts =
      job.record.last_step ? job.record.last_step->expert_load_max_ratio : 1.0;
  return std::min(of_experts, static_cast<double>(ranks));
}

}  // namespace

void Coordinator::forget_pace(Job& job) {
  job.paces.clear();
  job.slow.clear();
  job.pace_since = now_;
  job.pace_begun = false;
  for (RankView& rank : job.ranks) rank.pace_at = rank.pace;
}

// Closes a window when every rank has trained enough for one, and judges the newest.
void Coordinator::watch_pace(Job& job) {
  if (config_.slow_ratio == 0.0 || job.record.state != JobState::kRunning) return;
  if (now_ - job.pace_since < config_.slow_span) return;
  int64_t steps = std::numeric_limits<int64_t>::max();
  for (const RankView& rank : job.ranks) {
    steps = std::min(steps, rank.pace.steps - rank.pace_at.steps);
  }
  if (steps < kWindowSteps) return;
  PaceWindow window;
  for (RankView& rank : job.ranks) {
    const auto count = static_cast<double>(rank.pace.steps - rank.pace_at.steps);
    window.ranks.push_back({(rank.pace.busy_seconds - rank.pace_at.busy_seconds) / count,
                            (rank.pace.wait_seconds - rank.pace_at.wait_seconds) / count});
    rank.pace_at = rank.pace;
    window.last_step = std::max(window.last_step, rank.step);
  }
  window.first_step = window.last_step - steps + 1;
  job.pace_since = now_;
  // The first steps of an epoch are not like those that follow, nor is what a coordinator that has
  // just started finds counted up.
  if (!std::exchange(job.pace_begun, true)) return;
  job.paces.push_back(std::move(window));
  if (job.paces.size() > kPaceWindowsMax) job.paces.pop_front();
  const auto verdicts = judge_pace(job.spec.parallelism, job.paces,
                                   {.ratio = config_.slow_ratio, .imbalance = imbalance_of(job)});
  for (int32_t rank = 0; rank < std::ssize(verdicts); ++rank) {
    note_pace(job, Rank{rank}, verdicts[static_cast<size_t>(rank)]);
  }
  std::vector<Rank> slow;
  for (const auto& [rank, found] : job.slow) slow.push_back(rank);
  for (const Rank rank : slow) replace_slow(job, rank);
}

void Coordinator::note_pace(Job& job, Rank rank, const RankPaceVerdict& verdict) {
  const auto known = job.slow.find(rank);
  const std::string where =
      fmt::format("rank {} on {}", rank,
                  worker_name(job.record.placement[static_cast<size_t>(rank.value)].worker));
  if (known != job.slow.end()) {
    if (verdict.slow) {
      known->second.ratio = verdict.ratio;
      known->second.busy_seconds = verdict.busy_seconds;
      known->second.usual_seconds = verdict.usual_seconds;
    } else if (verdict.usual) {
      job.slow.erase(known);
      note(job, "coordinator", {kSlowRankOver, where + " computes no longer than usual any more"},
           rank);
    }
    return;
  }
  if (!verdict.slow) return;
  const std::string usual = verdict.peers == 0 ? "before"
                            : verdict.peers == 1
                                ? "the rank that does the same"
                                : fmt::format("the {} ranks that do the same", verdict.peers);
  SlowRank& slow = job.slow[rank];
  slow.since_step = verdict.since_step;
  slow.ratio = verdict.ratio;
  slow.busy_seconds = verdict.busy_seconds;
  slow.usual_seconds = verdict.usual_seconds;
  slow.words = fmt::format(
      "{} is slow since step {}: it computes {:.1f} times as long as {}, {:.1f} ms of a step "
      "instead "
      "of {:.1f}, and waits for {} of its time, while others wait for {}",
      where, verdict.since_step, verdict.ratio, usual, 1e3 * verdict.busy_seconds,
      1e3 * verdict.usual_seconds, share(verdict.wait_share), share(verdict.peers_wait_share));
  note(job, "coordinator", {kSlowRank, slow.words}, rank);
}

// With recovery.replace_slow: off that host, with the state saved. Not when there is no room
// elsewhere, nor more often than the job may fail.
void Coordinator::replace_slow(Job& job, Rank rank) {
  if (!job.spec.recovery.replace_slow || job.record.state != JobState::kRunning) return;
  if (wanted_pause(job)) return;
  SlowRank& slow = job.slow.at(rank);
  Worker& worker = workers_.at(job.record.placement[static_cast<size_t>(rank.value)].worker);
  const std::string why = why_slow_stays(job, worker);
  if (!why.empty()) {
    if (std::exchange(slow.kept_because, why) != why) {
      note(job, "coordinator",
           {"slow_rank_kept", fmt::format("rank {} stays on {}, although it is slow: {}", rank,
                                          worker.record.name, why)},
           rank);
    }
    return;
  }
  ++job.record.replacements;
  changed(job);
  put_in_quarantine(worker,
                    {{kQuarantineSlow,
                      fmt::format("job {} \"{}\": {}", job.record.id, job.record.name, slow.words)},
                     false,
                     now_,
                     now_ + config_.quarantine_window},
                    "coordinator");
}

std::string Coordinator::why_slow_stays(const Job& job, const Worker& worker) const {
  if (job.record.replacements >= job.spec.recovery.max_restarts) {
    return fmt::format("ranks were replaced {} already (recovery.max_restarts)",
                       counted(job.record.replacements, "time"));
  }
  std::map<WorkerId, std::vector<int32_t>> devices;
  for (FreeDevices& free : free_on_workers()) devices[free.worker] = std::move(free.devices);
  for (const RankPlacement& at : job.record.placement) devices[at.worker].push_back(at.device);
  devices.erase(worker.record.id);
  std::vector<FreeDevices> elsewhere;
  for (auto& [id, list] : devices) {
    std::sort(list.begin(), list.end());
    if (workers_.at(id).takes_ranks()) elsewhere.push_back({id, std::move(list)});
  }
  if (!place(job.spec.parallelism, std::move(elsewhere))) {
    return "no other worker has room for it";
  }
  return why_trusted_on(worker);
}

}  // namespace penstock
