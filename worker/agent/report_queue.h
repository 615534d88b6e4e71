// What ranks reported and the coordinator may not have stored yet.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <optional>

#include "comm/base/clock.h"
#include "comm/control/message.h"

namespace penstock {

struct ReportQueueLimits {
  size_t count_max = 100'000;
  size_t bytes_max = 64 << 20;
  // A step, evaluation or load report sent this long ago, on a connection that still stands, is
  // stored.
  Duration stored_after = std::chrono::seconds(30);
};

// Reports in the order they came. Each stays after it was sent, to be sent again when the
// coordinator turns out to have restarted, until it is answered (forget_if) or, for step,
// evaluation and load reports, until stored_after has passed. Beyond a limit the oldest of these
// three kinds go, and others only where there are none: a rank waits for the end of its saves, and
// for what follows a step report that asks for a rollback.
// Single-threaded.
class ReportQueue {
 public:
  explicit ReportQueue(const ReportQueueLimits& limits) : limits_(limits) {}

  void push(ControlMessage message);
  // The oldest one not sent (again) yet; nullptr: none. Valid until the next call that is not
  // const.
  const ControlMessage* next_unsent() const;
  // REQUIRES: next_unsent() != nullptr.
  void mark_sent(int64_t now_ns);
  // Everything kept is to be sent again, in order.
  void mark_all_unsent();
  // Forgets sent step, evaluation and load reports that are old enough to be stored.
  void forget_stored(int64_t now_ns);
  // Forgets every report that `answered` says true of.
  void forget_if(const std::function<bool(const ControlMessage&)>& answered);

  size_t size() const { return reports_.size(); }
  size_t byte_count() const { return byte_count_; }
  uint64_t dropped() const { return dropped_; }  // ever, because of the limits, unsent ones only

 private:
  struct Report {
    ControlMessage message;
    size_t byte_count = 0;
    int64_t sent_at_ns = 0;
  };

  template <typename Predicate>
  void forget_where(const Predicate& forget);

  const ReportQueueLimits limits_;
  std::deque<Report> reports_;
  size_t unsent_ = 0;  // index in reports_ of the oldest unsent; == size(): none
  size_t byte_count_ = 0;
  uint64_t dropped_ = 0;
};

}  // namespace penstock
