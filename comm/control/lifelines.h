// Proof that a daemon and all it started are gone, by the kernel they ran on.
//
// A daemon listens on a port, its life port, for as long as it lives, and each rank that it starts
// holds that socket too. A connection to it stands until the last of them has ended; from then on
// their host refuses another. A network that fails, a host that lost its power and a process that
// is stopped let connections time out instead, and prove nothing.
#pragma once

#include <cstdint>
#include <functional>
#include <map>

#include "comm/base/file.h"
#include "comm/base/ids.h"
#include "comm/control/event_loop.h"
#include "comm/control/pulse.h"

namespace penstock {

// A connection to the life port of every worker. Loop thread only. Borrows the loop, which must
// outlive it.
class Lifelines {
 public:
  using OnGone = std::function<void(WorkerId, uint64_t incarnation)>;
  // Once per process, from the loop, a moment after it was proven: what it had sent comes first.
  Lifelines(EventLoop& loop, OnGone on_gone) : loop_(loop), on_gone_(std::move(on_gone)) {}
  ~Lifelines();
  Lifelines(const Lifelines&) = delete;
  Lifelines& operator=(const Lifelines&) = delete;

  // Holds on to that process of a worker, of which `address` is the life port; lets go of an older
  // one. Costs nothing where it does already. To be called again and again: a line that the network
  // broke is tried anew then.
  void hold(WorkerId worker, uint64_t incarnation, const SocketAddress& address);

 private:
  struct Line {
    uint64_t incarnation = 0;
    SocketAddress address;
    FileDescriptor socket;
    WatchId watch;
    // A connection has stood: what refuses the next one is no firewall, and no other host.
    bool stood = false;
    TimerId timer;  // to connect, or to tell
    Duration pause = kPauseMin;
    int64_t not_before_ns = 0;
  };
  static constexpr Duration kPauseMin = std::chrono::milliseconds(1);
  static constexpr Duration kPauseMax = std::chrono::milliseconds(100);

  void connect(WorkerId worker);
  void look(WorkerId worker);
  void ended(WorkerId worker);
  void refused(WorkerId worker);
  void rest(Line& line, Duration span);
  void let_go(Line& line);

  EventLoop& loop_;
  const OnGone on_gone_;
  std::map<WorkerId, Line> lines_;
};

}  // namespace penstock
