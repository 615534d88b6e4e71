#include "tests/support/compute_clock.h"

#include <sys/prctl.h>

#include <cerrno>
#include <ctime>

#include "comm/base/check.h"
#include "comm/base/clock.h"
#include "comm/data/forwarding_transport.h"

namespace penstock {
namespace {

void sleep_until(int64_t deadline_ns) {
  constexpr int64_t kSecond = 1'000'000'000;
  const timespec deadline = {.tv_sec = deadline_ns / kSecond, .tv_nsec = deadline_ns % kSecond};
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &deadline, nullptr) == EINTR) {
  }
}

class WatchedTransport final : public ForwardingTransport {
 public:
  WatchedTransport(Transport& inner, ComputeClock& clock)
      : ForwardingTransport(inner), clock_(clock) {}

  Result<uint64_t> wait(TransferHandle handle, int64_t* completed_ns) override {
    const bool must_wait = !done(handle);
    Result<uint64_t> moved = ForwardingTransport::wait(handle, completed_ns);
    if (must_wait) clock_.ran_dry();
    return moved;
  }

 private:
  ComputeClock& clock_;
};

}  // namespace

ComputeClock::ComputeClock() {
  PENSTOCK_CHECK(::prctl(PR_SET_TIMERSLACK, 1) == 0, errno);  // nanoseconds; 0 would be the default
}

void ComputeClock::run(int64_t nanoseconds) {
  if (nanoseconds <= 0) return;
  const int64_t begin = dry_ ? monotonic_ns() : free_at_ns_;
  dry_ = false;
  free_at_ns_ = begin + nanoseconds;
  if (use_.busy_ns == 0) use_.begin_ns = begin;
  use_.busy_ns += nanoseconds;
  use_.end_ns = free_at_ns_;
  sleep_until(free_at_ns_);
}

void ComputeClock::ran_dry() {
  dry_ = true;
}

void ComputeClock::reset() {
  use_ = {};
  dry_ = true;
}

std::unique_ptr<Transport> ComputeClock::watch(Transport& inner) {
  return std::make_unique<WatchedTransport>(inner, *this);
}

}  // namespace penstock
