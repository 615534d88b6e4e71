// An exponential moving average of the weights, outside the device (DeepSeek-V3 report §3.2.3): of
// the ranges this rank's optimizer owns, in host memory, updated after each step by a thread of its
// own while the next step computes.
//
//   average += (1 - decay) · (weight - average)
//
// It reads one generation of the state (worker/optim/state_layout.h) and the weights of the next,
// and writes the next's average. Element by element, so the result does not depend on when the
// thread runs. The router's biases have no average: they are no parameters.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "worker/optim/state_layout.h"

namespace penstock {

// start() and the rest are for one thread. Steady state allocates nothing.
class WeightAverage {
 public:
  // Borrows `layout`. `finished` is called on the thread, after each update.
  WeightAverage(double decay, const StateLayout& layout, std::function<void()> finished);
  // Waits for the update under way.
  ~WeightAverage();
  WeightAverage(const WeightAverage&) = delete;
  WeightAverage& operator=(const WeightAverage&) = delete;

  // The generation's average becomes its weights. REQUIRES: no update is under way.
  void reset(std::byte* generation);
  // Begins one update, of generations that both stay where they are until it is finished. REQUIRES:
  // no update is under way.
  void start(const std::byte* previous, std::byte* next);
  // Returns when no update is under way.
  void wait();
  // Puts the generation's average where the model has the owned weights. REQUIRES: no update is
  // under way.
  void put_in_place_of_weights(const std::byte* generation) const;

  // One slice per box of the owned ranges in a generation.
  std::vector<StateSlice> state(std::byte* generation) const;

 private:
  void run();
  void update() const;

  const float rate_;  // 1 - decay
  const StateLayout& layout_;
  const std::function<void()> finished_;
  const std::byte* previous_ = nullptr;  // the caller's while no update is under way,
  std::byte* next_ = nullptr;            // else the thread's

  std::mutex mutex_;
  std::condition_variable changed_;
  bool under_way_ = false;  // guarded by mutex_
  bool stopping_ = false;   // guarded by mutex_
  std::thread thread_;      // last: starts when all above is made
};

}  // namespace penstock
