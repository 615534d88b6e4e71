// The coordinator's side of pulses (pulse.h): hears them and answers those that were taken note of.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "comm/base/file.h"
#include "comm/base/status.h"
#include "comm/control/event_loop.h"
#include "comm/control/pulse.h"

namespace penstock {

// Loop thread only. Borrows the loop, which must outlive it.
class PulseListener {
 public:
  // Takes note of a pulse; false: of no worker that is known and up, and there is no answer.
  using Handler = std::function<bool(const Pulse& pulse, const SocketAddress& from)>;

  // `endpoint`: as RouterChannel::endpoint(), with its real port. The handler runs on the loop or
  // inside hear_all().
  static Result<std::unique_ptr<PulseListener>> bind(EventLoop& loop, const std::string& endpoint,
                                                     Handler handler);
  ~PulseListener();
  PulseListener(const PulseListener&) = delete;
  PulseListener& operator=(const PulseListener&) = delete;

  // Everything that has arrived, before somebody judges a silence: a loop that was busy, or a
  // process that was stopped, finds here what it was told meanwhile.
  void hear_all();

 private:
  PulseListener(EventLoop& loop, FileDescriptor fd, Handler handler)
      : loop_(loop), fd_(std::move(fd)), handler_(std::move(handler)) {}

  EventLoop& loop_;
  FileDescriptor fd_;
  const Handler handler_;
  WatchId watch_;
};

}  // namespace penstock
