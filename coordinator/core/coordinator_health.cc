// Health: hosts that are not trusted with ranks.
//
//   failure that points to its host ─► evidence, on record; nothing new is placed ─► CheckHost
//        ├─ passed, and there is not enough evidence ─► takes ranks again
//        └─ failed, or enough evidence, or a rank computed wrongly ─► quarantine: jobs move off
//             ─► it is over, or penstock release ─► CheckHost ─► passed ─► takes ranks again
//
// Evidence is forgotten after CoreConfig::quarantine_window, and failures that follow a job from
// host to host are the job's, not its hosts'. What is put in quarantine here, rather than by a
// user, never keeps the cluster from running what it runs (why_trusted_on).
#include <algorithm>

#include "comm/base/counted.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/core/failure.h"

namespace penstock {
namespace {

constexpr size_t kEvidenceBytesMax = 500;
// At most one worker in so many is put in quarantine without a user's doing, so that what befalls
// every host alike (a broken driver, a bad build) does not take them all.
constexpr int64_t kWorkersPerQuarantine = 4;
// Heartbeats that were long on their way, or waited while this process was stopped, look like a
// clock that is behind: the quickest of so many, of so long, counts.
constexpr int64_t kClockBeats = 5;
constexpr Duration kClockSpan = std::chrono::seconds(10);

std::string described(const HostEvidence& evidence) {
  return fmt::format("{} {}, job {} after step {}: {}", format_utc(evidence.at), evidence.code,
                     evidence.job, evidence.step, evidence.message);
}

}  // namespace

void Coordinator::on_event(const QuarantineWorker& quarantine) {
  const auto named = worker_by_name_.find(quarantine.worker);
  if (named == worker_by_name_.end()) {
    effects_.answers.push_back(
        {quarantine.request,
         not_found(fmt::format("no worker is named \"{}\"", quarantine.worker)),
         {}});
    return;
  }
  Worker& worker = workers_.at(named->second);
  effects_.answers.push_back({quarantine.request, {}, {}});
  if (!quarantine.reason) {
    if (worker.record.quarantine) release_when_sound(worker, "user");
    return;
  }
  const Quarantine asked{{kQuarantineRequested, *quarantine.reason}, true, now_, std::nullopt};
  const auto& known = worker.record.quarantine;
  const bool as_it_is =
      known && known->by_user && !known->releasing && known->reason == asked.reason;
  if (as_it_is) return;
  put_in_quarantine(worker, asked, "user");
}

// As fail(). When it is the cause and points to its host, that is remembered of the host: what only
// follows from another failure is not.
void Coordinator::blame_host(Job& job, Failure failure) {
  const int64_t failures = job.record.failures;
  const std::optional<Failure> before = job.record.last_failure;
  const Failure given = failure;
  fail(job, std::move(failure));
  const auto& adopted = job.record.last_failure;
  const bool is_cause = (job.record.failures != failures || adopted != before) && adopted &&
                        adopted->reason == given.reason && adopted->rank == given.rank;
  if (is_cause) suspect(job, *adopted);
}

void Coordinator::suspect(const Job& job, const Failure& failure) {
  const bool miscomputed = failure.reason.code == kCauseSilentCorruption;
  const auto named = worker_by_name_.find(failure.worker);
  if (named == worker_by_name_.end() || (!failure.host_suspect && !miscomputed)) return;
  Worker& worker = workers_.at(named->second);
  std::vector<HostEvidence>& evidence = worker.record.evidence;
  std::erase_if(evidence,
                [&](const HostEvidence& old) { return now_ - old.at > config_.quarantine_window; });
  if (evidence.size() == kHostEvidenceMax) evidence.erase(evidence.begin());
  evidence.push_back({now_, failure.reason.code, job.record.id, job.record.epoch, failure.rank,
                      failure.step, failure.reason.message.substr(0, kEvidenceBytesMax)});
  worker.check_request = 0;
  worker.record.check_due |= !worker.record.quarantine.has_value();
  ask_for_check(worker);
  effects_.workers.push_back(worker.record);
  exonerate(job, failure);
  if (worker.record.quarantine) return;
  if (miscomputed) {
    return quarantine_unless_needed(worker, {kQuarantineMiscomputes, described(evidence.back())},
                                    std::nullopt);
  }
  const std::vector<HostEvidence> against = counted_evidence(worker);
  const int64_t most = config_.quarantine_failures;
  if (most == 0 || std::ssize(against) < most) return;
  std::string words = fmt::format("{} that point to this host within {:.0f} min",
                                  counted(std::ssize(against), "failure"),
                                  to_seconds(config_.quarantine_window) / 60.0);
  for (const HostEvidence& one : against) words += "; " + described(one);
  quarantine_unless_needed(worker, {kQuarantineFailures, std::move(words)},
                           now_ + config_.quarantine_window);
}

// What is not too old, and did not happen to the same job on another host as well.
std::vector<HostEvidence> Coordinator::counted_evidence(const Worker& worker) const {
  const auto is_old = [&](const HostEvidence& one) {
    return now_ - one.at > config_.quarantine_window;
  };
  const auto happened_elsewhere = [&](const HostEvidence& here) {
    return std::any_of(workers_.begin(), workers_.end(), [&](const auto& other) {
      const std::vector<HostEvidence>& there = other.second.record.evidence;
      return other.first != worker.record.id &&
             std::any_of(there.begin(), there.end(), [&](const HostEvidence& one) {
               return one.job == here.job && one.code == here.code && !is_old(one);
             });
    });
  };
  std::vector<HostEvidence> counted;
  for (const HostEvidence& one : worker.record.evidence) {
    if (!is_old(one) && !happened_elsewhere(one)) counted.push_back(one);
  }
  return counted;
}

// The same has befallen the same job on this host now: those it befell before were not at fault.
void Coordinator::exonerate(const Job& job, const Failure& failure) {
  for (auto& [id, worker] : workers_) {
    const auto& quarantine = worker.record.quarantine;
    if (worker.record.name == failure.worker || !quarantine || quarantine->by_user ||
        quarantine->reason.code != kQuarantineFailures) {
      continue;
    }
    const std::vector<HostEvidence>& evidence = worker.record.evidence;
    const auto followed =
        std::count_if(evidence.begin(), evidence.end(), [&](const HostEvidence& one) {
          return one.job == job.record.id && one.code == failure.reason.code;
        });
    if (followed == 0 || std::ssize(evidence) - followed >= config_.quarantine_failures) continue;
    readmit(
        worker, "coordinator",
        fmt::format("job {} fails on worker {} in the same way", job.record.id, failure.worker));
  }
}

// Why this worker goes on taking ranks, whatever speaks against it; empty: it need not.
std::string Coordinator::why_trusted_on(const Worker& worker) const {
  int64_t up = 0;
  int64_t taken = 1;  // with this one
  int64_t devices = 0;
  for (const auto& [id, other] : workers_) {
    if (other.state != WorkerState::kUp) continue;
    ++up;
    const auto& quarantine = other.record.quarantine;
    if (quarantine && !quarantine->by_user) ++taken;
    if (other.is_trusted()) devices += other.record.device_count;
  }
  const int64_t most = std::max<int64_t>(1, up / kWorkersPerQuarantine);
  if (taken > most) {
    return fmt::format("of {} that are up, {} at most are put in quarantine without being asked",
                       counted(up, "worker"), most);
  }
  const int64_t left = devices - (worker.is_trusted() ? worker.record.device_count : 0);
  if (left == 0) return "no other worker takes ranks";
  int64_t wanted = 0;
  for (const JobId id : open_jobs_) {
    const Job& job = jobs_.at(id);
    const int64_t ranks = job.world_size();
    if (ranks > left && ranks <= devices) {
      return fmt::format("job {} \"{}\" could run nowhere without it", id, job.record.name);
    }
    if (job.placed() || job.record.state == JobState::kRecovering) wanted += ranks;
  }
  if (wanted > left && wanted <= devices) return "what runs would not fit on the other workers";
  return {};
}

void Coordinator::quarantine_unless_needed(Worker& worker, Reason reason,
                                           std::optional<Instant> until) {
  if (const std::string why = why_trusted_on(worker); !why.empty()) {
    return note_cluster("coordinator",
                        {"quarantine_withheld",
                         fmt::format("worker {} would be put in quarantine ({}), "
                                     "but {}; penstock quarantine {} does it",
                                     worker.record.name, reason.message, why, worker.record.name)});
  }
  put_in_quarantine(worker, {std::move(reason), false, now_, until}, "coordinator");
}

void Coordinator::put_in_quarantine(Worker& worker, Quarantine quarantine,
                                    const std::string& actor) {
  const std::string until =
      quarantine.until ? "until " + format_utc(*quarantine.until) : "until penstock release";
  note_cluster(actor, {"worker_quarantined",
                       fmt::format("worker {} is in quarantine {}: {}", worker.record.name, until,
                                   quarantine.reason.message)});
  worker.record.quarantine = std::move(quarantine);
  worker.record.check_due = false;  // before it is released there is one
  effects_.workers.push_back(worker.record);
  schedule_needed_ = true;
  std::set<JobId> moving;
  for (const HostedRank& hosted : worker.hosted) moving.insert(hosted.job);
  for (const JobId id : moving) pause_when_wanted(jobs_.at(id));
}

void Coordinator::readmit(Worker& worker, const std::string& actor, const std::string& why) {
  worker.record.quarantine.reset();
  worker.record.check_due = false;
  effects_.workers.push_back(worker.record);
  schedule_needed_ = true;
  note_cluster(actor, {"worker_released",
                       fmt::format("worker {} takes ranks again: {}", worker.record.name, why)});
}

// REQUIRES: it is in quarantine. A worker that cannot be asked now is asked when it is back.
void Coordinator::release_when_sound(Worker& worker, const std::string& actor) {
  Quarantine& quarantine = *worker.record.quarantine;
  if (quarantine.releasing) return;
  quarantine.releasing = true;
  worker.record.check_due = true;
  worker.check_request = 0;
  effects_.workers.push_back(worker.record);
  note_cluster(actor, {"worker_release_asked",
                       fmt::format("worker {} takes ranks again as soon as its host has passed a "
                                   "check",
                                   worker.record.name)});
  ask_for_check(worker);
}

void Coordinator::watch_health(Worker& worker) {
  const auto& quarantine = worker.record.quarantine;
  if (quarantine && quarantine->until && now_ >= *quarantine->until) {
    release_when_sound(worker, "coordinator");
  }
  if (worker.record.check_due && now_ - worker.check_asked_at >= two_beats()) {
    ask_for_check(worker);
  }
}

void Coordinator::ask_for_check(Worker& worker) {
  if (!worker.record.check_due || worker.state != WorkerState::kUp) return;
  // No coordinator, this one or an earlier one, has asked with the same number.
  if (worker.check_request == 0) {
    worker.check_request = static_cast<uint64_t>(now_.nanoseconds);
  }
  worker.check_asked_at = now_;
  send(worker.record.id, CheckHost{worker.check_request});
}

void Coordinator::on_message(Worker& worker, const HostChecked& message) {
  if (!worker.record.check_due || message.request != worker.check_request) return;
  worker.check_request = 0;
  worker.record.check_due = false;
  schedule_needed_ = true;
  if (!message.passed) return refuse_host(worker, message.report);
  if (worker.record.quarantine) {
    worker.record.evidence.clear();  // it begins anew
    return readmit(worker, "worker " + worker.record.name,
                   "its host passed its check (" + message.report + ")");
  }
  effects_.workers.push_back(worker.record);
  note_cluster("worker " + worker.record.name,
               {"host_checked", fmt::format("the host of worker {} passed a check after a failure "
                                            "there ({})",
                                            worker.record.name, message.report)});
}

void Coordinator::refuse_host(Worker& worker, const std::string& report) {
  Reason reason{kQuarantineCheck, "its host failed a check: " + report};
  effects_.workers.push_back(worker.record);
  if (!worker.record.quarantine) {
    return quarantine_unless_needed(worker, std::move(reason), std::nullopt);
  }
  put_in_quarantine(worker, {std::move(reason), worker.record.quarantine->by_user, now_, {}},
                    "worker " + worker.record.name);
}

bool Coordinator::is_being_checked(const Worker& worker) const {
  return worker.is_trusted() && worker.record.check_due && !is_silent(worker);
}

// What the job could go on from is in the memory of a host that is being checked.
bool Coordinator::awaits_check(const Job& job) const {
  return std::any_of(job.held.begin(), job.held.end(), [&](const auto& held) {
    return is_being_checked(workers_.at(held.second.worker));
  });
}

void Coordinator::compare_clock(Worker& worker, Instant sent) {
  if (worker.clock_beats++ == 0) worker.clock_since = now_;
  worker.clock_least = std::min(worker.clock_least, arrived_ - sent);
  if (worker.clock_beats < kClockBeats || now_ - worker.clock_since < kClockSpan) return;
  const Duration behind = std::exchange(worker.clock_least, Duration::max());
  worker.clock_beats = 0;
  worker.clock_behind = behind;
  const bool off = std::chrono::abs(behind) > config_.clock_offset_most;
  if (off == worker.clock_is_off) return;
  worker.clock_is_off = off;
  const std::string& name = worker.record.name;
  if (!off) {
    return note_cluster("coordinator", {"clock_agrees", fmt::format("the clock of worker {} agrees "
                                                                    "with the coordinator's again",
                                                                    name)});
  }
  note_cluster("coordinator",
               {"clock_offset",
                fmt::format("the clock of worker {} is {:.3f} s {} the coordinator's: times in its "
                            "logs are off by that; nothing is decided by them, but synchronise it",
                            name, std::abs(to_seconds(behind)),
                            behind < Duration::zero() ? "ahead of" : "behind")});
}

}  // namespace penstock
