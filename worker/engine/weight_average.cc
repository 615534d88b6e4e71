#include "worker/engine/weight_average.h"

#include <algorithm>

#include "checkpoint/names.h"
#include "comm/base/check.h"

namespace penstock {

WeightAverage::WeightAverage(double decay, std::vector<OptimizerShard> shards)
    : rate_(static_cast<float>(1.0 - decay)) {
  for (OptimizerShard& shard : shards) {
    parts_.push_back({shard, std::vector<float>(static_cast<size_t>(shard.owned.size()))});
  }
  thread_ = std::thread([this] { run(); });
}

WeightAverage::~WeightAverage() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void WeightAverage::reset() {
  for (Part& part : parts_) {
    std::copy_n(part.weights(), part.average.size(), part.average.begin());
  }
}

void WeightAverage::start() {
  {
    const std::lock_guard lock(mutex_);
    PENSTOCK_CHECK(!under_way_);
    under_way_ = true;
  }
  changed_.notify_all();
}

void WeightAverage::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return !under_way_; });
}

void WeightAverage::exchange_with_weights() {
  for (Part& part : parts_) {
    std::swap_ranges(part.average.begin(), part.average.end(), part.weights());
  }
}

std::vector<StateSlice> WeightAverage::state() {
  std::vector<StateSlice> slices;
  for (Part& part : parts_) {
    for (const ShardPiece& piece : pieces_of(part.shard)) {
      append_state(piece, logical_name(piece.parameter->name, TensorKind::kEma), DType::kF32,
                   part.average.data() + piece.offset, slices);
    }
  }
  return slices;
}

void WeightAverage::run() {
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return under_way_ || stopping_; });
      if (!under_way_) return;
    }
    update();
    {
      const std::lock_guard lock(mutex_);
      under_way_ = false;
    }
    changed_.notify_all();
  }
}

void WeightAverage::update() {
  for (Part& part : parts_) {
    const float* const weights = part.weights();
    for (size_t i = 0; i < part.average.size(); ++i) {
      part.average[i] += rate_ * (weights[i] - part.average[i]);
    }
  }
}

}  // namespace penstock
