// What is wrong with a checkpoint: every damage, located. store.h asks for the first one only.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/manifest.h"
#include "checkpoint/segment_reader.h"

namespace penstock {

struct CheckpointDamage {
  std::string file;                  // name within the job's checkpoint directory
  std::optional<Rank> rank;          // who wrote it; empty: a manifest
  std::vector<std::string> tensors;  // "NAME [box]" of what cannot be used, the first few of them
  size_t tensor_count = 0;           // of all of them
  bool continues = false;            // the first of them is the last one of the damage before
  uint64_t begin = 0;                // range of the file
  uint64_t end = 0;
  std::string what;  // why, in short
  Status status;     // the whole sentence, as an error; not kDataLoss: it could not be read
};

// What an error says after it has named the file (by its last mention) and, in brackets, the rank.
std::string without_file(const std::string& message, const std::string& file);

// Opens one segment a manifest lists and compares what can be compared without reading its data.
// kDataLoss when it is missing or another one; whatever keeps only us from reading it (permission)
// stays what it is.
Result<SegmentReader> open_listed(const Path& directory, const Manifest& manifest,
                                  const ManifestSegment& listed);

// Visits everything that keeps the checkpoint from being whole, segment by segment, until the
// visitor says false. `read_data`: every block and digest too, not only what footers tell. Reads
// no more data once `pace` says false: what was visited is then not all.
void visit_damage(const Path& directory, const Manifest& manifest, bool read_data,
                  const std::function<bool(const CheckpointDamage&)>& visit,
                  const ReadPace& pace = {});

struct DamageReport {
  std::vector<CheckpointDamage> damages;  // adjacent blocks are one; at most kDamagesListed
  size_t damage_count = 0;                // of all
};
inline constexpr size_t kDamagesListed = 1000;

// Everything visit_damage() finds, data included.
DamageReport find_damage(const Path& directory, const Manifest& manifest,
                         const ReadPace& pace = {});

}  // namespace penstock
