#include "worker/agent/state_mirror.h"

#include <algorithm>

#include "comm/base/clock.h"
#include "comm/base/log.h"

namespace penstock {
namespace {

constexpr Duration kConnectPatience = std::chrono::seconds(5);
constexpr Duration kWordPatience = std::chrono::seconds(20);
constexpr Duration kBlockPatience = std::chrono::seconds(20);
// The other daemon may not have heard yet that a copy is to come: for so long it is asked again.
constexpr Duration kAttemptsFor = std::chrono::seconds(10);
constexpr Duration kAttemptPause = std::chrono::milliseconds(50);

// What became of a copy on its way, in words: a daemon that refuses it answers with a code alone.
Status told_of(const std::string& address, const Status& outcome) {
  const auto say = [&](std::string_view what) {
    return Status(outcome.code(), fmt::format("{}: {}", address, what));
  };
  switch (outcome.code()) {
    case Code::kOk:
      return {};
    case Code::kResourceExhausted:
      return say("its memory for copies is full; give it more with penstock-worker --copies-mib");
    case Code::kPermissionDenied:
      return say("it has another key: it is not the worker that was meant, or was started anew");
    case Code::kFailedPrecondition:
      return say("it was not told to keep that copy");
    case Code::kDataLoss:
      return say("what it received is not what was sent");
    default:
      return say(outcome.message());
  }
}

}  // namespace

StateMirror::StateMirror(uint64_t bytes_max, OnDone on_done)
    : on_done_(std::move(on_done)), copies_(bytes_max) {
  copier_ = std::thread([this] { copy_all(); });
  sender_ = std::thread([this] { send_all(); });
}

StateMirror::~StateMirror() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
    if (sending_ != nullptr) sending_->shut_down();
  }
  wake_copier_.notify_all();
  wake_sender_.notify_all();
  copier_.join();
  sender_.join();
}

Status StateMirror::listen(const std::string& coordinator) {
  PENSTOCK_TRY_ASSIGN(server_, StateServer::start(coordinator, copies_));
  return {};
}

void StateMirror::order(const MirrorRanks& order, std::map<Rank, FileDescriptor> memory) {
  std::optional<RanksMirrored> known;  // and nothing is to be done
  {
    const std::lock_guard lock(mutex_);
    const auto found = rounds_.find(order.job);
    if (found != rounds_.end()) {
      const MirrorRanks& last = found->second.order;
      if (order.epoch < last.epoch) return;
      const bool same = order.epoch == last.epoch;
      if (same && (order.step < last.step || order.kept_step < last.kept_step)) {
        known = {order.job, last.epoch, last.step, {}, false, true, last.kept_step};
      } else if (same && order.step == last.step) {
        known = found->second.outcome;
        if (!known) return;
      }
    }
    if (!known) {
      Round& round = rounds_[order.job];
      round = {order, {}, {}};
      for (const MirrorTarget& target : order.send) {
        auto held = memory.find(target.rank);
        const bool there = held != memory.end();
        round.sources[target.rank].memory = std::make_shared<const FileDescriptor>(
            there ? std::move(held->second) : FileDescriptor());
      }
      if (server_) server_->expect(order.job, order.epoch, order.step, order.keep);
      copies_.keep_only(order.job, {order.kept_step, order.step});
      copies_due_ = true;
    }
  }
  if (known) return on_done_(*known);
  wake_copier_.notify_one();
  wake_sender_.notify_one();  // what it is at may not be wanted any more
}

void StateMirror::progressed(const RankProgress& progress) {
  {
    const std::lock_guard lock(mutex_);
    const auto found = rounds_.find(progress.job);
    if (found == rounds_.end() || found->second.order.epoch != progress.epoch) return;
    const Round& round = found->second;
    const auto source = round.sources.find(progress.rank);
    if (round.outcome || progress.step < round.order.step || source == round.sources.end() ||
        source->second.progress != Progress::kTraining) {
      return;
    }
    copies_due_ = true;
  }
  wake_copier_.notify_one();
}

void StateMirror::distrust(JobId job, Rank rank) {
  copies_.forget(job, rank);
}

void StateMirror::fence(JobId job, Epoch epoch) {
  copies_.fence(job, epoch);
  copies_.drop_before(job, epoch);
  if (server_) server_->fence(job, epoch);
  const std::lock_guard lock(mutex_);
  const auto found = rounds_.find(job);
  if (found != rounds_.end() && found->second.order.epoch <= epoch) rounds_.erase(found);
  wake_sender_.notify_one();
}

// ---- copying

void StateMirror::copy_all() {
  std::unique_lock lock(mutex_);
  while (!ending_) {
    wake_copier_.wait(lock, [this] { return copies_due_ || ending_; });
    copies_due_ = false;
    std::vector<Task> tasks = tasks_to_copy();
    lock.unlock();
    for (Task& task : tasks) copy(std::move(task));
    lock.lock();
  }
}

// REQUIRES: mutex_ is held.
std::vector<StateMirror::Task> StateMirror::tasks_to_copy() const {
  std::vector<Task> tasks;
  for (const auto& [job, round] : rounds_) {
    if (round.outcome) continue;
    for (const MirrorTarget& target : round.order.send) {
      const Source& source = round.sources.at(target.rank);
      if (source.progress != Progress::kTraining) continue;
      tasks.push_back({job, round.order.epoch, round.order.step, target,
                       round.order.bytes_per_second, source.memory, nullptr});
    }
  }
  return tasks;
}

