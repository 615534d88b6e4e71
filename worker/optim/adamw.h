// AdamW (Loshchilov & Hutter, 2019) over this rank's shards of flat parameter buffers (ZeRO-1): of
// every buffer the rank keeps moments for, and updates, only the range it owns; its replicas own
// the others.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "comm/run/job_spec.h"
#include "comm/run/layout.h"
#include "worker/model/parameter.h"

namespace penstock {

class Kernels;

// Part of one flat buffer.
struct OptimizerShard {
  ParameterSet* parameters = nullptr;  // borrowed
  ParameterKind kind = ParameterKind::kDense;
  Range owned;  // elements of the flat buffer, padding included; shard_range()
};

// One box of one tensor's state, in this process's memory. Logical names carry no rank:
// "<parameter>|weight", "|exp_avg", "|exp_avg_sq".
struct StateSlice {
  std::string name;
  std::vector<int64_t> shape;  // of the whole tensor
  std::vector<int64_t> box_offset;
  std::vector<int64_t> box_size;
  std::span<float> values;  // the box's elements, contiguous
};

// Cuts the flat range [begin, end) of a row-major tensor into boxes that are contiguous in it, in
// order: at most 2N-1 for N dimensions (partial first row, whole rows, partial last row, per
// level).
struct RangeBox {
  std::vector<int64_t> offset;
  std::vector<int64_t> size;
  int64_t begin = 0;  // flat index of its first element
  int64_t count = 0;
};
std::vector<RangeBox> boxes_of_range(std::span<const int64_t> shape, int64_t begin, int64_t end);

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

  // One update of the owned ranges from their gradients times `gradient_factor`. `step` counts from
  // 1.
  void step(int64_t step, double learning_rate, double gradient_factor);

  // Weights and moments of the owned ranges, for saving and restoring. Pointers are stable.
  std::vector<StateSlice> state();

 private:
  struct Moments {
    std::vector<float> exp_avg;  // [owned.size()]
    std::vector<float> exp_avg_sq;
  };
  OptimizerSpec spec_;
  std::vector<OptimizerShard> shards_;
  std::vector<Moments> moments_;  // by shard
  Kernels& kernels_;
};

}  // namespace penstock
