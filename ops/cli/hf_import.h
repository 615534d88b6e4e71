// Hugging Face model folders as the start of a run.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/hf_folder.h"
#include "comm/run/job_spec.h"

namespace penstock {

// What a folder holds, every byte of it read.
struct HfImport {
  ModelConfig model;  // config.json's
  size_t weight_count = 0;
  int64_t parameter_count = 0;
  std::vector<std::string> ignored;  // tensors that the model has no place for
};

// Opens the folder and reads all of it: config.json is a model that Penstock trains, every weight
// of that model is there with its shape, and every value is finite. kInvalidArgument for a
// config.json of another model, kDataLoss naming file, tensor and rule for the rest.
Result<HfImport> read_hf_folder(const Path& folder);

// Ok when a run of `spec` can start from spec.checkpoint.init_from: as above without the values,
// and config.json computes the same function as spec.model. Keys that training may choose anew are
// free: max_position_embeddings, rope_scaling, initializer_range.
Status check_init_from(const JobSpec& spec);

// A complete job spec that starts from `folder` (absolute), to be adapted: YAML with comments.
// `tokenizer` as DataSpec::tokenizer.
std::string starting_spec(const ModelConfig& model, const Path& folder,
                          const std::string& tokenizer);

// The folder's tokenizer, as DataSpec::tokenizer: "bytes" where Penstock exported that, the path of
// a tokenizer.model, or "" for one that Penstock does not read.
std::string hf_folder_tokenizer(const Path& folder);

}  // namespace penstock
