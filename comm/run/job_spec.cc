// The schema of a job spec: every key, where it goes, its range. docs/job-spec.md documents the
// same list.
#include "comm/run/job_spec.h"

#include <fmt/format.h>

#include <algorithm>

#include "comm/run/guards_spec.h"
#include "comm/run/mapping_reader.h"
#include "comm/run/recipe_spec.h"
#include "comm/run/rope_spec.h"
#include "comm/run/spec_rules.h"
#include "comm/run/yaml_document.h"

namespace penstock {

namespace {

using Need = MappingReader::Need;

constexpr int64_t kWidthMax = 1 << 20;  // of any layer
constexpr int64_t kCountMax = 1 << 16;  // layers, heads, experts, ranks of one kind, micro-batches
constexpr int64_t kStepsMax = 1'000'000'000;
constexpr size_t kSourcesMax = 1024;
constexpr double kRealMax = 1e9;
constexpr int64_t kPositionsDefault = 4096;  // as the Hugging Face configuration class

bool name_is_valid(const std::string& name) {
  constexpr size_t kNameCharactersMax = 63;
  const auto inner = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '.' || c == '_';
  };
  return !name.empty() && name.size() <= kNameCharactersMax && name.front() >= 'a' &&
         name.front() <= 'z' && std::all_of(name.begin(), name.end(), inner);
}

void read_metadata(MappingReader reader, SpecProblems& problems, JobSpec& spec) {
  const YamlNode* node = reader.value("name", Need::kRequired);
  if (node != nullptr) {
    spec.name = node->text;
    if (node->kind != YamlNode::Kind::kScalar || !name_is_valid(node->text)) {
      problems.wrong(*node,
                     "metadata.name must be 1 to 63 of a-z, 0-9, '-', '.' and '_', starting with a "
                     "letter");
    }
  }
  reader.finish();
}

// Keys that a pasted config.json brings along and that change nothing here.
void ignore_config_keys(MappingReader& reader) {
  for (const char* key :
       {"architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
        "ep_size", "head_dim", "output_attentions", "output_hidden_states", "output_router_logits",
        "pretraining_tp", "qk_head_dim", "quantization_config", "return_dict", "torch_dtype",
        "transformers_version", "use_cache"}) {
    reader.ignore(key);
  }
}

// Keys of the configuration that would change training, with the only value that is built.
void read_fixed_model_keys(MappingReader& reader) {
  reader.only("model_type", {"deepseek_v3"}, "only deepseek_v3 is");
  reader.only("hidden_act", {"silu"}, "only silu is");
  reader.only("scoring_func", {"sigmoid"}, "only sigmoid is");
  reader.only("topk_method", {"noaux_tc"}, "only noaux_tc is");
  reader.only("moe_layer_freq", {"1"}, "every layer from first_k_dense_replace on has experts (1)");
  reader.only("tie_word_embeddings", {"false"}, "embedding and head are separate (false)");
  reader.only("attention_bias", {"false"}, "projections have no bias (false)");
  reader.only("attention_dropout", {"0", "0.0"}, "there is no dropout (0.0)");
  reader.only("rope_interleave", {"true"}, "set it to true: pairs are stored side by side");
}

void read_model(MappingReader reader, SpecProblems& problems, ModelConfig& model) {
  reader.integer("vocab_size", 2, 1 << 24, model.vocab_size, Need::kRequired);
  reader.integer("hidden_size", 1, kWidthMax, model.hidden_size, Need::kRequired);
  reader.integer("num_hidden_layers", 1, kCountMax, model.num_hidden_layers, Need::kRequired);
  reader.integer("num_attention_heads", 1, kCountMax, model.num_attention_heads, Need::kRequired);
  reader.integer_or_null("q_lora_rank", 1, kWidthMax, model.q_lora_rank);
  reader.integer("kv_lora_rank", 1, kWidthMax, model.kv_lora_rank, Need::kRequired);
  reader.integer("qk_nope_head_dim", 1, kWidthMax, model.qk_nope_head_dim, Need::kRequired);
  reader.integer("qk_rope_head_dim", 2, kWidthMax, model.qk_rope_head_dim, Need::kRequired);
  reader.integer("v_head_dim", 1, kWidthMax, model.v_head_dim, Need::kRequired);
  reader.integer("intermediate_size", 1, kWidthMax, model.intermediate_size, Need::kRequired);
  reader.integer("first_k_dense_replace", 0, kCountMax, model.first_k_dense_replace,
                 Need::kRequired);
  reader.integer("moe_intermediate_size", 1, kWidthMax, model.moe_intermediate_size,
                 Need::kRequired);
  reader.integer("n_routed_experts", 1, kCountMax, model.n_routed_experts, Need::kRequired);
  reader.integer("n_shared_experts", 0, kCountMax, model.n_shared_experts, Need::kRequired);
  reader.integer("num_experts_per_tok", 1, kCountMax, model.num_experts_per_tok, Need::kRequired);
  reader.integer("n_group", 1, kCountMax, model.n_group);
  reader.integer("topk_group", 1, kCountMax, model.topk_group);
  reader.real("routed_scaling_factor", 0.0, kRealMax, true, model.routed_scaling_factor);
  reader.boolean("norm_topk_prob", model.norm_topk_prob);
  reader.real("rms_norm_eps", 0.0, 1.0, true, model.rms_norm_eps);
  reader.integer("max_position_embeddings", 1, 1 << 24, model.max_position_embeddings);
  reader.real("initializer_range", 0.0, 10.0, true, model.initializer_range);
  reader.integer("num_nextn_predict_layers", 0, 1, model.num_nextn_predict_layers);
  reader.real("aux_loss_alpha", 0.0, 1.0, false, model.aux_loss_alpha);
  bool sequence_wise = true;
  reader.boolean("seq_aux", sequence_wise);
  problems.rule("model.seq_aux", sequence_wise || model.aux_loss_alpha == 0.0,
                "model.seq_aux must be true with model.aux_loss_alpha above 0: the balance loss is "
                "taken in each sequence");
  read_rope(reader, problems, model);
  // MLA has one key and one value per head; configurations still say so.
  int64_t key_value_heads = model.num_attention_heads;
  reader.integer("num_key_value_heads", 1, kCountMax, key_value_heads);
  problems.rule(
      "model.num_key_value_heads", key_value_heads == model.num_attention_heads,
      fmt::format("model.num_key_value_heads {} must equal model.num_attention_heads {}, or be "
                  "left out",
                  key_value_heads, model.num_attention_heads));
  read_fixed_model_keys(reader);
  ignore_config_keys(reader);
  reader.finish();
}

// A list of {path, weight}; a bare path stands for weight 1.
void read_sources(MappingReader& reader, const std::string& key, Need need, SpecProblems& problems,
                  std::vector<DataSource>& sources) {
  const YamlNode* list = reader.value(key, need);
  if (list == nullptr) return;
  const std::string path = reader.path() + "." + key;
  const bool is_list = list->kind == YamlNode::Kind::kSequence;
  const bool must_have = need == Need::kRequired;
  if (!is_list || (must_have && list->items.empty()) || list->items.size() > kSourcesMax) {
    problems.wrong(*list,
                   fmt::format("{} must be a list of {} to {} sources {{path: …, weight: …}}", path,
                               must_have ? 1 : 0, kSourcesMax));
    return;
  }
  for (size_t i = 0; i < list->items.size(); ++i) {
    const YamlNode& item = list->items[i];
    DataSource source;
    if (item.kind == YamlNode::Kind::kScalar && !item.text.empty()) {
      source.path = item.text;
    } else {
      MappingReader entry(problems, &item, item, fmt::format("{}[{}]", path, i), Need::kRequired);
      entry.text("path", source.path, Need::kRequired);
      entry.real("weight", 0.0, kRealMax, true, source.weight);
      entry.finish();
    }
    sources.push_back(std::move(source));
  }
}

void read_data(MappingReader reader, SpecProblems& problems, DataSpec& data) {
  read_sources(reader, "train", Need::kRequired, problems, data.train);
  read_sources(reader, "validation", Need::kOptional, problems, data.validation);
  data.tokenizer = "bytes";
  reader.text("tokenizer", data.tokenizer);
  reader.integer("seq_length", 1, 1 << 24, data.seq_length, Need::kRequired);
  reader.finish();
}

void read_parallelism(MappingReader reader, SpecProblems& problems, ParallelismSpec& parallelism) {
  reader.integer("pipeline", 1, kCountMax, parallelism.pipeline);
  reader.integer("expert", 1, kCountMax, parallelism.expert);
  reader.integer("data", 1, kCountMax, parallelism.data);
  reader.one_of("schedule", kSchedules, parallelism.schedule);
  reader.integer("microbatches", 1, kCountMax, parallelism.microbatches, Need::kRequired);
  read_levels(reader, "microbatch_ramp", problems, kCountMax, parallelism.microbatch_levels);
  reader.integer("micro_batch_size", 1, kCountMax, parallelism.micro_batch_size);
  MappingReader rebalance = reader.section("rebalance");
  rebalance.real("threshold", 0.0, kRealMax, false, parallelism.rebalance.threshold);
  rebalance.integer("every_checkpoints", 1, kStepsMax, parallelism.rebalance.every_checkpoints);
  rebalance.finish();
  ElasticSpec& elastic = parallelism.elastic;
  MappingReader widths = reader.section("elastic");
  widths.integer("min_data", 0, kCountMax, elastic.min_data);
  widths.integer("max_data", 0, kCountMax, elastic.max_data);
  widths.finish();
  if (elastic != ElasticSpec()) {  // the other end is where it begins
    if (elastic.min_data == 0) elastic.min_data = parallelism.data;
    if (elastic.max_data == 0) elastic.max_data = parallelism.data;
  }
  reader.finish();
}

// A number of steps, or "auto".
void read_interval(MappingReader& reader, CheckpointSpec& checkpoint) {
  checkpoint.automatic =
      reader.integer_or_word("interval", 0, kStepsMax, "auto", checkpoint.interval);
}

void read_rest(MappingReader& document, JobSpec& spec) {
  MappingReader training = document.section("training", Need::kRequired);
  training.integer("steps", 1, kStepsMax, spec.training.steps, Need::kRequired);
  training.unsigned_integer("seed", spec.training.seed);
  training.one_of("precision", kPrecisions, spec.training.precision);
  training.integer("evaluation_interval", 0, kStepsMax, spec.training.evaluation_interval);
  training.integer("evaluation_batches", 1, 1'000'000, spec.training.evaluation_batches);
  const std::vector<bool> recompute = training.word_list("recompute", {"norms", "mla_up"});
  spec.training.recompute = {.norms = recompute[0], .mla_up = recompute[1]};
  training.finish();
  MappingReader checkpoint = document.section("checkpoint");
  checkpoint.text("dir", spec.checkpoint.dir);
  read_interval(checkpoint, spec.checkpoint);
  checkpoint.real("max_overhead", 0.0, 1.0, true, spec.checkpoint.max_overhead);
  checkpoint.real("device_mtbf_hours", 0.0, kRealMax, true, spec.checkpoint.device_mtbf_hours);
  checkpoint.integer("keep_last", 1, 1'000'000, spec.checkpoint.keep_last);
  checkpoint.integer("keep_every", 0, kStepsMax, spec.checkpoint.keep_every);
  checkpoint.text("init_from", spec.checkpoint.init_from);
  checkpoint.finish();
  MappingReader recovery = document.section("recovery");
  recovery.integer("max_restarts", 0, 1'000'000, spec.recovery.max_restarts);
  recovery.integer("hang_timeout", 0, 86'400, spec.recovery.hang_timeout);
  recovery.boolean("from_memory", spec.recovery.from_memory);
  recovery.boolean("replace_slow", spec.recovery.replace_slow);
  spec.recovery.mirror_automatic =
      recovery.integer_or_word("mirror", 0, kStepsMax, "auto", spec.recovery.mirror);
  recovery.integer("mirror_rate", 1, 1 << 20, spec.recovery.mirror_rate);
  recovery.finish();
}

}  // namespace

std::string_view to_string(Schedule schedule) {
  switch (schedule) {
    case Schedule::kDualPipe:
      return "dualpipe";
    case Schedule::kDualPipeV:
      return "dualpipev";
    case Schedule::kOneForwardOneBackward:
      return "1f1b";
    case Schedule::kZeroBubble:
      return "zb1p";
  }
  return "unknown";
}

std::string_view to_string(Precision precision) {
  switch (precision) {
    case Precision::kFp32:
      return "fp32";
    case Precision::kFp8:
      return "fp8";
    case Precision::kFp8Hopper:
      return "fp8_hopper";
  }
  return "unknown";
}

Result<JobSpec> parse_job_spec(std::string_view yaml, std::string_view origin) {
  PENSTOCK_TRY_ASSIGN(const YamlNode root, parse_yaml(yaml, origin));
  SpecProblems problems(origin);
  JobSpec spec;
  spec.model.max_position_embeddings = kPositionsDefault;
  MappingReader document(problems, &root, root, "", Need::kRequired);
  document.only("apiVersion", {"penstock/v1"}, "only penstock/v1 is", Need::kRequired);
  document.only("kind", {"TrainingRun"}, "only TrainingRun is", Need::kRequired);
  read_metadata(document.section("metadata", Need::kRequired), problems, spec);
  read_model(document.section("model", Need::kRequired), problems, spec.model);
  read_data(document.section("data", Need::kRequired), problems, spec.data);
  read_parallelism(document.section("parallelism", Need::kRequired), problems, spec.parallelism);
  read_optimizer(document.section("optimizer", Need::kRequired), problems, spec.optimizer);
  read_schedule(document.section("schedule"), problems, spec.optimizer);
  read_rest(document, spec);
  read_guards(document.section("guards"), spec.guards);
  document.finish();
  if (problems.none()) check_spec_rules(spec, problems);
  PENSTOCK_TRY(problems.first());
  return spec;
}

Result<ModelConfig> parse_model_config(std::string_view json, std::string_view origin) {
  PENSTOCK_TRY_ASSIGN(const YamlNode root, parse_yaml(json, origin));
  SpecProblems problems(origin);
  JobSpec spec;
  spec.model.max_position_embeddings = kPositionsDefault;
  read_model(MappingReader(problems, &root, root, "model", Need::kRequired), problems, spec.model);
  if (problems.none()) check_model_rules(spec, problems);
  PENSTOCK_TRY(problems.first());
  return spec.model;
}

}  // namespace penstock
