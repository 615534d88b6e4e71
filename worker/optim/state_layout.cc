#include "worker/optim/state_layout.h"

namespace penstock {
namespace {

constexpr uint64_t kAlignmentBytes = 64;  // a cache line, and the widest vector

}  // namespace

StateLayout::StateLayout(const OptimizerSpec& spec, const std::vector<OptimizerShard>& shards) {
  const uint64_t moment_bytes = spec.moments == MomentType::kBf16 ? 2 : 4;
  for (const OptimizerShard& shard : shards) {
    const auto size = static_cast<uint64_t>(shard.owned.size());
    Place place{.shard = shard};
    place.weights = add(size * sizeof(float));
    place.exp_avg = add(size * moment_bytes);
    place.exp_avg_sq = add(size * moment_bytes);
    if (spec.ema_decay > 0.0) place.average = add(size * sizeof(float));
    places_.push_back(place);
  }
}

uint64_t StateLayout::add(uint64_t bytes) {
  const uint64_t offset = byte_count_;
  byte_count_ += (bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
  return offset;
}

}  // namespace penstock
