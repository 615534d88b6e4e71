// How two checkpoints differ, tensor by tensor, whatever their layouts.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/manifest.h"
#include "comm/base/file.h"

namespace penstock {

// A checkpoint and where its segments lie. Borrowed.
struct CheckpointFiles {
  const Path& directory;
  const Manifest& manifest;
};

struct TensorDifference {
  enum class Kind { kOnlyInA, kOnlyInB, kShape, kValues };  // kShape: or element type
  std::string name;
  Kind kind = Kind::kValues;
  // Of kValues, when values were read:
  uint64_t element_count = 0;          // elements whose bits differ
  std::optional<double> max_abs = {};  // infinite where a NaN is on one side; empty: no number type
};

struct Comparison {
  uint64_t equal_count = 0;                   // tensors
  std::vector<TensorDifference> differences;  // ascending by name
  bool equal() const { return differences.empty(); }
};

// Compares digests, which reads nothing but the manifests; tensors of a manifest without them are
// digested here. `read_values` also reads each tensor that differs, from both. Memory: a
// few chunks of 16 MiB. kDataLoss, naming file, rank and tensor, where a segment is damaged or
// gone.
Result<Comparison> compare_checkpoints(const CheckpointFiles& a, const CheckpointFiles& b,
                                       bool read_values);

}  // namespace penstock
