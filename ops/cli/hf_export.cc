#include "ops/cli/hf_export.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "checkpoint/hf_folder.h"
#include "comm/base/minifloat.h"
#include "comm/base/random.h"
#include "ops/cli/partial_folder.h"
#include "worker/data/hf_tokenizer.h"
#include "worker/data/tokenizer.h"
#include "worker/model/generator.h"

namespace penstock {

namespace {

using OrderedJson = nlohmann::ordered_json;

constexpr int64_t kComparedTokens = 64;

std::string generation_config_json(int32_t end_of_document) {
  const OrderedJson json = {{"_from_model_config", true},
                            {"bos_token_id", end_of_document},
                            {"eos_token_id", end_of_document}};
  return json.dump(2) + "\n";
}

// The same tokens for every export of a model.
std::vector<int32_t> compared_tokens(const JobSpec& spec) {
  Random random(0, 0);
  std::vector<int32_t> tokens(static_cast<size_t>(std::min(kComparedTokens, spec.data.seq_length)));
  for (int32_t& token : tokens) token = static_cast<int32_t>(random.below(spec.model.vocab_size));
  return tokens;
}

Result<std::vector<float>> logits_of(Generator& generator, std::span<const int32_t> tokens) {
  PENSTOCK_TRY_ASSIGN(const std::span<const float> logits, generator.logits(tokens));
  return std::vector<float>(logits.begin(), logits.end());
}

struct Comparison {
  std::vector<int32_t> tokens;
  std::vector<float> logits;  // the folder's
  double difference = 0.0;    // largest to the checkpoint's: what its precision moved
};

Status write_logits(const Path& path, const Comparison& compared) {
  const auto count = std::ssize(compared.tokens);
  const auto header =
      lay_out_safetensors({{.name = "tokens", .dtype = DType::kI32, .shape = {count}},
                           {.name = "logits",
                            .dtype = DType::kF32,
                            .shape = {count, std::ssize(compared.logits) / count}}});
  PENSTOCK_TRY_ASSIGN(SafetensorsWriter writer,
                      SafetensorsWriter::create(path, header, real_file_system()));
  PENSTOCK_TRY(writer.append(std::as_bytes(std::span(compared.logits))));
  PENSTOCK_TRY(writer.append(std::as_bytes(std::span(compared.tokens))));
  return writer.finish();
}

// The model as the checkpoint has it, then as the folder has it: the folder's logits must be
// exactly those of the checkpoint's weights in the folder's precision.
Result<Comparison> compare_logits(const CheckpointSource& source, const HfFolder& folder) {
  const std::vector<int32_t> tokens = compared_tokens(source.spec);
  Generator generator(source.spec.model, std::ssize(tokens));
  PENSTOCK_TRY(load_weights(source, generator));
  PENSTOCK_TRY_ASSIGN(const std::vector<float> trained, logits_of(generator, tokens));
  for (const Generator::Weight& weight : generator.weights()) {
    const auto found = folder.weights().find(weight.name);
    if (found == folder.weights().end() || found->second.entry->dtype != DType::kBf16) continue;
    for (float& value : weight.values) {
      value = round_to_bf16(value);
    }
  }
  PENSTOCK_TRY_ASSIGN(const std::vector<float> expected, logits_of(generator, tokens));
  for (const Generator::Weight& weight : generator.weights()) {
    // A weight that the folder did not fill would show.
    std::fill(weight.values.begin(), weight.values.end(), std::numeric_limits<float>::quiet_NaN());
    PENSTOCK_TRY(folder.read(weight.name, weight.shape, weight.values));
  }
  PENSTOCK_TRY_ASSIGN(const std::vector<float> exported, logits_of(generator, tokens));
  double difference = 0.0;
  for (size_t i = 0; i < exported.size(); ++i) {
    if (std::memcmp(&exported[i], &expected[i], sizeof(float)) != 0) {
      return data_loss(fmt::format("{} computes {} where the checkpoint computes {}, for token {}",
                                   folder.path().string(), exported[i], expected[i],
                                   i / static_cast<size_t>(source.spec.model.vocab_size)));
    }
    const double moved = std::abs(static_cast<double>(exported[i]) - trained[i]);
    if (!(moved <= difference)) difference = moved;  // NaN sticks
  }
  return Comparison{tokens, exported, difference};
}

}  // namespace

std::string hf_config_json(const ModelConfig& model, DType dtype, int32_t end_of_document) {
  OrderedJson json = {{"architectures", {"DeepseekV3ForCausalLM"}},
                      {"model_type", "deepseek_v3"},
                      {"attention_bias", false},
                      {"attention_dropout", 0.0},
                      {"bos_token_id", end_of_document},
                      {"eos_token_id", end_of_document},
                      {"ep_size", 1},
                      {"hidden_act", "silu"},
                      {"moe_layer_freq", 1},
                      {"num_key_value_heads", model.num_attention_heads},
                      {"num_nextn_predict_layers", 0},
                      {"pretraining_tp", 1},
                      {"rope_interleave", true},
                      {"scoring_func", "sigmoid"},
                      {"tie_word_embeddings", false},
                      {"topk_method", "noaux_tc"},
                      {"torch_dtype", dtype == DType::kF32 ? "float32" : "bfloat16"},
                      {"use_cache", true}};
  json.update(OrderedJson::parse(to_json(model)));
  if (json.contains("rope_scaling") && json["rope_scaling"].is_null()) json.erase("rope_scaling");
  return json.dump(2) + "\n";
}

Result<HfExport> export_hf(const CheckpointSource& source, const Path& folder,
                           const HfExportOptions& options) {
  PENSTOCK_TRY_ASSIGN(const auto tokenizer, make_tokenizer(source.spec.data.tokenizer));
  PENSTOCK_TRY_ASSIGN(PartialFolder partial, PartialFolder::create(folder));
  PENSTOCK_TRY_ASSIGN(const HfWeights written, write_hf_weights(source.directory, source.manifest,
                                                                partial.path(), options.weights));
  const int32_t end = tokenizer->end_of_document();
  PENSTOCK_TRY(
      write_and_sync(partial.path() / kHfConfigFile,
                     as_bytes(hf_config_json(source.spec.model, options.weights.dtype, end))));
  PENSTOCK_TRY(write_and_sync(partial.path() / "generation_config.json",
                              as_bytes(generation_config_json(end))));
  PENSTOCK_TRY(write_hf_tokenizer(source.spec.data.tokenizer, *tokenizer,
                                  source.spec.model.max_position_embeddings, partial.path()));

  PENSTOCK_TRY(verify_hf_weights(partial.path(), written));
  HfExport report{.tensor_count = written.tensors.size(),
                  .file_count = written.file_count,
                  .byte_count = written.byte_count,
                  .logit_difference = std::nullopt};
  if (options.compare_logits) {
    PENSTOCK_TRY_ASSIGN(const HfFolder opened, HfFolder::open(partial.path()));
    PENSTOCK_TRY_ASSIGN(const Comparison compared, compare_logits(source, opened));
    report.logit_difference = compared.difference;
    if (!options.logits_file.empty()) PENSTOCK_TRY(write_logits(options.logits_file, compared));
  }
  PENSTOCK_TRY(partial.publish());
  return report;
}

}  // namespace penstock