void StateMirror::copy(Task task) {
  if (!task.memory->valid()) {
    return fail(task, not_found("its daemon holds no memory of it"));
  }
  Result<std::shared_ptr<StateCopy>> copied =
      copy_held_state(*task.memory, task.job, task.epoch, task.target.rank, task.step, copies_);
  if (copied.status().code() == Code::kUnavailable) return;  // not there yet
  Status status = copied.status();
  if (status.ok()) {
    task.copy = std::move(copied).value();
    status = copies_.put(task.copy);
  }
  if (!status.ok()) return fail(task, status);
  {
    const std::lock_guard lock(mutex_);
    if (!is_current(task)) return;
    Source& source = rounds_.at(task.job).sources.at(task.target.rank);
    if (source.progress != Progress::kTraining) return;
    source.progress = Progress::kCopied;
    source.memory.reset();
    task.memory.reset();
    to_send_.push_back(std::move(task));
  }
  wake_sender_.notify_one();
}

// ---- sending

void StateMirror::send_all() {
  std::unique_lock lock(mutex_);
  while (!ending_) {
    wake_sender_.wait(lock, [this] { return !to_send_.empty() || ending_; });
    if (ending_) return;
    const Task task = std::move(to_send_.front());
    to_send_.pop_front();
    if (!is_current(task)) continue;
    lock.unlock();
    const Status status = send(task);
    status.ok() ? sent(task) : fail(task, status);
    lock.lock();
  }
}

Status StateMirror::send(const Task& task) {
  const int64_t give_up_ns = monotonic_ns() + kAttemptsFor.count();
  for (;;) {
    const Status status = send_once(task);
    const bool may_come =
        status.code() == Code::kUnavailable || status.code() == Code::kFailedPrecondition;
    if (!may_come || monotonic_ns() >= give_up_ns) return status;
    PENSTOCK_TRY(pause(task, kAttemptPause));
  }
}

Status StateMirror::send_once(const Task& task) {
  PENSTOCK_TRY_ASSIGN(StateConnection buddy,
                      StateConnection::connect(task.target.to.address, kConnectPatience));
  {
    const std::lock_guard lock(mutex_);
    if (ending_) return aborted("not wanted any more");
    sending_ = &buddy;
  }
  const Status sent = send_over(buddy, task);
  const std::lock_guard lock(mutex_);
  sending_ = nullptr;
  return sent;
}

Status StateMirror::send_over(StateConnection& buddy, const Task& task) {
  const Bytes state = task.copy->bytes();
  const Status accepted = buddy
                              .ask({.kind = StreamKind::kStore,
                                    .key = task.target.to.key,
                                    .job = task.job,
                                    .epoch = task.epoch,
                                    .rank = task.target.rank,
                                    .step = task.step,
                                    .contents = task.copy->identity().contents,
                                    .byte_count = state.size()},
                                   kWordPatience)
                              .status();
  if (accepted.code() == Code::kAlreadyExists) return {};  // its answer was lost
  const auto told = [&](const Status& outcome) { return told_of(task.target.to.address, outcome); };
  PENSTOCK_TRY(told(accepted));
  PENSTOCK_TRY(told(buddy.send_state(state, kBlockPatience,
                                     [&](size_t byte_count) { return pace(task, byte_count); })));
  return told(buddy.hear_answer(kWordPatience).status());
}

// Before a block is sent: waits until it is due. What could not be sent in time is not made up for.
Status StateMirror::pace(const Task& task, size_t byte_count) {
  constexpr double kNanosecondsPerSecond = 1e9;
  const auto span_ns =
      static_cast<int64_t>(static_cast<double>(last_block_bytes_) * kNanosecondsPerSecond /
                           static_cast<double>(task.bytes_per_second));
  const int64_t now_ns = monotonic_ns();
  const int64_t due_ns = std::max(last_block_ns_ + span_ns, now_ns);
  PENSTOCK_TRY(pause(task, Duration(due_ns - now_ns)));
  last_block_ns_ = due_ns;
  last_block_bytes_ = byte_count;
  bytes_sent_ += byte_count;
  return {};
}

// The sender's. kAborted: nobody wants that copy sent any more, which ends the pause.
Status StateMirror::pause(const Task& task, Duration span) {
  std::unique_lock lock(mutex_);
  const auto is_over = [&] { return ending_ || !is_current(task); };
  return wake_sender_.wait_for(lock, span, is_over) ? aborted("not wanted any more") : Status();
}

// REQUIRES: mutex_ is held.
bool StateMirror::is_current(const Task& task) const {
  const auto found = rounds_.find(task.job);
  return found != rounds_.end() && !found->second.outcome &&
         found->second.order.epoch == task.epoch && found->second.order.step == task.step;
}

void StateMirror::sent(const Task& task) {
  RanksMirrored done{task.job, task.epoch, task.step, {}, false};
  {
    const std::lock_guard lock(mutex_);
    if (!is_current(task)) return;
    Round& round = rounds_.at(task.job);
    round.sources.at(task.target.rank).progress = Progress::kSent;
    const bool all = std::all_of(round.sources.begin(), round.sources.end(), [](const auto& entry) {
      return entry.second.progress == Progress::kSent;
    });
    if (!all) return;
    round.outcome = done;
  }
  on_done_(done);
}

void StateMirror::fail(const Task& task, const Status& why) {
  const bool missed = why.code() == Code::kAborted;
  RanksMirrored done{task.job, task.epoch, task.step,
                     fmt::format("rank {}: {}", task.target.rank, why.message()), missed};
  {
    const std::lock_guard lock(mutex_);
    if (!is_current(task)) return;
    rounds_.at(task.job).outcome = done;
  }
  if (missed) ++copies_missed_;
  on_done_(done);
}

}  // namespace penstock
