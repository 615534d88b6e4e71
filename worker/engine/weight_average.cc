#include "worker/engine/weight_average.h"

#include <algorithm>

#include "checkpoint/names.h"
#include "comm/base/check.h"

namespace penstock {

namespace {

const float* floats(const std::byte* generation, uint64_t offset) {
  return reinterpret_cast<const float*>(generation + offset);
}
float* floats(std::byte* generation, uint64_t offset) {
  return reinterpret_cast<float*>(generation + offset);
}

}  // namespace

WeightAverage::WeightAverage(double decay, const StateLayout& layout,
                             std::function<void()> finished)
    : rate_(static_cast<float>(1.0 - decay)), layout_(layout), finished_(std::move(finished)) {
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

void WeightAverage::reset(std::byte* generation) {
  for (const StateLayout::Place& place : layout_.places()) {
    std::copy_n(floats(generation, place.weights), place.shard.owned.size(),
                floats(generation, place.average));
  }
}

void WeightAverage::start(const std::byte* previous, std::byte* next) {
  {
    const std::lock_guard lock(mutex_);
    PENSTOCK_CHECK(!under_way_);
    previous_ = previous;
    next_ = next;
    under_way_ = true;
  }
  changed_.notify_all();
}

void WeightAverage::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return !under_way_; });
}

void WeightAverage::put_in_place_of_weights(const std::byte* generation) const {
  for (const StateLayout::Place& place : layout_.places()) {
    const OptimizerShard& shard = place.shard;
    std::copy_n(floats(generation, place.average), shard.owned.size(),
                shard.parameters->values(shard.kind).data() + shard.owned.begin);
  }
}

std::vector<StateSlice> WeightAverage::state(std::byte* generation) const {
  std::vector<StateSlice> slices;
  for (const StateLayout::Place& place : layout_.places()) {
    for (const ShardPiece& piece : pieces_of(place.shard)) {
      append_state(piece, logical_name(piece.parameter->name, TensorKind::kEma), DType::kF32,
                   floats(generation, place.average) + piece.offset, slices);
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
    finished_();
    {
      const std::lock_guard lock(mutex_);
      under_way_ = false;
    }
    changed_.notify_all();
  }
}

void WeightAverage::update() const {
  for (const StateLayout::Place& place : layout_.places()) {
    const float* const before = floats(previous_, place.average);
    const float* const weights = floats(static_cast<const std::byte*>(next_), place.weights);
    float* const after = floats(next_, place.average);
    const int64_t size = place.shard.owned.size();
    for (int64_t i = 0; i < size; ++i) after[i] = before[i] + rate_ * (weights[i] - before[i]);
  }
}

}  // namespace penstock
