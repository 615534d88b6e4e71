// What the agent tells the coordinator: registration, heartbeats, reports, exits, output.
#include <signal.h>

#include <algorithm>
#include <limits>

#include "comm/base/log.h"
#include "worker/agent/agent.h"

namespace penstock {

std::vector<RankStatus> Agent::rank_statuses() const {
  std::vector<RankStatus> statuses;
  statuses.reserve(ranks_.size());
  for (const auto& [key, entry] : ranks_) {
    statuses.push_back({key.job, key.epoch, key.rank, entry.state, entry.step, entry.pace});
  }
  return statuses;
}

void Agent::send_register(int64_t now_ns) {
  next_register_ns_ = now_ns + config_.register_interval.count();
  const uint64_t sequence = next_sequence(now_ns);
  const Register message = {.protocol_version = kProtocolVersion,
                            .name = config_.name,
                            .incarnation = config_.incarnation,
                            .host = config_.host,
                            .device_count = config_.device_count,
                            .device_kind = config_.device_kind,
                            .http_address = config_.http_address,
                            .ranks = rank_statuses(),
                            .state_address = config_.state_place.address,
                            .state_key = config_.state_place.key,
                            .sequence = sequence,
                            .challenge = challenge_};
  const Status sent = actions_.send_to_coordinator(message);
  if (!sent.ok()) log_warning("Register not sent: {}", sent.to_string());
}

uint64_t Agent::next_sequence(int64_t now_ns) {
  sent_ns_[++sequence_ % sent_ns_.size()] = now_ns;
  return sequence_;
}

void Agent::send_heartbeat(int64_t now_ns) {
  next_heartbeat_ns_ = now_ns + heartbeat_interval_.count();
  const uint64_t sequence = next_sequence(now_ns);
  const int64_t wall_ns = actions_.wall_clock ? actions_.wall_clock().nanoseconds : 0;
  const Status sent = send(Heartbeat{.worker = worker_,
                                     .incarnation = config_.incarnation,
                                     .sequence = sequence,
                                     .ranks = rank_statuses(),
                                     .sent_at_ns = wall_ns});
  if (!sent.ok()) log_warning("heartbeat not sent: {}", sent.to_string());
}

Status Agent::send(const ControlMessage& message) {
  if (!registered_) return unavailable("not registered with the coordinator");
  return actions_.send_to_coordinator(message);
}

void Agent::report(int64_t now_ns, const ControlMessage& message) {
  const uint64_t dropped_before = reports_.dropped();
  reports_.push(message);
  if (reports_.dropped() == dropped_before) {
    dropping_reports_ = false;
  } else if (!dropping_reports_) {
    dropping_reports_ = true;
    log_error("the coordinator is away for too long: dropping the oldest of {} kept reports",
              reports_.size());
  }
  flush(now_ns);
}

void Agent::repeat_what_was_said(int64_t now_ns, const RankKey& key, const RankEntry& entry) {
  if (!entry.ready) return;
  reports_.forget_if([&](const ControlMessage& report) {
    const auto* ready = std::get_if<RankReady>(&report);
    return ready != nullptr && RankKey{ready->job, ready->epoch, ready->rank} == key;
  });
  report(now_ns, *entry.ready);
}

// On a new connection: the order to let go of it may have been lost with the one before, or with
// the coordinator that knew of it.
void Agent::tell_what_is_held() {
  for (const auto& [job, epoch] : holding_) {
    if (runs_at_or_below(job, kLastEpoch)) continue;  // its end will say it
    const Status sent = send(what_is_held(job, epoch));
    if (!sent.ok()) log_debug("RanksStopped of job {} not sent: {}", job, sent.to_string());
  }
}

// In the order things happened: a rank's reports, then its end; output last, because nobody decides
// by it.
void Agent::flush(int64_t now_ns) {
  if (!registered_) return;
  while (const ControlMessage* next = reports_.next_unsent()) {
    const Status sent = send(*next);
    if (!sent.ok()) {
      if (sent.code() != Code::kInvalidArgument) return;  // the queue is full or the peer away
      log_error("a {} that cannot be sent: {}", message_name(*next), sent.message());
    }
    reports_.mark_sent(now_ns);
  }
  for (auto& [key, exit] : exits_) {
    if (exit.resend_at_ns > now_ns) continue;
    exit.resend_at_ns = now_ns + config_.resend_interval.count();
    if (!send(exit.message).ok()) return;
    exit.told = true;
  }
  forget_exits();
  while (!log_chunks_.empty() && send(log_chunks_.front()).ok()) {
    log_bytes_ -= log_chunks_.front().text.size();
    log_chunks_.pop_front();
  }
}

int64_t Agent::on_tick(int64_t now_ns) {
  if (connected_ && !registered_ && now_ns >= next_register_ns_) send_register(now_ns);
  if (registered_ && now_ns >= next_heartbeat_ns_) {
    send_heartbeat(now_ns);
    reports_.forget_stored(now_ns);
  }
  flush(now_ns);
  keep_leaving(now_ns);
  std::vector<RankKey> silent;  // exited 0, RankFinished never came
  for (auto& [key, entry] : ranks_) {
    if (entry.kill_at_ns && now_ns >= *entry.kill_at_ns) {
      log_warning("{} did not stop in time", to_string(key));
      stop(now_ns, key, entry, Duration(0), "");
    }
    if (entry.finish_wait_until_ns && now_ns >= *entry.finish_wait_until_ns) silent.push_back(key);
  }
  for (const RankKey& key : silent) {
    end_rank(now_ns, key, {static_cast<int>(ExitCode::kFailure), 0},
             "exited with code 0 without saying that it finished");
  }
  return next_due_ns();
}

int64_t Agent::next_due_ns() const {
  constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  int64_t due = kNever;
  if (connected_ && !registered_) due = std::min(due, next_register_ns_);
  if (registered_) {
    due = std::min(due, next_heartbeat_ns_);
    for (const auto& [key, exit] : exits_) due = std::min(due, exit.resend_at_ns);
  }
  if (leave_until_ns_ && !shutting_down_) {
    due = std::min(due, registered_ ? next_leaving_ns_ : *leave_until_ns_);
  }
  for (const auto& [key, entry] : ranks_) {
    due = std::min(due, entry.kill_at_ns.value_or(kNever));
    due = std::min(due, entry.finish_wait_until_ns.value_or(kNever));
  }
  return due;
}

}  // namespace penstock
