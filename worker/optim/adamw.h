// AdamW (Loshchilov & Hutter, 2019) over this rank's shards of flat parameter buffers (ZeRO-1): of
// every buffer the rank keeps moments for, and updates, only the range it owns; its replicas own
// the others.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/slice.h"
#include "comm/run/job_spec.h"
#include "comm/run/layout.h"
#include "worker/model/parameter.h"

namespace penstock {

class Kernels;

// Part of one flat buffer.
struct OptimizerShard {
  ParameterSet* parameters = nullptr;  // borrowed
  ParameterKind kind = ParameterKind::kDense;
  Range owned;  // elements of the flat buffer, gaps included: shard_range() of its replicas
};

// One box of one tensor's state, in this process's memory: a name from checkpoint/names.h, a box,
// and its elements, contiguous.
struct StateSlice {
  TensorSlice slice;
  std::span<float> values;
};

// The flat range [begin, end) of a row-major tensor as boxes that are each contiguous in it, in
// order: at most 2N-1 for N dimensions (a partial first row, whole rows, a partial last row, at
// each level; checkpoints.md §3.5). REQUIRES: 0 <= begin <= end <= elements of `shape`.
std::vector<Box> boxes_of_range(std::span<const int64_t> shape, int64_t begin, int64_t end);

// Not thread-safe. Moments are allocated, and zero, from construction.
class AdamW {
 public:
  // Borrows `kernels`.
  AdamW(const OptimizerSpec& spec, std::vector<OptimizerShard> shards, Kernels& kernels);

  // Sum of the squared gradients of the owned ranges, in double, in order. Summed over every rank
  // it counts each parameter of the model once.
  double gradient_square_sum() const;

  // Factor for gradients whose global L2 norm is `norm`: min(1, clip / (norm + 1e-6)); 1 when
  // clipping is off.
  double clip_factor(double norm) const;

  // One update of the owned ranges from their gradients times `gradient_factor`. `step` counts
  // from 1. Weight decay falls on Parameter::decays() alone.
  void step(int64_t step, double learning_rate, double gradient_factor);

  // Weights and moments of the owned ranges, for saving and restoring: three slices per box. The
  // memory they point to stays where it is.
  std::vector<StateSlice> state();

 private:
  // The overlap of one tensor with one shard.
  struct Piece {
    const Parameter* parameter = nullptr;
    int64_t begin = 0;  // elements of the tensor
    int64_t end = 0;
    float* exp_avg = nullptr;  // of element `begin`
    float* exp_avg_sq = nullptr;
  };

  const OptimizerSpec spec_;
  Kernels& kernels_;
  std::vector<OptimizerShard> shards_;
  std::vector<std::vector<float>> moments_;  // by shard: both moments, one behind the other
  std::vector<Piece> pieces_;
};

}  // namespace penstock
