#include "worker/engine/rank_layout.h"

#include <algorithm>
#include <numeric>

#include "comm/base/check.h"

namespace penstock {

static_assert(static_cast<uint64_t>(Channel::kClock) < uint64_t{1}
                                                           << (kTagBits - kExchangeTagBits));

Rank RankLayout::pipeline_peer(const ParallelismSpec& parallelism, int32_t pipeline_index) const {
  GridPosition peer = position;
  peer.pipeline_index = pipeline_index;
  return rank_at(parallelism, peer);
}

RankLayout make_rank_layout(const JobSpec& spec, Rank rank) {
  const ParallelismSpec& parallelism = spec.parallelism;
  RankLayout layout;
  layout.rank = rank;
  layout.position = grid_position(parallelism, rank);
  layout.replica = layout.position.data_index * parallelism.expert + layout.position.expert_index;
  for (const int64_t stage : stages_of(parallelism, layout.position.pipeline_index)) {
    const auto direction = static_cast<uint8_t>(layout.stages.size());
    layout.stages.push_back(
        {.direction = direction,
         .stage = stage,
         .neighbours = pipeline_neighbours(parallelism, layout.position.pipeline_index, direction),
         .dense_replicas = dense_replicas(parallelism, stage),
         .expert_replicas = expert_replicas(parallelism, stage, layout.position.expert_index),
         .shared_replicas = stage == 0 || stage == stage_count(parallelism) - 1
                                ? end_stage_replicas(parallelism)
                                : std::vector<Rank>()});
  }
  layout.by_stage.resize(layout.stages.size());
  std::iota(layout.by_stage.begin(), layout.by_stage.end(), size_t{0});
  std::sort(layout.by_stage.begin(), layout.by_stage.end(),
            [&](size_t a, size_t b) { return layout.stages[a].stage < layout.stages[b].stage; });
  layout.expert_group = expert_group(parallelism, rank);
  for (int32_t r = 0; r < parallelism.world_size(); ++r) layout.world.push_back(Rank{r});
  return layout;
}

int64_t index_in(const std::vector<Rank>& ranks, Rank rank) {
  const auto found = std::find(ranks.begin(), ranks.end(), rank);
  PENSTOCK_CHECK(found != ranks.end(), rank.value);
  return found - ranks.begin();
}

}  // namespace penstock
