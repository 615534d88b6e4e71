// A checkpoint as a Hugging Face model folder that transformers loads as DeepseekV3ForCausalLM.
#pragma once

#include <optional>
#include <string>

#include "checkpoint/hf_weights.h"
#include "ops/cli/checkpoint_source.h"

namespace penstock {

struct HfExportOptions {
  HfWeightsOptions weights;
  bool compare_logits = true;  // takes the memory of the whole model in fp32
  // Where to write the compared tokens, I32 [n], and the logits that follow each, F32 [n, vocab],
  // as one safetensors file: what another program should compute. Empty: nowhere.
  // REQUIRES: compare_logits, if not empty.
  Path logits_file;
};

struct HfExport {
  size_t tensor_count = 0;
  size_t file_count = 0;
  uint64_t byte_count = 0;
  // Largest difference between a logit of the checkpoint and of the folder: 0 with F32. Absent when
  // they were not compared.
  std::optional<double> logit_difference;
};

// The folder appears complete or not at all: it is written as "<folder>.partial", synced, read back
// and compared, then renamed. What an export that died left there is removed by the next one.
//   kAlreadyExists      there is something at `folder`
//   kFailedPrecondition another export is writing there
//   kResourceExhausted  the disk is full; nothing is left behind
//   kDataLoss           the checkpoint is damaged, or the folder is not what was written
Result<HfExport> export_hf(const CheckpointSource& source, const Path& folder,
                           const HfExportOptions& options);

// The text of config.json.
std::string hf_config_json(const ModelConfig& model, DType dtype, int32_t end_of_document);

}  // namespace penstock
