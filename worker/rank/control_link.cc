#include "worker/rank/control_link.h"

#include <csignal>
#include <cstdio>
#include <cstdlib>

#include "comm/base/exit_codes.h"
#include "comm/base/log.h"

namespace penstock {
namespace {

constexpr Duration kLeaseCheckInterval = std::chrono::milliseconds(100);

}  // namespace

Result<std::unique_ptr<ControlLink>> ControlLink::open(const std::string& endpoint,
                                                       const RankHello& hello,
                                                       const Path& lease_file) {
  std::unique_ptr<ControlLink> link(new ControlLink(hello));
  PENSTOCK_TRY(link->start(endpoint, lease_file));
  return link;
}

Status ControlLink::start(const std::string& endpoint, const Path& lease_file) {
  if (!lease_file.empty()) {
    PENSTOCK_TRY_ASSIGN(LeaseFile lease, LeaseFile::open(lease_file));
    lease_.emplace(std::move(lease));
    loop_.call_every(kLeaseCheckInterval, [this] { keep_to_lease(); });
  }
  loop_.on_signals({SIGTERM, SIGINT}, [this](int) { request_stop(); });
  DealerChannel::Handlers handlers;
  handlers.on_message = [this](ControlMessage message) { on_message(std::move(message)); };
  handlers.on_rejected = [](const Rejection& rejection) {
    log_warning("refused a frame of {} bytes from the daemon: {}", rejection.byte_count,
                rejection.reason.message());
  };
  PENSTOCK_TRY_ASSIGN(channel_, DealerChannel::connect(loop_, endpoint, {}, std::move(handlers)));
  PENSTOCK_TRY(channel_->send(hello_));
  thread_ = std::thread([this] { loop_.run(); });
  return {};
}

// Whatever the other threads do: from here on another rank may take this one's place.
void ControlLink::keep_to_lease() const {
  const int64_t over_ns = monotonic_ns() - lease_->end_ns();
  if (lease_->end_ns() == LeaseFile::kEndless || over_ns < 0) return;
  std::fprintf(
      stderr, "penstock-rank: the coordinator cannot be reached, and the worker's lease is over\n");
  std::_Exit(static_cast<int>(ExitCode::kUnreachable));
}

ControlLink::~ControlLink() {
  if (!thread_.joinable()) return;
  loop_.post([this] {
    channel_.reset();
    loop_.stop();
  });
  thread_.join();
}

void ControlLink::send(ControlMessage message) {
  loop_.post([this, message = std::move(message)] {
    const Status sent = channel_->send(message);
    if (!sent.ok()) log_warning("could not send {}: {}", message_name(message), sent.to_string());
  });
}

void ControlLink::on_message(ControlMessage message) {
  const std::lock_guard lock(mutex_);
  if (auto* start = std::get_if<StartRank>(&message)) {
    if (is_mine(start->job, start->epoch) && start->rank == hello_.rank) start_ = std::move(*start);
  } else if (auto* begin = std::get_if<BeginTraining>(&message)) {
    if (is_mine(begin->job, begin->epoch)) begin_ = std::move(*begin);
  } else if (auto* outcome = std::get_if<CheckpointOutcome>(&message)) {
    if (!is_mine(outcome->job, outcome->epoch)) return;
    if (outcome->committed) {
      log_info("the checkpoint of step {} is committed", outcome->step);
    } else {
      log_warning("the checkpoint of step {} was not committed: {}", outcome->step,
                  outcome->reason);
    }
    const int64_t step = outcome->step;
    // A run has any number of checkpoints, and nobody asks for the outcome of a past one.
    outcomes_.erase(outcomes_.begin(), outcomes_.lower_bound(step));
    outcomes_[step] = std::move(*outcome);
  } else if (const auto* interval = std::get_if<SaveInterval>(&message)) {
    if (is_mine(interval->job, interval->epoch)) save_interval_ = interval->steps;
  } else if (const auto* pause = std::get_if<PauseRanks>(&message)) {
    if (is_mine(pause->job, pause->epoch)) pause_requested_ = true;
  } else if (const auto* stop = std::get_if<StopRanks>(&message)) {
    if (stop->job == hello_.job && stop->epoch >= hello_.epoch) stop_requested_ = true;
  } else {
    log_warning("the daemon sent {}, which is not for ranks", message_name(message));
  }
  changed_.notify_all();
}

void ControlLink::request_stop() {
  const std::lock_guard lock(mutex_);
  stop_requested_ = true;
  changed_.notify_all();
}

bool ControlLink::stop_requested() const {
  const std::lock_guard lock(mutex_);
  return stop_requested_;
}

bool ControlLink::pause_requested() const {
  const std::lock_guard lock(mutex_);
  return pause_requested_;
}

void ControlLink::forget_pause() {
  const std::lock_guard lock(mutex_);
  pause_requested_ = false;
}

int64_t ControlLink::newest_outcome() const {
  const std::lock_guard lock(mutex_);
  return outcomes_.empty() ? -1 : outcomes_.rbegin()->first;
}

std::optional<int64_t> ControlLink::save_interval() const {
  const std::lock_guard lock(mutex_);
  return save_interval_;
}

template <typename Condition>
Status ControlLink::wait_until(std::unique_lock<std::mutex>& lock, const Condition& there) {
  changed_.wait(lock, [&] { return stop_requested_ || there(); });
  return there() ? Status() : aborted("asked to stop");
}

Result<StartRank> ControlLink::wait_start(Duration timeout) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, timeout, [this] { return stop_requested_ || start_.has_value(); });
  if (start_) return *start_;
  if (stop_requested_) return aborted("asked to stop");
  return deadline_exceeded(
      fmt::format("the daemon did not answer within {} s; it does not know this rank, or is gone",
                  timeout / std::chrono::seconds(1)));
}

Result<BeginTraining> ControlLink::wait_begin() {
  std::unique_lock lock(mutex_);
  PENSTOCK_TRY(wait_until(lock, [this] { return begin_.has_value(); }));
  return *begin_;
}

void ControlLink::wait_stop() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return stop_requested_; });
}

Status ControlLink::wait_outcome(int64_t step) {
  std::unique_lock lock(mutex_);
  PENSTOCK_TRY(wait_until(lock, [&] { return outcomes_.contains(step); }));
  const CheckpointOutcome& outcome = outcomes_.at(step);
  if (outcome.committed) return {};
  return failed_precondition(
      fmt::format("the last checkpoint, of step {}, was not committed: {}", step, outcome.reason));
}

}  // namespace penstock
