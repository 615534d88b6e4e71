// The weights of a checkpoint as the safetensors files of a Hugging Face model folder: any layout
// that saved it becomes whole tensors. Holds at most a fixed amount of the model in memory.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/file_system.h"
#include "checkpoint/manifest.h"
#include "comm/base/hash.h"

namespace penstock {

struct HfWeightsOptions {
  DType dtype = DType::kBf16;  // kF32 or kBf16, of matrices and norms; router biases stay F32
  uint64_t shard_bytes_max = 5'000'000'000;  // of data; a larger tensor has a file of its own
};

struct HfWeights {
  struct Tensor {
    std::string name;
    Digest digest;  // of its bytes as they were handed to the file
  };
  std::vector<Tensor> tensors;
  uint64_t byte_count = 0;  // of all tensors
  size_t file_count = 0;
};

// Writes the files, and the index when there are several, into `folder`, which exists. Every weight
// of the manifest under its own name, which is Hugging Face's; a multi-token-prediction layer also
// gets the copies of embedding and head that are published under it. kResourceExhausted before
// anything is written when the disk has not the room; kNotFound when the checkpoint has no weights.
Result<HfWeights> write_hf_weights(const Path& checkpoint, const Manifest& manifest,
                                   const Path& folder, const HfWeightsOptions& options,
                                   FileSystem& files = real_file_system());

// Reads the folder back, strictly, and compares every byte with what was written. kDataLoss names
// the tensor. `folder` has its config.json.
Status verify_hf_weights(const Path& folder, const HfWeights& written);

}  // namespace penstock
