// A device that computes by letting time pass, for measuring schedules and overlap with more ranks
// than there are cores.
//
// Work is queued like on a device: an operation begins when the one before it ended, so that what
// the host does between two of them (bookkeeping, late wake-ups) costs nothing and timer errors do
// not add up. Only a wait for a peer lets the device run dry; the next operation then begins when
// that wait ended. Waits are seen by the Transport that watch() makes.
#pragma once

#include <cstdint>
#include <memory>

#include "comm/data/transport.h"

namespace penstock {

// Single-threaded: the rank's compute thread.
class ComputeClock {
 public:
  // Makes the sleeps of the calling thread exact to the clock's resolution.
  ComputeClock();

  // Returns when an operation of this length, queued now, is over. 0 returns at once.
  void run(int64_t nanoseconds);
  // The device had nothing to do until now.
  void ran_dry();

  // Of the operations since reset(), on the monotonic clock. 0 when there was none.
  struct Use {
    int64_t begin_ns = 0;  // of the first
    int64_t end_ns = 0;    // of the last
    int64_t busy_ns = 0;
  };
  const Use& use() const { return use_; }
  void reset();

  // `inner`, which must outlive it as this clock must, and which tells this clock when its caller
  // had to wait.
  std::unique_ptr<Transport> watch(Transport& inner);

 private:
  int64_t free_at_ns_ = 0;  // the last operation's end
  bool dry_ = true;
  Use use_;
};

}  // namespace penstock
