#include "ops/cli/hf_import.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "worker/data/tokenizer.h"
#include "worker/model/weight_list.h"

namespace penstock {

namespace {

using Json = nlohmann::json;

constexpr uint64_t kTokenizerConfigBytesMax = 1 << 20;

// The folder's config.json as a model. transformers counts a prediction layer for models that have
// none, so that what the files hold decides.
Result<ModelConfig> model_of(const HfFolder& folder) {
  const std::string origin = (folder.path() / kHfConfigFile).string();
  Json config = Json::parse(folder.config());
  const Json layers = config.value("num_hidden_layers", Json(nullptr));
  const bool predicts = folder.weights().contains(
      fmt::format("model.layers.{}.eh_proj.weight", layers.is_number() ? layers.dump() : "0"));
  if (predicts || !config.contains("num_nextn_predict_layers")) {
    return parse_model_config(folder.config(), origin);
  }
  config["num_nextn_predict_layers"] = 0;
  return parse_model_config(config.dump(2), origin);
}

Status check_weights(const HfFolder& folder, const std::vector<WeightShape>& weights) {
  for (const WeightShape& weight : weights) {
    PENSTOCK_TRY(folder.check(weight.name, weight.shape));
  }
  return {};
}

Status check_finite(const HfFolder& folder, const WeightShape& weight) {
  return folder.for_each_piece(
      weight.name, weight.shape, [&](int64_t first, std::span<const float> values) -> Status {
        const auto bad = std::find_if(values.begin(), values.end(),
                                      [](float value) { return !std::isfinite(value); });
        if (bad == values.end()) return {};
        return data_loss(fmt::format("{}: tensor {}: element {} is {}", folder.path().string(),
                                     weight.name, first + (bad - values.begin()), *bad));
      });
}

Status check_same_function(const ModelConfig& folder, const ModelConfig& spec) {
  Json theirs = Json::parse(to_json(folder));
  Json ours = Json::parse(to_json(spec));
  for (const char* key : {"max_position_embeddings", "rope_scaling", "initializer_range"}) {
    theirs.erase(key);
    ours.erase(key);
  }
  for (const auto& [key, value] : ours.items()) {
    if (theirs.at(key) == value) continue;
    return invalid_argument(
        fmt::format("model.{} is {}, but {} for the weights of checkpoint.init_from; its "
                    "config.json may be pasted under model:",
                    key, value.dump(), theirs.at(key).dump()));
  }
  return {};
}

// A name as metadata.name takes it.
std::string name_from(const Path& folder) {
  std::string name;
  for (char c : folder.filename().string()) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    const bool letter = c >= 'a' && c <= 'z';
    if (letter || (!name.empty() && ((c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.'))) {
      name.push_back(c);
    }
  }
  if (name.empty()) return "imported";
  return name.substr(0, 63);
}

}  // namespace

Result<HfImport> read_hf_folder(const Path& path) {
  PENSTOCK_TRY_ASSIGN(const HfFolder folder, HfFolder::open(path));
  HfImport import;
  PENSTOCK_TRY_ASSIGN(import.model, model_of(folder));
  const std::vector<WeightShape> weights = weight_list(import.model);
  PENSTOCK_TRY(check_weights(folder, weights));
  std::set<std::string> known;
  for (const WeightShape& weight : weights) {
    PENSTOCK_TRY(check_finite(folder, weight));
    import.parameter_count += element_count(weight.shape);
    known.insert(weight.name);
  }
  import.weight_count = weights.size();
  for (const auto& [name, weight] : folder.weights()) {
    if (!known.contains(name)) import.ignored.push_back(name);
  }
  return import;
}

Status check_init_from(const JobSpec& spec) {
  PENSTOCK_TRY_ASSIGN(const HfFolder folder, HfFolder::open(spec.checkpoint.init_from));
  PENSTOCK_TRY_ASSIGN(const ModelConfig model, model_of(folder));
  PENSTOCK_TRY(check_same_function(model, spec.model));
  return check_weights(folder, weight_list(spec.model));
}

std::string hf_folder_tokenizer(const Path& folder) {
  std::error_code error;
  if (std::filesystem::exists(folder / "tokenizer.model", error)) {
    return (folder / "tokenizer.model").string();
  }
  const auto text = read_file(folder / "tokenizer_config.json", kTokenizerConfigBytesMax);
  if (!text.ok()) return "";
  const Json config = Json::parse(*text, nullptr, false);
  const auto bytes = make_tokenizer("bytes");
  const bool ours = config.is_object() && config.contains("eos_token") &&
                    config["eos_token"] == bytes.value()->end_of_document_text();
  return ours ? "bytes" : "";
}

std::string starting_spec(const ModelConfig& model, const Path& folder,
                          const std::string& tokenizer) {
  std::string keys;
  const auto values = nlohmann::ordered_json::parse(to_json(model));
  for (const auto& [key, value] : values.items()) {
    keys += fmt::format("  {}: {}\n", key, value.dump());
  }
  return fmt::format(
      R"(# Trains on from the weights in {0}. Adapt data, parallelism and optimizer; every key:
# docs/job-spec.md. Then: penstock submit THIS_FILE --follow
apiVersion: penstock/v1
kind: TrainingRun
metadata: {{name: {1}}}
model:
{2}data:
  # penstock data prepare --output corpus --tokenizer {3} FILE…
  train: [{{path: corpus_train}}]
  validation: [{{path: corpus_heldout}}]
  tokenizer: {4}
  seq_length: {5}
parallelism: {{pipeline: 1, expert: 1, schedule: 1f1b, microbatches: 4}}
optimizer: {{name: adamw, lr: 2.0e-5, weight_decay: 0.1, clip_grad_norm: 1.0}}
schedule: {{warmup_steps: 10, decay: cosine, min_lr_ratio: 0.1}}
training: {{steps: 100}}
checkpoint: {{interval: 50, init_from: {6}}}
)",
      folder.string(), name_from(folder), keys, tokenizer.empty() ? "…" : tokenizer,
      Json(tokenizer.empty() ? (folder / "tokenizer.model").string() : tokenizer).dump(),
      std::min<int64_t>(model.max_position_embeddings, 4096), Json(folder.string()).dump());
}

}  // namespace penstock
