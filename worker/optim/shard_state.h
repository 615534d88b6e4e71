// The part of flat parameter buffers that a rank owns (ZeRO-1), cut into pieces of single tensors,
// and state that hangs off those pieces as the slices a checkpoint holds.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/slice.h"
#include "comm/run/layout.h"
#include "worker/model/parameter.h"

namespace penstock {

// Part of one flat buffer.
struct OptimizerShard {
  ParameterSet* parameters = nullptr;  // borrowed
  ParameterKind kind = ParameterKind::kDense;
  Range owned;  // elements of the flat buffer, gaps included: shard_range() of its replicas
};

// The overlap of one tensor with one shard.
struct ShardPiece {
  const Parameter* parameter = nullptr;
  int64_t begin = 0;  // elements of the tensor
  int64_t end = 0;
  int64_t offset = 0;  // of element `begin` in the shard
};

// In the order of the tensors. REQUIRES: the shard lies in its buffer.
std::vector<ShardPiece> pieces_of(const OptimizerShard& shard);

// One box of one tensor's state, in this process's memory: a name from checkpoint/names.h, a box,
// and its elements of slice.dtype, contiguous.
struct StateSlice {
  TensorSlice slice;
  MutableBytes bytes;
};

// Appends the boxes of a piece, whose state of `dtype` called `name` begins at `first`.
void append_state(const ShardPiece& piece, const std::string& name, DType dtype, void* first,
                  std::vector<StateSlice>& slices);

// The flat range [begin, end) of a row-major tensor as boxes that are each contiguous in it, in
// order: at most 2N-1 for N dimensions (a partial first row, whole rows, a partial last row, at
// each level; docs/checkpoint-format.md). REQUIRES: 0 <= begin <= end <= elements of `shape`.
std::vector<Box> boxes_of_range(std::span<const int64_t> shape, int64_t begin, int64_t end);

}  // namespace penstock
