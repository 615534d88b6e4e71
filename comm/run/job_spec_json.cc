// The canonical form of a job spec: JSON with every key written out, in the order of the schema.
#include <nlohmann/json.hpp>

#include "comm/run/job_spec.h"

namespace penstock {

namespace {

using Json = nlohmann::ordered_json;

Json rope_scaling_json(const YarnScaling& y) {
  return {{"rope_type", "yarn"},
          {"factor", y.factor},
          {"original_max_position_embeddings", y.original_max_position_embeddings},
          {"beta_fast", y.beta_fast},
          {"beta_slow", y.beta_slow},
          {"mscale", y.mscale},
          {"mscale_all_dim", y.mscale_all_dim}};
}

Json model_json(const ModelConfig& m) {
  Json json = {{"vocab_size", m.vocab_size},
               {"hidden_size", m.hidden_size},
               {"num_hidden_layers", m.num_hidden_layers},
               {"num_attention_heads", m.num_attention_heads},
               {"q_lora_rank", nullptr},
               {"kv_lora_rank", m.kv_lora_rank},
               {"qk_nope_head_dim", m.qk_nope_head_dim},
               {"qk_rope_head_dim", m.qk_rope_head_dim},
               {"v_head_dim", m.v_head_dim},
               {"intermediate_size", m.intermediate_size},
               {"first_k_dense_replace", m.first_k_dense_replace},
               {"moe_intermediate_size", m.moe_intermediate_size},
               {"n_routed_experts", m.n_routed_experts},
               {"n_shared_experts", m.n_shared_experts},
               {"num_experts_per_tok", m.num_experts_per_tok},
               {"n_group", m.n_group},
               {"topk_group", m.topk_group},
               {"routed_scaling_factor", m.routed_scaling_factor},
               {"norm_topk_prob", m.norm_topk_prob},
               {"rms_norm_eps", m.rms_norm_eps},
               {"rope_theta", m.rope_theta},
               {"rope_scaling", nullptr},
               {"max_position_embeddings", m.max_position_embeddings},
               {"initializer_range", m.initializer_range},
               {"num_nextn_predict_layers", m.num_nextn_predict_layers},
               {"aux_loss_alpha", m.aux_loss_alpha}};
  if (m.q_lora_rank) json["q_lora_rank"] = *m.q_lora_rank;
  if (m.rope_scaling) json["rope_scaling"] = rope_scaling_json(*m.rope_scaling);
  return json;
}

Json sources_json(const std::vector<DataSource>& sources) {
  Json list = Json::array();
  for (const DataSource& source : sources) {
    list.push_back({{"path", source.path}, {"weight", source.weight}});
  }
  return list;
}

template <typename T>
Json levels_json(const std::vector<StepLevel<T>>& levels) {
  Json list = Json::array();
  for (const StepLevel<T>& level : levels) {
    list.push_back({{"from_step", level.from_step}, {"value", level.value}});
  }
  return list;
}

Json parallelism_json(const ParallelismSpec& p) {
  return {{"pipeline", p.pipeline},
          {"expert", p.expert},
          {"data", p.data},
          {"schedule", to_string(p.schedule)},
          {"microbatches", p.microbatches},
          {"microbatch_ramp", levels_json(p.microbatch_levels)},
          {"micro_batch_size", p.micro_batch_size},
          {"rebalance",
           {{"threshold", p.rebalance.threshold},
            {"every_checkpoints", p.rebalance.every_checkpoints}}},
          {"elastic", {{"min_data", p.elastic.min_data}, {"max_data", p.elastic.max_data}}}};
}

Json no_decay_json(const NoDecay& n) {
  Json list = Json::array();
  if (n.embedding) list.push_back("embedding");
  if (n.head) list.push_back("head");
  if (n.router) list.push_back("router");
  return list;
}

Json recompute_json(const Recompute& r) {
  Json list = Json::array();
  if (r.norms) list.push_back("norms");
  if (r.mla_up) list.push_back("mla_up");
  return list;
}

Json optimizer_json(const OptimizerSpec& o) {
  return {{"name", "adamw"},
          {"lr", o.lr},
          {"betas", Json::array({o.beta1, o.beta2})},
          {"eps", o.eps},
          {"weight_decay", o.weight_decay},
          {"no_decay", no_decay_json(o.no_decay)},
          {"clip_grad_norm", o.clip_grad_norm},
          {"bias_update_speed", o.bias_update_speed},
          {"mtp_loss_weight", o.mtp_loss_weight},
          {"moments", o.moments == MomentType::kBf16 ? "bf16" : "fp32"},
          {"ema_decay", o.ema_decay},
          {"ema_evaluation", o.ema_evaluation}};
}

Json schedule_json(const OptimizerSpec& o) {
  return {{"warmup_steps", o.warmup_steps},
          {"hold_steps", o.hold_steps},
          {"decay", "cosine"},
          {"decay_steps", o.decay_steps},
          {"min_lr_ratio", o.min_lr_ratio},
          {"lr_ratio", levels_json(o.lr_levels)},
          {"bias_update_speed", levels_json(o.bias_update_levels)},
          {"mtp_loss_weight", levels_json(o.mtp_loss_levels)}};
}

Json checkpoint_json(const CheckpointSpec& c) {
  Json json = Json::object();
  if (!c.dir.empty()) json["dir"] = c.dir;  // absent means: the coordinator chooses
  json["interval"] = c.automatic ? Json("auto") : Json(c.interval);
  json["max_overhead"] = c.max_overhead;
  json["device_mtbf_hours"] = c.device_mtbf_hours;
  json["keep_last"] = c.keep_last;
  json["keep_every"] = c.keep_every;
  if (!c.init_from.empty()) json["init_from"] = c.init_from;
  return json;
}

Json spike_json(const SpikeSpec& spike) {
  return {{"policy", to_string(spike.policy)}, {"sigmas", spike.sigmas}, {"window", spike.window}};
}

Json guards_json(const GuardsSpec& guards) {
  return {{"not_finite", to_string(guards.not_finite)},
          {"loss_spike", spike_json(guards.loss_spike)},
          {"grad_norm_spike", spike_json(guards.grad_norm_spike)},
          {"rollback_steps", guards.rollback_steps},
          {"max_skips", guards.max_skips},
          {"max_rollbacks", guards.max_rollbacks},
          {"compare_replicas_every", guards.compare_replicas_every},
          {"duplicate_every", guards.duplicate_every}};
}

Json mirror_json(const RecoverySpec& recovery) {
  return recovery.mirror_automatic ? Json("auto") : Json(recovery.mirror);
}

}  // namespace

std::string to_json(const ModelConfig& model) {
  return model_json(model).dump(2);
}

std::string to_json(const JobSpec& spec) {
  const Json json = {{"apiVersion", "penstock/v1"},
                     {"kind", "TrainingRun"},
                     {"metadata", {{"name", spec.name}}},
                     {"model", model_json(spec.model)},
                     {"data",
                      {{"train", sources_json(spec.data.train)},
                       {"validation", sources_json(spec.data.validation)},
                       {"tokenizer", spec.data.tokenizer},
                       {"seq_length", spec.data.seq_length}}},
                     {"parallelism", parallelism_json(spec.parallelism)},
                     {"optimizer", optimizer_json(spec.optimizer)},
                     {"schedule", schedule_json(spec.optimizer)},
                     {"training",
                      {{"steps", spec.training.steps},
                       {"seed", spec.training.seed},
                       {"precision", to_string(spec.training.precision)},
                       {"recompute", recompute_json(spec.training.recompute)},
                       {"evaluation_interval", spec.training.evaluation_interval},
                       {"evaluation_batches", spec.training.evaluation_batches}}},
                     {"checkpoint", checkpoint_json(spec.checkpoint)},
                     {"recovery",
                      {{"max_restarts", spec.recovery.max_restarts},
                       {"hang_timeout", spec.recovery.hang_timeout},
                       {"from_memory", spec.recovery.from_memory},
                       {"mirror", mirror_json(spec.recovery)},
                       {"mirror_rate", spec.recovery.mirror_rate},
                       {"replace_slow", spec.recovery.replace_slow}}},
                     {"guards", guards_json(spec.guards)}};
  // Indented, because people read it too. A spec that was not parsed here may hold bytes that are
  // not UTF-8.
  return json.dump(2, ' ', false, Json::error_handler_t::replace);
}

Digest spec_digest(const JobSpec& spec) {
  return digest_of(as_bytes(to_json(spec)));
}

}  // namespace penstock
