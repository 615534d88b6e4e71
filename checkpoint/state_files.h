// Everything that a checkpoint holds (weights, masters, moments, averages, scalars of the run) as
// files that other programs read, every bit as it is, under the logical names of names.h.
//
//   safetensors   state.safetensors, or state-XXXXX-of-YYYYY.safetensors; __metadata__ has step,
//                 layout, job spec and a digest, so that an import gives the same checkpoint again
//   dcp           what torch.distributed.checkpoint saves from one rank: .metadata, __0_N.distcp
//                 (torch_files.h)
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/compare.h"
#include "checkpoint/file_system.h"
#include "checkpoint/names.h"
#include "checkpoint/safetensors.h"

namespace penstock {

enum class StateFormat { kSafetensors, kDcp };

struct StateFiles {
  size_t tensor_count = 0;
  size_t file_count = 0;
  uint64_t byte_count = 0;  // of all tensors
};

// Writes the files into `folder`, which exists and is empty, and syncs each; reads them back, past
// the page cache where the system lets it, and compares the digest of every tensor with what was
// loaded. Tensors go into files of at most `file_bytes_max` bytes of data, in the order of names; a
// larger one has a file of its own.
//   kResourceExhausted  the disk has not the room
//   kDataLoss           the checkpoint is damaged, or the files are not what was written
Result<StateFiles> write_state_files(const CheckpointFiles& checkpoint, StateFormat format,
                                     uint64_t file_bytes_max, const Path& folder,
                                     FileSystem& files = real_file_system());

// Names the whole state: equal for equal names, types, shapes and bits, whatever the layout.
// With `kind`, its tensors of that kind alone. REQUIRES: the manifest has_tensor_digests().
std::string state_digest(const Manifest& manifest, std::optional<TensorKind> kind = {});

// A folder of safetensors as written above, for importing. Headers are read and checked, no data.
struct StateFolder {
  std::vector<SafetensorsFile> files;  // by name
  JobId job;
  int64_t step = 0;
  std::string layout;
  std::string spec_json;
  std::string digest;  // state_digest() of the checkpoint; empty: it had none
};
// kNotFound when there is no such folder or it holds no safetensors files; kDataLoss when they do
// not belong together, one is missing, a tensor is there twice, or they are no exported state.
Result<StateFolder> open_state_folder(const Path& folder);

}  // namespace penstock
