// Silent corruption: what ranks can notice of a processor, memory or network that changes bits and
// says nothing. A step can be computed twice and every result compared, and replicas compare their
// weights (spec.guards). Both before the gradients are summed, so that a step with a finding never
// changes the model.
#include "comm/base/check.h"
#include "worker/engine/audited_transport.h"
#include "worker/engine/engine.h"

namespace penstock {
namespace {

// By ParameterKind.
constexpr std::array kCompareChannels = {Channel::kCompareDense, Channel::kCompareExperts,
                                         Channel::kCompareShared};
constexpr size_t kDigestWords = 4;

bool is_due(int64_t every, int64_t step) {
  return every > 0 && step % every == 0;
}

// What is sent while a step is computed.
std::string_view name_of(Tag tag) {
  switch (static_cast<Channel>(tag.value >> kExchangeTagBits)) {
    case Channel::kActivations:
      return "activations";
    case Channel::kGradients:
      return "gradients of activations";
    default:
      return "tokens of experts";
  }
}

// As whole numbers of 32 bits, whose sum with zeros is exact.
void put(const Digest& digest, std::span<double, kDigestWords> words) {
  for (size_t i = 0; i < 2; ++i) {
    words[i] = static_cast<double>(digest.low >> (32 * i) & UINT32_MAX);
    words[i + 2] = static_cast<double>(digest.high >> (32 * i) & UINT32_MAX);
  }
}

}  // namespace

Status Engine::miscomputed(std::string_view what) {
  miscomputed_ = true;
  return internal_error(fmt::format("step {}: {}", step_, what));
}

bool Engine::duplicates(int64_t step) const {
  return training_ && is_due(spec_.guards.duplicate_every, step);
}

// All that a pass leaves on this rank.
std::vector<Digest> Engine::results_of_pass() {
  std::vector<Digest> results = {digest_of(std::as_bytes(std::span(&totals_, 1)))};
  for (const std::unique_ptr<Stage>& stage : stages_) {
    for (const ParameterKind kind : kParameterKinds) {
      results.push_back(digest_of(std::as_bytes(stage->parameters().gradients(kind))));
    }
    results.push_back(digest_of(std::as_bytes(stage->expert_loads())));
  }
  return results;
}

// A rank that finds itself at fault ends the attempt at once; one that received something else
// leaves it to him who sent it, or, when nobody did, to reduce_totals().
Status Engine::compute_twice(std::span<const Instruction> instructions) {
  if (audit_) audit_->begin_pass(0);
  PENSTOCK_TRY(run_pass(instructions));
  const std::vector<Digest> results = results_of_pass();
  clear_sums();
  if (audit_) audit_->begin_pass(1);
  PENSTOCK_TRY(run_pass(instructions));
  const std::optional<TransferDifference> difference = audit_ ? audit_->end_passes() : std::nullopt;
  if (!difference && results == results_of_pass()) return {};
  if (!difference) {
    return miscomputed(
        "computed twice from the same bytes, this rank's gradients differ: its "
        "processor or memory changes bits");
  }
  if (difference->sent) {
    return miscomputed(fmt::format(
        "computed twice from the same bytes, the {} that this rank sent to rank {} differ: its "
        "processor or memory changes bits",
        name_of(difference->tag), difference->peer));
  }
  received_otherwise_ = fmt::format(
      "computed twice, the {} that arrived from rank {} differ, though no rank sent anything else: "
      "the way between them changes bits",
      name_of(difference->tag), difference->peer);
  return {};
}

// Of the weights that this step was computed with.
Status Engine::compare_replicas() {
  if (!training_ || !is_due(spec_.guards.compare_replicas_every, step_)) return {};
  if (!state_->matches_model()) {
    return miscomputed(
        "this rank's weights are no longer those of its last step: its memory "
        "changes bits");
  }
  for (const size_t d : layout_.by_stage) {
    const LocalStage& local = layout_.stages[d];
    for (const ParameterKind kind : kParameterKinds) {
      const std::span<const float> values = stages_[d]->parameters().values(kind);
      const std::vector<Rank>& replicas = local.replicas_of(kind);
      if (replicas.size() < 2 || values.empty()) continue;
      PENSTOCK_TRY(compare_copies(local.stage, kind, replicas, values));
    }
  }
  return {};
}

// Each rank says what it owns, and finds the same in its copy of what the others own.
Status Engine::compare_copies(int64_t stage, ParameterKind kind, std::span<const Rank> replicas,
                              std::span<const float> values) {
  const auto shard_digest = [&](size_t owner) {
    const ShardRange range =
        shard_range(std::ssize(values), std::ssize(replicas), static_cast<int64_t>(owner));
    return digest_of(std::as_bytes(values.subspan(static_cast<size_t>(range.begin),
                                                  static_cast<size_t>(range.end - range.begin))));
  };
  const auto words_of = [](std::vector<double>& words, size_t owner) {
    return std::span<double, kDigestWords>(words.data() + owner * kDigestWords, kDigestWords);
  };
  std::vector<double> owned(replicas.size() * kDigestWords);
  std::vector<double> copies(owned.size());
  for (size_t i = 0; i < replicas.size(); ++i) {
    put(shard_digest(i), words_of(copies, i));
    if (replicas[i] == layout_.rank) put(shard_digest(i), words_of(owned, i));
  }
  const Channel channel = kCompareChannels[static_cast<size_t>(kind)];
  // What the ends of the pipeline share is of no one stage.
  const Tag tag = tag_of(channel, kind == ParameterKind::kShared ? 0 : stage);
  PENSTOCK_TRY(all_reduce(Collective::kCompareReplicas, stage, replicas, tag, owned));
  for (size_t i = 0; i < replicas.size(); ++i) {
    if (std::ranges::equal(words_of(owned, i), words_of(copies, i))) continue;
    return miscomputed(fmt::format(
        "this rank's copy of weights of stage {} differs from that of rank {}, which owns them and "
        "has them as its last step left them: this rank's memory, or the way between them, changes "
        "bits",
        stage, replicas[i]));
  }
  return {};
}

}  // namespace penstock
