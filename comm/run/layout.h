// Where things are in a job's rank grid. Pure functions of the spec; every process computes the
// same.
//
//   rank = (pipeline_index · data + data_index) · expert + expert_index
//
// Expert peers are neighbours, so a placement that fills hosts in rank order keeps their all-to-all
// inside one host.
//
// Which stages pipeline rank p of P hosts, and for which direction (program.h):
//   schedule         stages   direction 0   direction 1   micro-batches of a direction
//   1f1b, zb1p         P          p              -        all
//   dualpipe, P > 1    P          p           P-1-p       half each: 0 enters at rank 0, 1 at P-1
//   dualpipev         2P          p           2P-1-p      all: 0 and 1 are the two legs of one way
// A DualPipe stage is on two ranks, any other on one. DualPipe on one rank is 1F1B.
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

// Stages of the whole model; every stage needs a layer.
int64_t stage_count(const ParallelismSpec& parallelism);
// Pipeline ranks that hold a copy of `stage`, ascending.
std::vector<int64_t> stage_hosts(const ParallelismSpec& parallelism, int64_t stage);
// Stages on a pipeline rank, by the direction they serve.
std::vector<int64_t> stages_of(const ParallelismSpec& parallelism, int64_t pipeline_index);

// pipeline · microbatches is at most this: it bounds what the coordinator's planning takes, about
// 20 MB of instructions, twice that under DualPipeV.
inline constexpr int64_t kPlannedMicrobatchesMax = 1 << 17;

int64_t direction_count(const ParallelismSpec& parallelism);
int64_t microbatches_per_direction(const ParallelismSpec& parallelism);
// Where micro-batch `microbatch` of `direction` stands among the replica's `microbatches` of a
// step: what names its data. Both legs of a DualPipeV micro-batch give the same number.
int64_t microbatch_index(const ParallelismSpec& parallelism, int64_t direction, int64_t microbatch);

// The pipeline ranks that hold the stages before and after this rank's stage of a direction. -1:
// none, the direction enters or exits here. This rank itself: the local hand-off of DualPipeV's
// last rank (program.h), which no instruction stands for.
struct Neighbours {
  int32_t previous = -1;
  int32_t next = -1;
  bool operator==(const Neighbours&) const = default;
};
Neighbours pipeline_neighbours(const ParallelismSpec& parallelism, int64_t pipeline_index,
                               int64_t direction);

// Every rank that holds the stage's dense (not expert-sharded) parameters, ascending.
std::vector<Rank> dense_replicas(const ParallelismSpec& parallelism, int64_t stage);
// Every rank that holds the stage's experts of one expert index, ascending.
std::vector<Rank> expert_replicas(const ParallelismSpec& parallelism, int64_t stage,
                                  int64_t expert_index);

// Every rank that holds the first or the last stage, ascending: what both use is held by all of
// these (worker/model/parameter.h).
std::vector<Rank> end_stage_replicas(const ParallelismSpec& parallelism);

struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
  bool operator==(const Range&) const = default;
};

// Decoder layers of a stage: as even as can be, the earlier stages taking one more when it does not
// divide. Stage 0 also has the embedding, the last stage the final norm and the head.
Range stage_layers(int64_t layer_count, int64_t stage_count, int64_t stage);
// Seats (expert_seats.h) of one expert index. REQUIRES: expert divides n_routed_experts.
Range local_experts(int64_t n_routed_experts, int64_t expert, int64_t expert_index);

}  // namespace penstock
