// What one rank needs to know about its place: its stages, who shares them, which part of them it
// owns, and the message tags of everything that is not token exchange. A pure function of (spec,
// rank).
#pragma once

#include <cstdint>
#include <vector>

#include "comm/base/ids.h"
#include "comm/data/transport.h"
#include "comm/run/job_spec.h"
#include "comm/run/layout.h"
#include "worker/model/parameter.h"

namespace penstock {

// One stage on this rank, serving one direction.
struct LocalStage {
  uint8_t direction = 0;
  int64_t stage = 0;
  Neighbours neighbours;              // pipeline ranks, as in comm/run/layout.h
  std::vector<Rank> dense_replicas;   // ascending, this rank included
  std::vector<Rank> expert_replicas;  // of this rank's experts, ascending, this rank included
  std::vector<Rank> shared_replicas;  // of what first and last stage share; empty for others

  const std::vector<Rank>& replicas_of(ParameterKind kind) const {
    return kind == ParameterKind::kDense    ? dense_replicas
           : kind == ParameterKind::kExpert ? expert_replicas
                                            : shared_replicas;
  }
};

struct RankLayout {
  Rank rank;
  GridPosition position;
  int64_t replica = 0;             // of the pipeline: data_index · expert + expert_index
  std::vector<LocalStage> stages;  // by direction
  // Indices into `stages` by ascending stage: the order of collectives. DualPipe's ranks p and
  // P-1-p hold the same two stages with the directions exchanged, so the order of directions would
  // make each wait for the other.
  std::vector<size_t> by_stage;
  std::vector<Rank> expert_group;  // by expert index
  std::vector<Rank> world;         // all ranks

  // The rank of this replica at another place of the pipeline.
  Rank pipeline_peer(const ParallelismSpec& parallelism, int32_t pipeline_index) const;
};

RankLayout make_rank_layout(const JobSpec& spec, Rank rank);

// Index of `rank` in a list that holds it.
int64_t index_in(const std::vector<Rank>& ranks, Rank rank);

// Tags. Token exchange uses those below 2^36 (worker/model), everything else those above.
enum class Channel : uint64_t {
  kActivations = 1,  // detail: direction
  kGradients,        // detail: direction
  kReduceDense,      // detail: stage
  kReduceExperts,    // detail: stage
  kReduceLoads,      // detail: stage
  kReduceTotals,
  kGatherDense,    // detail: stage
  kGatherExperts,  // detail: stage
  kReduceShared,
  kGatherShared,
  kFinish,
  kClock,
  kCompareDense,    // detail: stage
  kCompareExperts,  // detail: stage
  kCompareShared,
};
inline constexpr uint64_t kExchangeTagBits = 36;
inline constexpr uint64_t kExchangeTagsPerStage = uint64_t{1} << (kExchangeTagBits - 1);
constexpr Tag tag_of(Channel channel, int64_t detail = 0) {
  return {static_cast<uint64_t>(channel) << kExchangeTagBits | static_cast<uint64_t>(detail)};
}

}  // namespace penstock
