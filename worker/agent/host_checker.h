// Has this host checked by `penstock-rank check-host`, in the background: the daemon links none of
// the kernels that it checks, and a check that crashes or hangs takes nothing with it, not even one
// that a disk holds in the kernel where no signal reaches it.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "comm/base/clock.h"
#include "comm/base/file.h"
#include "comm/base/status.h"
#include "comm/control/event_loop.h"
#include "comm/control/process.h"

namespace penstock {

struct HostCheckerOptions {
  Path rank_binary;
  Path directory;                             // where the disk is checked
  Duration limit = std::chrono::seconds(60);  // a check that takes longer has failed
  int niceness = 10;                          // below the ranks that run beside it
};

// Loop thread only. Borrows the loop.
class HostChecker {
 public:
  using Done = std::function<void(bool passed, std::string report)>;
  HostChecker(EventLoop& loop, HostCheckerOptions options, Done done);
  ~HostChecker();
  HostChecker(const HostChecker&) = delete;
  HostChecker& operator=(const HostChecker&) = delete;

  // Its end is told by `done`. kUnavailable: one that took too long has been told of, but does not
  // end. REQUIRES: every check that was begun has been told of.
  Status begin();

 private:
  void look();
  void expire();
  void tell(const ExitStatus& ended);
  void forget();

  EventLoop& loop_;
  const HostCheckerOptions options_;
  const Done done_;
  std::optional<ChildProcess> child_;
  bool told_ = false;  // child_ was killed and is awaited, but nobody waits for what it says
  FileDescriptor output_;
  FileDescriptor errors_;
  WatchId watch_;
  TimerId timer_;
};

}  // namespace penstock
