// Where things are in a job's rank grid. Pure functions of the spec; every process computes the
// same.
//
//   rank = (pipeline_index · data + data_index) · expert + expert_index
//
// Expert peers are neighbours, so a placement that fills hosts in rank order keeps their all-to-all
// inside one host. A DualPipe rank p hosts stages p and P-1-p; a 1F1B rank hosts stage p alone.
#pragma once

#include <cstdint>
#include <vector>

#include "comm/base/ids.h"
#include "comm/run/job_spec.h"

namespace penstock {

struct GridPosition {
  int64_t pipeline_index = 0;
  int64_t data_index = 0;
  int64_t expert_index = 0;
  bool operator==(const GridPosition&) const = default;
};

GridPosition grid_position(const ParallelismSpec& parallelism, Rank rank);
Rank rank_at(const ParallelismSpec& parallelism, const GridPosition& position);

// The ranks that exchange tokens with `rank`: same pipeline and data index, in expert order, itself
// included.
std::vector<Rank> expert_group(const ParallelismSpec& parallelism, Rank rank);

// Pipeline ranks that hold a copy of `stage`, ascending (two under DualPipe with P > 1, else one).
std::vector<int64_t> stage_hosts(const ParallelismSpec& parallelism, int64_t stage);
// Stages on a pipeline rank: under DualPipe [p, P-1-p], serving directions 0 and 1; under 1F1B [p].
std::vector<int64_t> stages_of(const ParallelismSpec& parallelism, int64_t pipeline_index);

// Every rank that holds the stage's dense (not expert-sharded) parameters, ascending.
std::vector<Rank> dense_replicas(const ParallelismSpec& parallelism, int64_t stage);
// Every rank that holds the stage's experts of one expert index, ascending.
std::vector<Rank> expert_replicas(const ParallelismSpec& parallelism, int64_t stage,
                                  int64_t expert_index);

struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
  bool operator==(const Range&) const = default;
};

// Decoder layers of a stage: as even as can be, the earlier stages taking one more when it does not
// divide. Stage 0 also has the embedding, the last stage the final norm and the head.
Range stage_layers(int64_t layer_count, int64_t stage_count, int64_t stage);
// Routed experts of one expert index. REQUIRES: expert divides n_routed_experts.
Range local_experts(int64_t n_routed_experts, int64_t expert, int64_t expert_index);

}  // namespace penstock
