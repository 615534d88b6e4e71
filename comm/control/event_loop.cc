#include "comm/control/event_loop.h"

#include <atomic>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <unordered_map>

#include "comm/base/check.h"

namespace penstock {

namespace asio = boost::asio;

// Timers and watches are shared with the handlers pending in Asio: cancelling marks them, so that a
// handler that is already queued finds out and does nothing.
struct EventLoop::Impl {
  struct Timer {
    explicit Timer(asio::io_context& context) : timer(context) {}
    asio::steady_timer timer;
    Callback callback;
    Duration interval{0};  // 0: once
    bool cancelled = false;
  };
  struct Watch {
    Watch(asio::io_context& context, int fd) : descriptor(context, fd) {}
    // The descriptor is borrowed: never let Asio close it.
    ~Watch() {
      if (descriptor.is_open()) descriptor.release();
    }
    asio::posix::stream_descriptor descriptor;
    Callback callback;
    bool cancelled = false;
  };

  void arm(uint64_t id, const std::shared_ptr<Timer>& timer) {
    timer->timer.async_wait([this, id, timer](const boost::system::error_code& error) {
      if (error || timer->cancelled) return;
      if (timer->interval.count() == 0) {
        timers.erase(id);
        timer->callback();
        return;
      }
      timer->callback();
      if (timer->cancelled) return;
      // From now, not from when it was due: a loop that was held up does not run a burst.
      timer->timer.expires_after(timer->interval);
      arm(id, timer);
    });
  }

  void arm(const std::shared_ptr<Watch>& watch) {
    watch->descriptor.async_wait(asio::posix::stream_descriptor::wait_read,
                                 [this, watch](const boost::system::error_code& error) {
                                   if (watch->cancelled || error == asio::error::operation_aborted)
                                     return;
                                   watch->callback();
                                   if (!watch->cancelled) arm(watch);
                                 });
  }

  TimerId start_timer(Duration delay, Duration interval, Callback callback) {
    const auto timer = std::make_shared<Timer>(context);
    timer->callback = std::move(callback);
    timer->interval = interval;
    timer->timer.expires_after(delay);
    const uint64_t id = ++last_id;
    timers.emplace(id, timer);
    arm(id, timer);
    return {id};
  }

  asio::io_context context{1};
  // Keeps run() from returning while nothing is pending.
  asio::executor_work_guard<asio::io_context::executor_type> work{context.get_executor()};
  std::atomic<bool> stop_requested{false};
  uint64_t last_id = 0;  // timers and watches count together; 0 is none
  std::unordered_map<uint64_t, std::shared_ptr<Timer>> timers;
  std::unordered_map<uint64_t, std::shared_ptr<Watch>> watches;
  std::vector<std::unique_ptr<asio::signal_set>> signal_sets;
};

namespace {

void wait_for_signal(asio::signal_set& signals, const std::function<void(int)>& callback) {
  signals.async_wait([&signals, callback](const boost::system::error_code& error, int signal) {
    if (error) return;
    wait_for_signal(signals, callback);
    callback(signal);
  });
}

}  // namespace

EventLoop::EventLoop() : impl_(std::make_unique<Impl>()) {}

EventLoop::~EventLoop() {
  // Watches release their descriptors before the reactor goes.
  for (auto& [id, watch] : impl_->watches) {
    watch->cancelled = true;
    watch->descriptor.release();
  }
}

void EventLoop::run() {
  impl_->context.restart();
  // A stop() before the restart, which made the restart forget it, left the flag; one after it
  // makes context.run() return at once.
  if (!impl_->stop_requested) impl_->context.run();
  impl_->stop_requested = false;
}

void EventLoop::stop() {
  impl_->stop_requested = true;
  impl_->context.stop();
}

void EventLoop::post(Callback callback) {
  asio::post(impl_->context, std::move(callback));
}

TimerId EventLoop::call_after(Duration delay, Callback callback) {
  return impl_->start_timer(delay, Duration(0), std::move(callback));
}

TimerId EventLoop::call_every(Duration interval, Callback callback) {
  PENSTOCK_CHECK(interval.count() > 0, interval.count());
  return impl_->start_timer(interval, interval, std::move(callback));
}

void EventLoop::cancel(TimerId timer) {
  const auto found = impl_->timers.find(timer.value);
  if (found == impl_->timers.end()) return;
  found->second->cancelled = true;
  found->second->timer.cancel();
  impl_->timers.erase(found);
}

WatchId EventLoop::watch_readable(int fd, Callback callback) {
  PENSTOCK_CHECK(fd >= 0, fd);
  const auto watch = std::make_shared<Impl::Watch>(impl_->context, fd);
  watch->callback = std::move(callback);
  const uint64_t id = ++impl_->last_id;
  impl_->watches.emplace(id, watch);
  impl_->arm(watch);
  return {id};
}

void EventLoop::unwatch(WatchId watch) {
  const auto found = impl_->watches.find(watch.value);
  if (found == impl_->watches.end()) return;
  found->second->cancelled = true;
  found->second->descriptor.release();  // cancels the pending wait
  impl_->watches.erase(found);
}

void EventLoop::on_signals(const std::vector<int>& signals, std::function<void(int)> callback) {
  auto set = std::make_unique<asio::signal_set>(impl_->context);
  for (const int signal : signals) set->add(signal);
  wait_for_signal(*set, callback);
  impl_->signal_sets.push_back(std::move(set));
}

boost::asio::io_context& EventLoop::io_context() {
  return impl_->context;
}

}  // namespace penstock
