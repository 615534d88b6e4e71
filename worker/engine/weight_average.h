// An exponential moving average of the weights, outside the device (DeepSeek-V3 report §3.2.3): of
// the ranges this rank's optimizer owns, in host memory, updated after each step by a thread of its
// own while the next step computes.
//
//   average += (1 - decay) · (weight - average)
//
// The thread reads the weights themselves: start() when they are those of a finished step, wait()
// before anything changes or saves them. Element by element, so the result does not depend on when
// the thread runs. The router's biases have no average: they are no parameters.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "worker/optim/shard_state.h"

namespace penstock {

// start() and the rest are for one thread. Steady state allocates nothing.
class WeightAverage {
 public:
  WeightAverage(double decay, std::vector<OptimizerShard> shards);
  // Waits for the update under way.
  ~WeightAverage();
  WeightAverage(const WeightAverage&) = delete;
  WeightAverage& operator=(const WeightAverage&) = delete;

  // The average becomes the weights. REQUIRES: no update is under way.
  void reset();
  // Begins one update. REQUIRES: no update is under way.
  void start();
  // Returns when no update is under way.
  void wait();
  // Puts the average where the owned weights are, and these in its place. Twice: nothing changed.
  // REQUIRES: no update is under way.
  void exchange_with_weights();

  // One slice per box of the owned ranges. The memory they point to stays where it is.
  std::vector<StateSlice> state();

 private:
  struct Part {
    OptimizerShard shard;
    std::vector<float> average;  // of shard.owned
    float* weights() const {
      return shard.parameters->values(shard.kind).data() + shard.owned.begin;
    }
  };
  void run();
  void update();

  const float rate_;         // 1 - decay
  std::vector<Part> parts_;  // the caller's while no update is under way, else the thread's

  std::mutex mutex_;
  std::condition_variable changed_;
  bool under_way_ = false;  // guarded by mutex_
  bool stopping_ = false;   // guarded by mutex_
  std::thread thread_;      // last: starts when all above is made
};

}  // namespace penstock
