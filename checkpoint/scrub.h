// Reads checkpoints over to the last byte: all of a directory, one after the other.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "checkpoint/verify.h"
#include "comm/base/ids.h"

namespace penstock {

// One checkpoint and what was found.
struct CheckedCheckpoint {
  uint64_t commit_seq = 0;
  std::string manifest_file;
  std::optional<int64_t> step;  // empty: its manifest cannot be read
  uint64_t bytes = 0;           // of its segments
  bool set_aside = false;       // by set_aside(): nobody uses it, so it was not read
  DamageReport report;

  bool damaged() const;
  // Nothing shows that it is damaged, but not all of it could be read.
  bool unreadable() const;
};

// Which ones: all, by default.
struct CheckpointSelection {
  std::optional<uint64_t> commit_seq;
  std::optional<int64_t> step;
};

// Visits each selected checkpoint of the directory once it was read, in the order of their commits.
// Retention may run beside it: one that is removed while it is read is left out. Segments that
// several manifests name are read for each. Stops, without an error, as soon as `pace` says false.
Status check_checkpoints(const Path& directory, JobId job, const CheckpointSelection& selection,
                         const ReadPace& pace, const std::function<void(CheckedCheckpoint)>& visit);

// "file (rank 1), bytes 4096:20480, lm_head.weight [0:8, 0:4] and 2 more tensors: what is wrong".
std::string words_of(const CheckpointDamage& damage);

}  // namespace penstock
