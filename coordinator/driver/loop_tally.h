#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

#include "comm/control/event_loop.h"

namespace penstock {

// What a thread counts and the loop wants to know: however fast it counts, one call is under way.
class LoopTally {
 public:
  // `told` runs on `loop`, which must outlive this, with what was added since the last time.
  LoopTally(EventLoop& loop, std::function<void(uint64_t)> told)
      : loop_(loop), state_(std::make_shared<State>()) {
    state_->told = std::move(told);
  }
  // Any thread.
  void add(uint64_t count) {
    if (count == 0 || state_->count.fetch_add(count) > 0) return;
    loop_.post([state = state_] { state->told(state->count.exchange(0)); });
  }

 private:
  struct State {
    std::function<void(uint64_t)> told;
    std::atomic<uint64_t> count{0};
  };
  EventLoop& loop_;
  const std::shared_ptr<State> state_;  // with the call that is under way
};

}  // namespace penstock
