// Stops a process again and again for a while (SIGSTOP), and lets it go on in between (SIGCONT).
#pragma once

#include <atomic>
#include <string>
#include <thread>

#include "comm/base/clock.h"
#include "ops/cli/local_process.h"

namespace penstock {

struct StopRhythm {
  Duration stopped = {};
  Duration running = {};  // 0: it is stopped throughout
};

// Works on a thread of its own. However it ends, the process runs again: when the time is over, by
// destruction, and when this process is told to end by SIGINT, SIGTERM or SIGHUP, which then says
// so and exits with kInterrupted. Of a SIGKILL nobody is told; what is stopped then is found as
// hung. At most one at a time, made before other threads are: it takes these signals for itself.
class StopCycle {
 public:
  StopCycle(LocalProcess process, StopRhythm rhythm, Duration total);
  ~StopCycle();
  StopCycle(const StopCycle&) = delete;
  StopCycle& operator=(const StopCycle&) = delete;

 private:
  void run();
  bool wait(Duration span) const;  // false: it is to end
  void interrupted() const;

  const LocalProcess process_;
  const StopRhythm rhythm_;
  const int64_t end_ns_;
  std::atomic<bool> ending_ = false;
  std::thread thread_;
};

}  // namespace penstock
