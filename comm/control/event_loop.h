// The event loop of every daemon: one thread, callbacks in turn. Boost.Asio inside.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "comm/base/clock.h"
#include "comm/base/ids.h"

namespace boost::asio {
class io_context;
}

namespace penstock {

using TimerId = Id<struct TimerTag, uint64_t>;
using WatchId = Id<struct WatchTag, uint64_t>;

// Single-threaded: every callback runs on the thread inside run(), one at a time. Only stop() and
// post() may be called from other threads. A callback must not block: everything else waits for it.
// Callbacks still pending when the loop is destroyed are destroyed without being called.
class EventLoop {
 public:
  using Callback = std::function<void()>;

  EventLoop();
  ~EventLoop();
  EventLoop(const EventLoop&) = delete;
  EventLoop& operator=(const EventLoop&) = delete;

  // Runs callbacks until stop(). May be called again after it returned.
  void run();
  // Any thread, any number of times. Makes the current or next run() return after the callback in
  // progress.
  void stop();
  // Any thread. Runs `callback` on the loop thread after those posted before it.
  void post(Callback callback);

  // Runs `callback` once, not before `delay` has passed; a delay <= 0 means "in turn", never from
  // here.
  TimerId call_after(Duration delay, Callback callback);
  // Runs `callback` every `interval`, first after one interval. A late turn is not made up for by a
  // burst. REQUIRES: interval > 0.
  TimerId call_every(Duration interval, Callback callback);
  // The callback will not run (again), not even when it is already due. Unknown and finished timers
  // are ignored.
  void cancel(TimerId timer);

  // Runs `callback` whenever `fd` is readable (level-triggered: again as long as it is). End of
  // file and errors count as readable. Borrows `fd`: unwatch() before closing it. REQUIRES: fd is
  // pollable (no regular file) and not watched already.
  WatchId watch_readable(int fd, Callback callback);
  // The callback will not run again. Unknown watches are ignored.
  void unwatch(WatchId watch);

  // Runs `callback(signal)` for each of `signals`, in place of their default action, until the loop
  // is destroyed.
  void on_signals(const std::vector<int>& signals, std::function<void(int)> callback);

  // For code that speaks Asio itself (the HTTP server). Loop thread only.
  boost::asio::io_context& io_context();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace penstock
