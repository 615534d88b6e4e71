#include "checkpoint/pace.h"

#include <algorithm>

namespace penstock {

bool Pace::spend(uint64_t bytes) {
  if (bytes_per_second_ == 0) return pause({});
  const double seconds = static_cast<double>(bytes) / static_cast<double>(bytes_per_second_);
  const int64_t now_ns = monotonic_ns();
  paid_until_ns_ = std::max(paid_until_ns_, now_ns) + static_cast<int64_t>(seconds * 1e9);
  return pause(Duration(paid_until_ns_ - now_ns));
}

bool Pace::pause(Duration span) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, span, [this] { return stopped_; });
  return !stopped_;
}

void Pace::stop() {
  const std::lock_guard lock(mutex_);
  stopped_ = true;
  changed_.notify_all();
}

}  // namespace penstock
