// The manifest of one checkpoint: which segments it is made of and which box of which tensor each
// holds. The file's existence under its final name is what makes the checkpoint exist.
//
// On disk: JSON, then one line "digest <32 hex digits>" over everything before it. Human-readable,
// machine-checked.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/segment.h"
#include "checkpoint/slice.h"
#include "comm/base/clock.h"
#include "comm/base/file.h"

namespace penstock {

// Written; older ones are read. Version 1 has no digest of whole tensors (its pieces' do not
// add up) and does not say which program wrote it.
inline constexpr uint32_t kManifestVersion = 2;
inline constexpr uint64_t kManifestBytesMax = 256 << 20;
inline constexpr size_t kManifestSegmentsMax = 1 << 20;
inline constexpr size_t kManifestPiecesMax = 4 << 20;

// One segment file of the checkpoint.
struct ManifestSegment {
  std::string file;  // a name that parse_segment_file_name accepts: never a path
  Rank rank;
  uint64_t byte_count = 0;
  Digest footer_digest;
  bool operator==(const ManifestSegment&) const = default;
};

// One box of a tensor, and the segment that holds it.
struct ManifestPiece {
  size_t segment = 0;  // index into Manifest::segments
  Box box;
  Digest digest;  // as in its segment
  bool operator==(const ManifestPiece&) const = default;
};

struct ManifestTensor {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::vector<ManifestPiece> pieces;
  bool operator==(const ManifestTensor&) const = default;

  // Of the whole tensor: equal for equal contents, whatever the pieces. REQUIRES: of a manifest
  // that has_tensor_digests().
  Digest digest() const;
};

struct Manifest {
  uint32_t version = kManifestVersion;
  Uuid store;
  JobId job;
  Epoch epoch;
  int64_t step = 0;
  uint64_t commit_seq = 0;           // 1 is a job's first commit; strictly increasing, never reused
  uint64_t previous_commit_seq = 0;  // newest readable manifest at commit time; 0: none
  Digest previous_digest;            // of that manifest
  Instant created_at;                // information only: nothing is decided by clocks
  std::string spec_json;             // canonical job spec, exact bytes
  Digest spec_digest;                // of spec_json
  std::string layout;                // free text: "pipeline 4, data 1, expert 2, dualpipe"
  std::string build;                 // version of the program that committed it
  std::vector<ManifestSegment> segments;  // ascending by file name
  std::vector<ManifestTensor> tensors;    // ascending by name
  bool operator==(const Manifest&) const = default;

  uint64_t payload_bytes() const;  // of all tensors
  bool has_tensor_digests() const { return version >= 2; }
  // nullptr when the checkpoint has no such tensor. REQUIRES: tensors ascend by name.
  const ManifestTensor* find(std::string_view name) const;
};

// The file's text, digest line included. kInvalidArgument when spec or layout is not UTF-8.
Result<std::string> encode_manifest(const Manifest& manifest);
// Checks size, digest line, JSON depth, every count, name, box and the order of lists. kDataLoss
// otherwise. Does not prove tiling: prove_whole() does.
Result<Manifest> decode_manifest(std::string_view text);
// A manifest and the digest in its last line: what the next manifest names as its predecessor.
struct StoredManifest {
  Manifest manifest;
  Digest digest;
};
// decode_manifest of a file; errors carry its path. Refuses a manifest whose commit_seq is not its
// file name's, which is how an older copy put in a newer one's place shows.
Result<StoredManifest> read_manifest(const Path& path);

// "000000000012.manifest"
std::string manifest_file_name(uint64_t commit_seq);
Result<uint64_t> parse_manifest_file_name(std::string_view name);

// Every tensor tiled exactly by its pieces, or kDataLoss naming the tensor and the gap or overlap.
Status prove_whole(const Manifest& manifest);

}  // namespace penstock
