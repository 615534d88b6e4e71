#include "comm/run/spec_rules.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "comm/run/guards_spec.h"
#include "comm/run/layout.h"
#include "comm/run/recipe_spec.h"

namespace penstock {

namespace {

constexpr int64_t kRanksMaxInJob = 1 << 20;
constexpr int64_t kTokensPerStepMax = int64_t{1} << 40;
constexpr int64_t kByteVocabulary = 257;  // 256 byte values and end-of-document

}  // namespace

void check_model_rules(const JobSpec& spec, SpecProblems& problems) {
  const ModelConfig& m = spec.model;
  problems.rule(
      "model.qk_rope_head_dim", m.qk_rope_head_dim % 2 == 0,
      fmt::format("model.qk_rope_head_dim must be even, not {}: rotary embedding turns pairs",
                  m.qk_rope_head_dim));
  problems.rule("model.first_k_dense_replace", m.first_k_dense_replace <= m.num_hidden_layers,
                fmt::format("model.first_k_dense_replace is {}, more than the {} layers of "
                            "model.num_hidden_layers",
                            m.first_k_dense_replace, m.num_hidden_layers));
  problems.rule(
      "model.n_group", m.n_routed_experts % m.n_group == 0,
      fmt::format("model.n_group {} does not divide the {} experts of model.n_routed_experts",
                  m.n_group, m.n_routed_experts));
  // A group's score is the sum of its two best experts.
  problems.rule(
      "model.n_group", m.n_group == 1 || m.n_routed_experts / m.n_group >= 2,
      fmt::format("model.n_group {} leaves {} expert per group; a group needs two or more",
                  m.n_group, m.n_routed_experts / m.n_group));
  problems.rule("model.topk_group", m.topk_group <= m.n_group,
                fmt::format("model.topk_group {} is more than the {} groups of model.n_group",
                            m.topk_group, m.n_group));
  const int64_t eligible = m.topk_group * (m.n_routed_experts / m.n_group);
  problems.rule(
      "model.num_experts_per_tok", m.num_experts_per_tok <= eligible,
      fmt::format("model.num_experts_per_tok {} is more than the {} experts that {} of {} "
                  "groups hold",
                  m.num_experts_per_tok, eligible, m.topk_group, m.n_group));
  problems.rule("model.vocab_size",
                spec.data.tokenizer != "bytes" || m.vocab_size >= kByteVocabulary,
                fmt::format("model.vocab_size {} is below {}, what the tokenizer \"bytes\" needs",
                            m.vocab_size, kByteVocabulary));
  problems.rule("data.seq_length", spec.data.seq_length <= m.max_position_embeddings,
                fmt::format("data.seq_length {} is more than model.max_position_embeddings {}",
                            spec.data.seq_length, m.max_position_embeddings));
}

namespace {

void check_microbatches(const ParallelismSpec& p, const std::string& path, int64_t count,
                        SpecProblems& problems) {
  const bool both_ways = p.schedule == Schedule::kDualPipe && p.pipeline > 1;
  problems.rule(
      path, !both_ways || count % 2 == 0,
      fmt::format("{} must be even with schedule dualpipe, not {}: half enter at each end", path,
                  count));
  const int64_t per_rank = direction_count(p);
  problems.rule(path, count >= per_rank * p.pipeline,
                fmt::format("{} must be at least {}parallelism.pipeline = {} with schedule {}, not "
                            "{}",
                            path, per_rank == 2 ? "2 x " : "", per_rank * p.pipeline,
                            to_string(p.schedule), count));
  problems.rule(
      path, p.pipeline * count <= kPlannedMicrobatchesMax,
      fmt::format("parallelism.pipeline x {} is {}, more than {}; use larger micro-batches", path,
                  p.pipeline * count, kPlannedMicrobatchesMax));
}

void check_pipeline(const JobSpec& spec, SpecProblems& problems) {
  const ParallelismSpec& p = spec.parallelism;
  const bool both_ways = p.schedule == Schedule::kDualPipe && p.pipeline > 1;
  const int64_t stages = stage_count(p);
  problems.rule(
      "parallelism.pipeline", stages <= spec.model.num_hidden_layers,
      fmt::format("parallelism.pipeline {} with schedule {} has {} stages, more than the "
                  "{} layers of model.num_hidden_layers; every stage needs a layer",
                  p.pipeline, to_string(p.schedule), stages, spec.model.num_hidden_layers));
  problems.rule(
      "parallelism.pipeline", !both_ways || p.pipeline % 2 == 0,
      fmt::format("parallelism.pipeline must be even with schedule dualpipe, not {}: rank p "
                  "holds stages p and P-1-p",
                  p.pipeline));
  check_microbatches(p, "parallelism.microbatches", p.microbatches, problems);
  std::set<int64_t> sizes = {p.microbatches};  // each has a program
  for (size_t i = 0; i < p.microbatch_levels.size(); ++i) {
    check_microbatches(p, fmt::format("parallelism.microbatch_ramp[{}].value", i),
                       p.microbatch_levels[i].value, problems);
    sizes.insert(p.microbatch_levels[i].value);
  }
  const int64_t planned = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  problems.rule(
      "parallelism.microbatch_ramp",
      p.microbatch_levels.empty() || p.pipeline * planned <= kPlannedMicrobatchesMax,
      fmt::format("parallelism.pipeline x all sizes of parallelism.microbatch_ramp is {}, "
                  "more than {}; use fewer levels",
                  p.pipeline * planned, kPlannedMicrobatchesMax));
}

void check_size(const JobSpec& spec, SpecProblems& problems) {
  const ParallelismSpec& p = spec.parallelism;
  problems.rule("parallelism.expert", spec.model.n_routed_experts % p.expert == 0,
                fmt::format("parallelism.expert {} does not divide the {} experts of "
                            "model.n_routed_experts",
                            p.expert, spec.model.n_routed_experts));
  // Each factor is at most 2^20 or 2^24, so the products below are taken in an order that cannot
  // overflow.
  const bool ranks_fit =
      p.pipeline * p.expert <= kRanksMaxInJob && p.pipeline * p.expert * p.data <= kRanksMaxInJob;
  problems.rule(
      "parallelism", ranks_fit,
      fmt::format("parallelism: pipeline x expert x data is more than {} ranks", kRanksMaxInJob));
  int64_t most = p.microbatches;  // of any step
  for (const StepLevel<int64_t>& level : p.microbatch_levels) most = std::max(most, level.value);
  const bool tokens_fit = ranks_fit && most * p.micro_batch_size <= kTokensPerStepMax &&
                          static_cast<double>(most * p.micro_batch_size) *
                                  static_cast<double>(p.expert) * static_cast<double>(p.data) *
                                  static_cast<double>(spec.data.seq_length) <=
                              static_cast<double>(kTokensPerStepMax);
  problems.rule(
      "parallelism.microbatches", !ranks_fit || tokens_fit,
      fmt::format("more than {} tokens in a step: microbatches x micro_batch_size x expert x "
                  "data x data.seq_length",
                  kTokensPerStepMax));
}

void check_rebalance(const JobSpec& spec, SpecProblems& problems) {
  const double threshold = spec.parallelism.rebalance.threshold;
  problems.rule(
      "parallelism.rebalance.threshold", threshold == 0.0 || threshold >= 1.0,
      fmt::format("parallelism.rebalance.threshold must be 0 (off) or at least 1, not {}: "
                  "it is the load of the most loaded rank relative to the mean",
                  threshold));
  problems.rule(
      "parallelism.rebalance.threshold", threshold == 0.0 || spec.checkpoint.saves_on_the_way(),
      "parallelism.rebalance.threshold needs checkpoint.interval above 0 or auto: experts "
      "move when a checkpoint is committed");
}

void check_elastic(const JobSpec& spec, SpecProblems& problems) {
  const ElasticSpec& elastic = spec.parallelism.elastic;
  const int64_t data = spec.parallelism.data;
  const bool off = elastic == ElasticSpec();
  problems.rule(
      "parallelism.elastic", off || (elastic.min_data <= data && data <= elastic.max_data),
      fmt::format("parallelism.elastic is from {} to {}, which parallelism.data {} is not in",
                  elastic.min_data, elastic.max_data, data));
  problems.rule("parallelism.elastic.max_data",
                off || elastic.max_data <= data || spec.checkpoint.saves_on_the_way(),
                "parallelism.elastic.max_data above parallelism.data needs checkpoint.interval "
                "above 0 or auto: a job grows when a checkpoint is committed");
}

}  // namespace

void check_spec_rules(const JobSpec& spec, SpecProblems& problems) {
  check_model_rules(spec, problems);
  check_pipeline(spec, problems);
  check_size(spec, problems);
  check_rebalance(spec, problems);
  check_elastic(spec, problems);
  check_recipe(spec, problems);
  check_guards(spec, problems);
  problems.rule(
      "training.evaluation_interval",
      spec.training.evaluation_interval == 0 || !spec.data.validation.empty(),
      "training.evaluation_interval needs data.validation; add a held-out data set or remove "
      "the key");
  problems.rule("recovery.mirror", spec.recovery.from_memory || !spec.recovery.mirrors(),
                "recovery.mirror copies the state that workers hold in memory, which "
                "recovery.from_memory: false does without; leave one of them out");
}

}  // namespace penstock
