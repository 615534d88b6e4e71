// Running an event loop in a test until something happened.
#pragma once

#include <functional>

#include "comm/control/event_loop.h"

namespace penstock {

// Runs `loop` until `done()`, looked at every millisecond. False: it was not true within
// `deadline`.
inline bool run_until(EventLoop& loop, const std::function<bool()>& done,
                      Duration deadline = std::chrono::seconds(240)) {
  if (done()) return true;
  bool in_time = false;
  const TimerId poll = loop.call_every(std::chrono::milliseconds(1), [&] {
    in_time = done();
    if (in_time) loop.stop();
  });
  const TimerId give_up = loop.call_after(deadline, [&] { loop.stop(); });
  loop.run();
  loop.cancel(poll);
  loop.cancel(give_up);
  return in_time || done();
}

// Runs `loop` for `span`: for what must not happen.
inline void run_for(EventLoop& loop, Duration span) {
  loop.call_after(span, [&loop] { loop.stop(); });
  loop.run();
}

}  // namespace penstock
