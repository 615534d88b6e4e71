#include "tests/support/compute_clock.h"

#include <sys/prctl.h>

#include <cerrno>
#include <ctime>

#include "comm/base/check.h"
#include "comm/base/clock.h"

namespace penstock {
namespace {

void sleep_until(int64_t deadline_ns) {
  constexpr int64_t kSecond = 1'000'000'000;
  const timespec deadline = {.tv_sec = deadline_ns / kSecond, .tv_nsec = deadline_ns % kSecond};
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &deadline, nullptr) == EINTR) {
  }
}

class WatchedTransport final : public Transport {
 public:
  WatchedTransport(Transport& inner, ComputeClock& clock) : inner_(inner), clock_(clock) {}

  Rank rank() const override { return inner_.rank(); }
  int32_t world_size() const override { return inner_.world_size(); }
  TransferHandle send(Rank peer, Tag tag, Bytes bytes) override {
    return inner_.send(peer, tag, bytes);
  }
  TransferHandle receive(Rank peer, Tag tag, MutableBytes into) override {
    return inner_.receive(peer, tag, into);
  }
  Result<uint64_t> wait(TransferHandle handle, int64_t* completed_ns) override {
    const bool must_wait = !inner_.done(handle);
    Result<uint64_t> moved = inner_.wait(handle, completed_ns);
    if (must_wait) clock_.ran_dry();
    return moved;
  }
  bool done(TransferHandle handle) override { return inner_.done(handle); }
  void abort() override { inner_.abort(); }
  uint64_t bytes_sent() const override { return inner_.bytes_sent(); }

 private:
  Transport& inner_;
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
