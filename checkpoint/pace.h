// Slows a reader down to a byte rate, so that reading a store over in the background leaves the
// disk to those who need it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "comm/base/clock.h"

namespace penstock {

class Pace {
 public:
  explicit Pace(uint64_t bytes_per_second) : bytes_per_second_(bytes_per_second) {}  // 0: no limit

  // Waits for as long as reading `bytes` more may take, time in which nothing was asked for not
  // counted. False, at once, after stop(). One thread.
  bool spend(uint64_t bytes);
  // Waits `span`. False, at once, after stop().
  bool pause(Duration span);
  void stop();  // any thread; for good

 private:
  const uint64_t bytes_per_second_;
  int64_t paid_until_ns_ = 0;  // spend() only: before it nothing more may be read
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopped_ = false;  // guarded by mutex_
};

}  // namespace penstock
