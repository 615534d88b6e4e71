#include "worker/agent/agent.h"

#include <signal.h>

#include <algorithm>
#include <limits>

#include "comm/base/check.h"
#include "comm/base/log.h"

namespace penstock {
namespace {

// A job's fence matters while messages of its old epochs may still be on their way. Jobs are
// numbered upwards, so the lowest ones are the oldest.
constexpr size_t kFencesMax = 10'000;
constexpr const char* kDaemonStops = "the worker daemon is stopping";

template <typename Message>
RankKey key_of(const Message& message) {
  return {message.job, message.epoch, message.rank};
}

// Whether `message` is a rank's report of this job, of this epoch or a lower one.
bool is_report_of(const ControlMessage& message, JobId job, Epoch epoch) {
  return std::visit(
      [&](const auto& kind) {
        if constexpr (requires {
                        kind.job;
                        kind.epoch;
                      }) {
          return kind.job == job && kind.epoch <= epoch;
        } else {
          return false;
        }
      },
      message);
}

// Whether every field that names the sender names `from`.
bool sent_by(const ControlMessage& message, const RankKey& from) {
  return std::visit(
      [&](const auto& kind) {
        if constexpr (requires { kind.rank; }) {
          return key_of(kind) == from;
        } else if constexpr (requires { kind.epoch; }) {
          return kind.job == from.job && kind.epoch == from.epoch;
        } else {
          return false;
        }
      },
      message);
}

std::string bounded(std::string text, size_t bytes_max) {
  if (text.size() > bytes_max) text.resize(bytes_max);
  return text;
}

}  // namespace

std::string to_string(const RankKey& key) {
  return fmt::format("job {} epoch {} rank {}", key.job, key.epoch, key.rank);
}

Agent::Agent(AgentConfig config, AgentActions actions)
    : config_(std::move(config)), actions_(std::move(actions)), reports_(config_.reports) {
  PENSTOCK_CHECK(config_.incarnation != 0);
  PENSTOCK_CHECK(config_.device_count >= 1, config_.device_count);
}

void Agent::on_connected(int64_t now_ns) {
  connected_ = true;
  registered_ = false;
  asked_to_register_ns_ = now_ns;
  send_register(now_ns);
}

void Agent::on_disconnected() {
  if (registered_) log_warning("lost the coordinator; ranks go on, reports are kept");
  connected_ = false;
  registered_ = false;
  for (auto& [key, exit] : exits_) exit.told = false;  // it may have been on its way
}

void Agent::on_coordinator_message(int64_t now_ns, const ControlMessage& message) {
  std::visit(
      [&](const auto& kind) {
        if constexpr (requires { this->handle(now_ns, kind); }) {
          handle(now_ns, kind);
        } else {
          log_warning("the coordinator sent {}, which is not for workers", message_name(message));
        }
      },
      message);
}

void Agent::handle(int64_t now_ns, const Registered& message) {
  if (!message.refusal.empty()) {
    exited_ = true;
    return actions_.exit(ExitCode::kConflict,
                         fmt::format("the coordinator refuses this worker: {}", message.refusal));
  }
  if (message.worker.value == 0) {  // it does not know us, or wants to know whether we live
    // It says so to every message that was on its way: one Register answers them all.
    const bool asked = message.challenge != 0 && message.challenge != challenge_;
    if (asked) challenge_ = message.challenge;
    const bool first = registered_ || asked;
    registered_ = false;
    if (!first) return;
    asked_to_register_ns_ = now_ns;
    return send_register(now_ns);
  }
  if (message.heard_sequence != 0) {
    const uint64_t age = sequence_ - message.heard_sequence;
    if (message.heard_sequence > sequence_ || age >= sent_ns_.size()) return;
    return actions_.heard(sent_ns_[message.heard_sequence % sent_ns_.size()]);
  }
  heartbeat_interval_ = std::chrono::milliseconds(message.heartbeat_interval_ms);
  if (registered_) return;  // the answer to a repeated Register
  registered_ = true;
  worker_ = message.worker;
  next_heartbeat_ns_ = now_ns + heartbeat_interval_.count();
  actions_.begin_pulses({worker_, heartbeat_interval_, std::chrono::milliseconds(message.lease_ms),
                         asked_to_register_ns_});
  next_leaving_ns_ = now_ns;
  log_info("registered as worker {} ({}), heartbeat every {} ms", worker_, config_.name,
           message.heartbeat_interval_ms);
  // The coordinator may be a new one, or have lost what was on its way.
  reports_.mark_all_unsent();
  for (auto& [key, exit] : exits_) exit.resend_at_ns = now_ns;
  flush(now_ns);
  tell_what_is_held();
}

void Agent::handle(int64_t now_ns, const StartRank& message) {
  const RankKey key = key_of(message);
  if (fenced(message.job, message.epoch)) {
    return log_info("{} is not started: that epoch is over", to_string(key));
  }
  if (const auto running = ranks_.find(key); running != ranks_.end()) {
    return repeat_what_was_said(now_ns, key, running->second);
  }
  if (const auto exited = exits_.find(key); exited != exits_.end()) {
    exited->second.resend_at_ns = now_ns;
    return;
  }
  if (message.epoch.value > 1) {  // of a job there is one epoch at a time
    const Epoch before{message.epoch.value - 1};
    fence(message.job, before);
    end_up_to(now_ns, message.job, before, Duration(0), "a newer epoch of the job starts here");
  }
  ranks_[key].start = message;
  if (shutting_down_) {
    return end_rank(now_ns, key, {static_cast<int>(ExitCode::kPreempted), 0},
                    std::string(kStoppedByDaemon) + kDaemonStops);
  }
  if (message.device >= config_.device_count) {
    return end_rank(now_ns, key, {static_cast<int>(ExitCode::kFailure), 0},
                    fmt::format("there is no device {} here: worker {} has {}", message.device,
                                config_.name, config_.device_count));
  }
  spawn_waiting(now_ns);
}

void Agent::spawn_waiting(int64_t now_ns) {
  std::vector<RankKey> waiting;
  for (const auto& [key, entry] : ranks_) {
    const bool alone = key.epoch.value == 1 || !runs_at_or_below(key.job, {key.epoch.value - 1});
    if (entry.pid == 0 && alone) waiting.push_back(key);
  }
  for (const RankKey& key : waiting) {
    // A spawn that fails ends its rank, which may have started the others from here already.
    const auto rank = ranks_.find(key);
    if (rank != ranks_.end() && rank->second.pid == 0) spawn(now_ns, key);
  }
}

void Agent::spawn(int64_t now_ns, const RankKey& key) {
  RankEntry& entry = ranks_.at(key);
  const Result<int32_t> pid = actions_.spawn_rank(entry.start);
  if (!pid.ok()) {
    return end_rank(now_ns, key, {static_cast<int>(ExitCode::kFailure), 0},
                    std::string(kCouldNotStart) + pid.status().message());
  }
  entry.pid = *pid;
  log_info("{} runs as process {} on device {}", to_string(key), *pid, entry.start.device);
}

void Agent::handle(int64_t, const BeginTraining& message) {
  actions_.drop_state_before(message.job, message.epoch);
  holding_.erase(message.job);
  reports_.forget_if([&](const ControlMessage& report) {
    const auto* ready = std::get_if<RankReady>(&report);
    return ready != nullptr && ready->job == message.job && ready->epoch == message.epoch;
  });
  for (auto& [key, entry] : ranks_) {
    if (key.job != message.job || key.epoch != message.epoch || entry.begin) continue;
    entry.begin = message;
    if (entry.bound) give_begin(key, entry);
  }
}

void Agent::give_begin(const RankKey& key, RankEntry& entry) {
  const Status sent = actions_.send_to_rank(key, *entry.begin);
  if (!sent.ok()) {
    log_warning("{} did not get BeginTraining: {}", to_string(key), sent.to_string());
    entry.begin.reset();  // the coordinator repeats it to ranks that stay ready
    return;
  }
  if (entry.state != RankState::kFinished) entry.state = RankState::kTraining;
}

void Agent::handle(int64_t now_ns, const StopRanks& message) {
  fence(message.job, message.epoch);
  end_up_to(now_ns, message.job, message.epoch, std::chrono::milliseconds(message.grace_ms),
            message.reason);
  OwedStop& owed = stops_to_answer_[message.job];
  if (message.epoch >= owed.epoch) owed = {message.epoch, message.keep_state};
  answer_stops();
}

// Stops the processes of these epochs; what has none (any more) is forgotten at once.
void Agent::end_up_to(int64_t now_ns, JobId job, Epoch epoch, Duration grace,
                      const std::string& reason) {
  const auto concerned = [&](const RankKey& key) { return key.job == job && key.epoch <= epoch; };
  std::erase_if(ranks_, [&](const auto& rank) {
    return concerned(rank.first) && !rank.second.has_process();
  });
  for (auto& [key, entry] : ranks_) {
    if (concerned(key)) stop(now_ns, key, entry, grace, reason);
  }
}

// Idempotent; a shorter grace replaces a longer one.
void Agent::stop(int64_t now_ns, const RankKey& key, RankEntry& entry, Duration grace,
                 const std::string& reason) {
  PENSTOCK_CHECK(entry.has_process(), to_string(key));
  const bool first = entry.stop_reason.empty();
  if (first) entry.stop_reason = reason.empty() ? "no reason given" : reason;
  const int64_t kill_at_ns = now_ns + grace.count();
  if (grace.count() <= 0) {
    if (entry.kill_at_ns == std::numeric_limits<int64_t>::max()) return;  // killed already
    entry.kill_at_ns = std::numeric_limits<int64_t>::max();
    log_info("{} is killed: {}", to_string(key), entry.stop_reason);
    return actions_.signal_rank(key, SIGKILL);
  }
  if (first) {
    log_info("{} is asked to stop: {}", to_string(key), entry.stop_reason);
    actions_.signal_rank(key, SIGTERM);
  }
  entry.kill_at_ns = std::min(entry.kill_at_ns.value_or(kill_at_ns), kill_at_ns);
}

void Agent::forget_exits() {
  std::erase_if(exits_,
                [](const auto& exit) { return exit.second.acknowledged && exit.second.told; });
}

void Agent::fence(JobId job, Epoch epoch) {
  Epoch& fence = fences_[job];
  fence = std::max(fence, epoch);
  while (fences_.size() > kFencesMax) fences_.erase(fences_.begin());
  actions_.fence_copies(job, fence);
  // One that was never told is, once: the order to stop may come right after a connection, before
  // the agent could say anything, and the end of this rank may be why the others must stop.
  const auto concerned = [&](const RankKey& key) { return key.job == job && key.epoch <= epoch; };
  for (auto& [key, exit] : exits_) exit.acknowledged |= concerned(key);
  forget_exits();
  reports_.forget_if(
      [&](const ControlMessage& report) { return is_report_of(report, job, epoch); });
}

bool Agent::fenced(JobId job, Epoch epoch) const {
  const auto fence = fences_.find(job);
  return fence != fences_.end() && epoch <= fence->second;
}

bool Agent::runs_at_or_below(JobId job, Epoch epoch) const {
  return std::any_of(ranks_.begin(), ranks_.end(), [&](const auto& rank) {
    return rank.first.job == job && rank.first.epoch <= epoch;
  });
}

void Agent::answer_stops() {
  std::erase_if(stops_to_answer_, [this](const auto& owed) {
    const auto& [job, stop] = owed;
    if (runs_at_or_below(job, stop.epoch)) return false;
    RanksStopped answer{job, stop.epoch, {}, {}};
    // A newer attempt may run here by now: what is held is its then.
    if (stop.keep_state) {
      if (!runs_at_or_below(job, kLastEpoch)) answer = what_is_held(job, stop.epoch);
      if (answer.holds_any()) holding_[job] = stop.epoch;
    } else {
      actions_.drop_state_before(job, Epoch{stop.epoch.value + 1});
      holding_.erase(job);
    }
    // Not kept when it cannot be sent: the coordinator repeats StopRanks until it is answered.
    const Status sent = send(answer);
    if (!sent.ok()) log_debug("RanksStopped of job {} not sent: {}", job, sent.to_string());
    return true;
  });
}

void Agent::handle(int64_t, const CheckpointOutcome& message) {
  reports_.forget_if([&](const ControlMessage& report) {
    const auto answered = [&](const auto* kind) {
      return kind != nullptr && kind->job == message.job && kind->epoch == message.epoch &&
             kind->step == message.step;
    };
    return answered(std::get_if<SegmentSaved>(&report)) ||
           answered(std::get_if<SaveFailed>(&report));
  });
  pass_on(message);
}

void Agent::handle(int64_t, const SaveInterval& message) {
  pass_on(message);
}

// Nothing runs here any more, and what is held of those that ran is not needed.
void Agent::handle(int64_t, const WorkerReleased&) {
  if (leave_until_ns_ && ranks_.empty() && !exited_) exit_now();
}

void Agent::handle(int64_t, const PauseRanks& message) {
  pass_on(message);
}

void Agent::handle(int64_t, const InspectRanks& message) {
  RanksInspected answer{message.job, message.epoch, message.request, {}};
  for (const auto& [key, entry] : ranks_) {
    if (key.job != message.job || key.epoch != message.epoch || !entry.has_process()) continue;
    answer.ranks.push_back(actions_.inspect_rank(key));
  }
  const Status sent = send(answer);
  if (!sent.ok()) log_debug("RanksInspected of job {} not sent: {}", message.job, sent.to_string());
}

template <typename Message>
void Agent::pass_on(const Message& message) {
  for (const auto& [key, entry] : ranks_) {
    if (key.job != message.job || key.epoch != message.epoch || !entry.bound) continue;
    const Status sent = actions_.send_to_rank(key, message);
    if (!sent.ok()) {
      log_warning("{} did not get {}: {}", to_string(key), message_name(message), sent.to_string());
    }
  }
}

bool Agent::accepts(const RankHello& hello) const {
  const auto rank = ranks_.find(key_of(hello));
  return rank != ranks_.end() && rank->second.pid == hello.pid;
}

void Agent::on_rank_bound(const RankKey& key) {
  const auto rank = ranks_.find(key);
  PENSTOCK_CHECK(rank != ranks_.end(), to_string(key));
  RankEntry& entry = rank->second;
  entry.bound = true;
  const Status sent = actions_.send_to_rank(key, entry.start);
  if (!sent.ok()) log_warning("{} did not get StartRank: {}", to_string(key), sent.to_string());
  if (entry.begin) give_begin(key, entry);
}

void Agent::on_rank_message(int64_t now_ns, const RankKey& from, const ControlMessage& message) {
  const auto rank = ranks_.find(from);
  if (rank == ranks_.end() || !sent_by(message, from)) {
    return log_warning("{} sent {}, which is not its to send", to_string(from),
                       message_name(message));
  }
  RankEntry& entry = rank->second;
  if (const auto* progress = std::get_if<RankProgress>(&message)) {
    entry.step = std::max(entry.step, progress->step);
    ++entry.pace.steps;
    entry.pace.busy_seconds += progress->compute_seconds + progress->optimizer_seconds;
    entry.pace.wait_seconds +=
        progress->expert_wait_seconds + progress->pipeline_wait_seconds + progress->reduce_seconds;
    return;
  }
  if (const auto* ready = std::get_if<RankReady>(&message)) {
    entry.ready = *ready;
    if (entry.state == RankState::kStarting) entry.state = RankState::kReady;
  } else if (const auto* finished = std::get_if<RankFinished>(&message)) {
    entry.state = RankState::kFinished;
    entry.step = std::max(entry.step, finished->step);
  } else if (!std::holds_alternative<StepReport>(message) &&
             !std::holds_alternative<EvaluationReport>(message) &&
             !std::holds_alternative<ExpertLoadReport>(message) &&
             !std::holds_alternative<SegmentSaved>(message) &&
             !std::holds_alternative<SaveFailed>(message)) {
    return log_warning("{} sent {}, which is not a rank's to send", to_string(from),
                       message_name(message));
  }
  if (!fenced(from.job, from.epoch)) report(now_ns, message);
  // The process ended before this arrived; now its end is known to be a good one.
  if (entry.state == RankState::kFinished && entry.finish_wait_until_ns) {
    end_rank(now_ns, from, {0, 0}, "");
  }
}

void Agent::on_rank_exit(int64_t now_ns, const RankKey& key, const ExitStatus& status,
                         const std::string& last_words, const std::string& log_tail) {
  const auto rank = ranks_.find(key);
  PENSTOCK_CHECK(rank != ranks_.end(), to_string(key));
  RankEntry& entry = rank->second;
  const bool clean = status == ExitStatus{0, 0};
  if (clean && entry.state != RankState::kFinished && entry.stop_reason.empty()) {
    entry.finish_wait_until_ns = now_ns + config_.finish_grace.count();
    return;
  }
  std::string reason = clean ? "" : to_string(status);
  if (!entry.stop_reason.empty()) reason = std::string(kStoppedByDaemon) + entry.stop_reason;
  if (!clean && !last_words.empty()) reason += ": " + last_words;
  end_rank(now_ns, key, status, reason, clean ? std::string() : log_tail);
}

// The rank is gone (or never came to be): says so, and goes on with what waited for it.
void Agent::end_rank(int64_t now_ns, const RankKey& key, const ExitStatus& status,
                     const std::string& reason, const std::string& log_tail) {
  ranks_.erase(key);
  log_info("{} {}{}{}", to_string(key), to_string(status), reason.empty() ? "" : ": ", reason);
  const RankExited exited = {key.job,
                             key.epoch,
                             key.rank,
                             status.exit_code,
                             status.signal,
                             bounded(reason, kNameBytesMax),
                             bounded(log_tail, kLogTailBytesMax)};
  if (fenced(key.job, key.epoch)) {
    // Acknowledged beforehand: told once, for the record.
    const Status sent = send(exited);
    if (!sent.ok()) log_debug("RankExited of {} not sent: {}", to_string(key), sent.to_string());
  } else {
    exits_[key] = {exited, now_ns};
  }
  flush(now_ns);
  answer_stops();
  spawn_waiting(now_ns);
  exit_when_empty();
}

void Agent::on_rank_output(const RankKey& key, uint64_t offset, std::string text) {
  log_bytes_ += text.size();
  log_chunks_.push_back({key.job, key.epoch, key.rank, offset, std::move(text)});
  while (log_bytes_ > config_.log_bytes_max) {
    const std::string& oldest = log_chunks_.front().text;
    log_lines_dropped_ += static_cast<uint64_t>(std::count(oldest.begin(), oldest.end(), '\n'));
    log_bytes_ -= oldest.size();
    log_chunks_.pop_front();
  }
}

void Agent::shut_down(int64_t now_ns) {
  const bool again = leave_until_ns_ || shutting_down_;
  if (again || !registered_ || ranks_.empty()) {
    return end_ranks(now_ns, again ? Duration(0) : config_.shutdown_grace);
  }
  log_info("asked to end: {} ranks have {} s to save", ranks_.size(),
           config_.leave_grace / std::chrono::seconds(1));
  leave_until_ns_ = now_ns + config_.leave_grace.count();
  next_leaving_ns_ = now_ns;
}

// While ranks may still save.
void Agent::keep_leaving(int64_t now_ns) {
  if (!leave_until_ns_ || shutting_down_ || exited_) return;
  if (now_ns >= *leave_until_ns_) {
    log_warning("{} ranks have not saved in time", ranks_.size());
    return end_ranks(now_ns, config_.shutdown_grace);
  }
  if (!registered_ && ranks_.empty()) return exit_now();
  if (!registered_ || now_ns < next_leaving_ns_) return;
  next_leaving_ns_ = now_ns + config_.resend_interval.count();
  const Status sent = send(WorkerLeaving{config_.incarnation, false});
  if (!sent.ok()) log_debug("WorkerLeaving not sent: {}", sent.to_string());
}

void Agent::end_ranks(int64_t now_ns, Duration grace) {
  if (!shutting_down_) log_info("stopping, with {} ranks", ranks_.size());
  shutting_down_ = true;
  std::erase_if(ranks_, [](const auto& rank) { return !rank.second.has_process(); });
  if (!ranks_.empty()) exit_code_ = ExitCode::kPreempted;
  for (auto& [key, entry] : ranks_) {
    stop(now_ns, key, entry, grace, kDaemonStops);
  }
  exit_when_empty();
}

void Agent::exit_when_empty() {
  if (shutting_down_ && !exited_ && ranks_.empty()) exit_now();
}

void Agent::exit_now() {
  exited_ = true;
  const Status sent = send(WorkerLeaving{config_.incarnation, true});
  if (!sent.ok()) log_debug("the coordinator does not hear of the end: {}", sent.to_string());
  actions_.exit(exit_code_,
                exit_code_ == ExitCode::kOk ? "stopped" : "stopped; its ranks had not saved");
}

}  // namespace penstock
