#include "worker/agent/report_queue.h"

#include <algorithm>

#include "comm/base/check.h"

namespace penstock {
namespace {

size_t footprint(const ControlMessage& message) {
  size_t byte_count = sizeof(ControlMessage);
  if (const auto* saved = std::get_if<SegmentSaved>(&message)) {
    for (const SavedSlice& slice : saved->slices) {
      byte_count += sizeof slice + slice.name.size() + 3 * sizeof(int64_t) * slice.shape.size();
    }
  }
  if (const auto* report = std::get_if<ExpertLoadReport>(&message)) {
    for (const auto& [layer, loads] : report->layers) byte_count += loads.size() * sizeof(double);
  }
  if (const auto* ready = std::get_if<RankReady>(&message)) byte_count += ready->address.size();
  return byte_count;
}

// A rollback is answered by a StopRanks, and its ranks wait for that.
bool stored_with_time(const ControlMessage& message) {
  if (const auto* step = std::get_if<StepReport>(&message)) {
    return step->guard.action != GuardPolicy::kRollback;
  }
  return std::holds_alternative<EvaluationReport>(message) ||
         std::holds_alternative<ExpertLoadReport>(message);
}

}  // namespace

void ReportQueue::push(ControlMessage message) {
  const size_t byte_count = footprint(message);
  reports_.push_back({std::move(message), byte_count, 0});
  byte_count_ += byte_count;
  while (reports_.size() > limits_.count_max ||
         (byte_count_ > limits_.bytes_max && reports_.size() > 1)) {
    auto oldest = std::find_if(reports_.begin(), reports_.end(), [](const Report& report) {
      return stored_with_time(report.message);
    });
    if (oldest == reports_.end()) oldest = reports_.begin();
    const bool was_sent = static_cast<size_t>(oldest - reports_.begin()) < unsent_;
    byte_count_ -= oldest->byte_count;
    reports_.erase(oldest);
    if (was_sent) {
      --unsent_;
    } else {
      ++dropped_;
    }
  }
}

const ControlMessage* ReportQueue::next_unsent() const {
  return unsent_ < reports_.size() ? &reports_[unsent_].message : nullptr;
}

void ReportQueue::mark_sent(int64_t now_ns) {
  PENSTOCK_CHECK(unsent_ < reports_.size(), unsent_);
  reports_[unsent_].sent_at_ns = now_ns;
  ++unsent_;
}

void ReportQueue::mark_all_unsent() {
  unsent_ = 0;
}

void ReportQueue::forget_stored(int64_t now_ns) {
  const int64_t stored_before = now_ns - limits_.stored_after.count();
  // Sent in order: when the first is too young, all are.
  if (unsent_ == 0 || reports_.front().sent_at_ns > stored_before) return;
  forget_where([&](const Report& report, bool sent) {
    return sent && report.sent_at_ns <= stored_before && stored_with_time(report.message);
  });
}

void ReportQueue::forget_if(const std::function<bool(const ControlMessage&)>& answered) {
  forget_where([&](const Report& report, bool) { return answered(report.message); });
}

template <typename Predicate>
void ReportQueue::forget_where(const Predicate& forget) {
  std::deque<Report> kept;
  size_t kept_sent = 0;
  for (size_t i = 0; i < reports_.size(); ++i) {
    const bool sent = i < unsent_;
    if (forget(reports_[i], sent)) {
      byte_count_ -= reports_[i].byte_count;
      continue;
    }
    kept_sent += sent ? 1 : 0;
    kept.push_back(std::move(reports_[i]));
  }
  reports_ = std::move(kept);
  unsent_ = kept_sent;
}

}  // namespace penstock
