#include "ops/cli/stop_cycle.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <string_view>

#include "comm/base/exit_codes.h"

namespace penstock {

namespace {

constexpr Duration kLookEvery = std::chrono::milliseconds(20);

sigset_t ending_signals() {
  sigset_t signals;
  ::sigemptyset(&signals);
  ::sigaddset(&signals, SIGINT);
  ::sigaddset(&signals, SIGTERM);
  ::sigaddset(&signals, SIGHUP);  // the terminal is closed
  return signals;
}

}  // namespace

StopCycle::StopCycle(LocalProcess process, StopRhythm rhythm, Duration total)
    : process_(std::move(process)), rhythm_(rhythm), end_ns_(monotonic_ns() + total.count()) {
  const sigset_t signals = ending_signals();
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);  // here and in the thread
  thread_ = std::thread([this] { run(); });
}

StopCycle::~StopCycle() {
  ending_ = true;
  thread_.join();
  const sigset_t signals = ending_signals();
  ::pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
}

void StopCycle::run() {
  while (!ending_ && monotonic_ns() < end_ns_) {
    if (!send_signal(process_, SIGSTOP).ok()) break;  // it has ended
    const Duration left(end_ns_ - monotonic_ns());
    wait(rhythm_.running == Duration::zero() ? left : std::min(left, rhythm_.stopped));
    (void)send_signal(process_, SIGCONT);
    wait(std::min(Duration(end_ns_ - monotonic_ns()), rhythm_.running));
  }
  while (wait(kLookEvery)) {
  }
}

bool StopCycle::wait(Duration span) const {
  const sigset_t signals = ending_signals();
  const int64_t until_ns = monotonic_ns() + span.count();
  while (!ending_) {
    const Duration left(until_ns - monotonic_ns());
    if (left <= Duration::zero()) return true;
    const Duration now = std::min(left, kLookEvery);
    const timespec limit = {.tv_sec = 0, .tv_nsec = now.count()};
    if (::sigtimedwait(&signals, nullptr, &limit) > 0) interrupted();
  }
  return false;
}

void StopCycle::interrupted() const {
  (void)send_signal(process_, SIGCONT);
  constexpr std::string_view kMessage = "\ninterrupted; the rank runs again, and so does its job\n";
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, kMessage.data(), kMessage.size());
  ::_exit(static_cast<int>(ExitCode::kInterrupted));
}

}  // namespace penstock
