// Where the state that a rank owns lies in a generation of it: one piece of memory that holds the
// weights of its optimizer's shards, their moments and average, and what else is added, each
// aligned to a cache line. All generations of a rank have one layout, a pure function of the spec
// and the shards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "comm/run/job_spec.h"
#include "worker/optim/shard_state.h"

namespace penstock {

class StateLayout {
 public:
  // Byte offsets in a generation, of element shard.owned.begin. Gaps between tensors have their
  // place, and are zero for good.
  struct Place {
    OptimizerShard shard;
    uint64_t weights = 0;  // fp32
    uint64_t exp_avg = 0;  // of type `moments`, as the next
    uint64_t exp_avg_sq = 0;
    uint64_t average = 0;  // fp32; without an average: not there
  };

  StateLayout(const OptimizerSpec& spec, const std::vector<OptimizerShard>& shards);

  // Gives `bytes` more a place; returns its offset.
  uint64_t add(uint64_t bytes);

  const std::vector<Place>& places() const { return places_; }
  uint64_t byte_count() const { return byte_count_; }

 private:
  std::vector<Place> places_;
  uint64_t byte_count_ = 0;
};

}  // namespace penstock
