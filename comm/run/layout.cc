#include "comm/run/layout.h"

#include <algorithm>

#include "comm/base/check.h"

namespace penstock {

namespace {

// Two ranks hold a stage only when directions enter from both ends of a pipeline that has two ends.
bool enters_at_both_ends(const ParallelismSpec& parallelism) {
  return parallelism.schedule == Schedule::kDualPipe && parallelism.pipeline > 1;
}

}  // namespace

GridPosition grid_position(const ParallelismSpec& parallelism, Rank rank) {
  PENSTOCK_CHECK(rank.value >= 0 && rank.value < parallelism.world_size(), rank.value);
  return {.pipeline_index = rank.value / (parallelism.data * parallelism.expert),
          .data_index = rank.value / parallelism.expert % parallelism.data,
          .expert_index = rank.value % parallelism.expert};
}

Rank rank_at(const ParallelismSpec& parallelism, const GridPosition& position) {
  PENSTOCK_CHECK(position.pipeline_index >= 0 && position.pipeline_index < parallelism.pipeline);
  PENSTOCK_CHECK(position.data_index >= 0 && position.data_index < parallelism.data);
  PENSTOCK_CHECK(position.expert_index >= 0 && position.expert_index < parallelism.expert);
  const int64_t replica = position.pipeline_index * parallelism.data + position.data_index;
  return Rank{static_cast<int32_t>(replica * parallelism.expert + position.expert_index)};
}

std::vector<Rank> expert_group(const ParallelismSpec& parallelism, Rank rank) {
  GridPosition position = grid_position(parallelism, rank);
  std::vector<Rank> group;
  for (position.expert_index = 0; position.expert_index < parallelism.expert;
       ++position.expert_index) {
    group.push_back(rank_at(parallelism, position));
  }
  return group;
}

int64_t stage_count(const ParallelismSpec& parallelism) {
  return parallelism.pipeline * (parallelism.schedule == Schedule::kDualPipeV ? 2 : 1);
}

std::vector<int64_t> stage_hosts(const ParallelismSpec& parallelism, int64_t stage) {
  const int64_t stages = stage_count(parallelism);
  PENSTOCK_CHECK(stage >= 0 && stage < stages, stage, stages);
  const int64_t mirror = stages - 1 - stage;
  if (enters_at_both_ends(parallelism)) return {std::min(stage, mirror), std::max(stage, mirror)};
  return {stage < parallelism.pipeline ? stage : mirror};
}

std::vector<int64_t> stages_of(const ParallelismSpec& parallelism, int64_t pipeline_index) {
  PENSTOCK_CHECK(pipeline_index >= 0 && pipeline_index < parallelism.pipeline, pipeline_index);
  if (direction_count(parallelism) == 1) return {pipeline_index};
  return {pipeline_index, stage_count(parallelism) - 1 - pipeline_index};
}

int64_t direction_count(const ParallelismSpec& parallelism) {
  const bool two_legs = parallelism.schedule == Schedule::kDualPipeV;
  return two_legs || enters_at_both_ends(parallelism) ? 2 : 1;
}

int64_t microbatches_per_direction(const ParallelismSpec& parallelism) {
  return parallelism.microbatches / (enters_at_both_ends(parallelism) ? 2 : 1);
}

int64_t microbatch_index(const ParallelismSpec& parallelism, int64_t direction,
                         int64_t microbatch) {
  const int64_t count = microbatches_per_direction(parallelism);
  PENSTOCK_CHECK(direction >= 0 && direction < direction_count(parallelism), direction);
  PENSTOCK_CHECK(microbatch >= 0 && microbatch < count, microbatch, count);
  return microbatch + (enters_at_both_ends(parallelism) ? direction * count : 0);
}

Neighbours pipeline_neighbours(const ParallelismSpec& parallelism, int64_t pipeline_index,
                               int64_t direction) {
  PENSTOCK_CHECK(pipeline_index >= 0 && pipeline_index < parallelism.pipeline, pipeline_index);
  PENSTOCK_CHECK(direction >= 0 && direction < direction_count(parallelism), direction);
  const auto last = static_cast<int32_t>(parallelism.pipeline) - 1;
  const auto here = static_cast<int32_t>(pipeline_index);
  const int32_t lower = here > 0 ? here - 1 : -1;
  const int32_t higher = here < last ? here + 1 : -1;
  Neighbours result = direction == 0 ? Neighbours{lower, higher} : Neighbours{higher, lower};
  if (parallelism.schedule == Schedule::kDualPipeV && here == last) {
    (direction == 0 ? result.next : result.previous) = here;
  }
  return result;
}

std::vector<Rank> dense_replicas(const ParallelismSpec& parallelism, int64_t stage) {
  std::vector<Rank> ranks;
  for (const int64_t host : stage_hosts(parallelism, stage)) {
    for (int64_t data = 0; data < parallelism.data; ++data) {
      for (int64_t expert = 0; expert < parallelism.expert; ++expert) {
        ranks.push_back(rank_at(parallelism, {host, data, expert}));
      }
    }
  }
  return ranks;
}

std::vector<Rank> expert_replicas(const ParallelismSpec& parallelism, int64_t stage,
                                  int64_t expert_index) {
  std::vector<Rank> ranks;
  for (const int64_t host : stage_hosts(parallelism, stage)) {
    for (int64_t data = 0; data < parallelism.data; ++data) {
      ranks.push_back(rank_at(parallelism, {host, data, expert_index}));
    }
  }
  return ranks;
}

std::vector<Rank> end_stage_replicas(const ParallelismSpec& parallelism) {
  std::vector<Rank> ranks = dense_replicas(parallelism, 0);
  const std::vector<Rank> last = dense_replicas(parallelism, stage_count(parallelism) - 1);
  ranks.insert(ranks.end(), last.begin(), last.end());
  std::sort(ranks.begin(), ranks.end());
  ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  return ranks;
}

Range stage_layers(int64_t layer_count, int64_t stage_count, int64_t stage) {
  PENSTOCK_CHECK(stage_count > 0 && layer_count >= stage_count, layer_count, stage_count);
  PENSTOCK_CHECK(stage >= 0 && stage < stage_count, stage, stage_count);
  const int64_t each = layer_count / stage_count;
  const int64_t longer_count = layer_count % stage_count;  // stages [0, this) have one more
  const int64_t begin = stage * each + std::min(stage, longer_count);
  return {begin, begin + each + (stage < longer_count ? 1 : 0)};
}

Range local_experts(int64_t n_routed_experts, int64_t expert, int64_t expert_index) {
  PENSTOCK_CHECK(expert > 0 && n_routed_experts % expert == 0, n_routed_experts, expert);
  PENSTOCK_CHECK(expert_index >= 0 && expert_index < expert, expert_index, expert);
  const int64_t each = n_routed_experts / expert;
  return {expert_index * each, (expert_index + 1) * each};
}

}  // namespace penstock
