// The end of an engine's step: sums over ranks, the optimizer, and everyone with the new weights.
#include <algorithm>
#include <cmath>

#include "comm/base/check.h"
#include "comm/base/clock.h"
#include "worker/engine/engine.h"
#include "worker/optim/lr_schedule.h"

namespace penstock {
namespace {

// By ParameterKind.
constexpr std::array kReduceChannels = {Channel::kReduceDense, Channel::kReduceExperts,
                                        Channel::kReduceShared};
constexpr std::array kGatherChannels = {Channel::kGatherDense, Channel::kGatherExperts,
                                        Channel::kGatherShared};
constexpr std::array kReduceCollectives = {Collective::kReduceDense, Collective::kReduceExperts,
                                           Collective::kReduceShared};
constexpr std::array kGatherCollectives = {Collective::kGatherDense, Collective::kGatherExperts,
                                           Collective::kGatherShared};
// What the ends of the pipeline share is of no one stage.
Tag tag_of(const std::array<Channel, kParameterKindCount>& channels, ParameterKind kind,
           int64_t stage) {
  return tag_of(channels[static_cast<size_t>(kind)], kind == ParameterKind::kShared ? 0 : stage);
}

// Of the moving average of expert loads: what an older step counts relative to the next one. Fifty
// steps' worth, long enough that the batches even out.
constexpr double kLoadDecay = 0.98;

double seconds(int64_t nanoseconds) {
  return to_seconds(Duration(nanoseconds));
}

}  // namespace

// Runs `call`, which returns Status, and writes it down unless it had nobody to talk to.
template <typename Call>
Status Engine::collective(Collective what, int64_t stage, const Call& call) {
  const int64_t begin = monotonic_ns();
  flight().begin({.begin_ns = begin,
                  .layer = static_cast<int16_t>(stage),
                  .kind = TraceKind::kCollective,
                  .what = static_cast<uint8_t>(what)});
  PENSTOCK_TRY(call());
  if (!reduce_transport_) return {};
  const TransportActivity activity = reduce_transport_->take_activity();
  if (activity.post_count == 0) return {};
  recorder_.add({.begin_ns = begin,
                 .end_ns = monotonic_ns(),
                 .wait_begin_ns = activity.wait_begin_ns,
                 .wait_end_ns = activity.wait_end_ns,
                 .bytes = activity.sent_bytes,
                 .layer = static_cast<int16_t>(stage),
                 .kind = TraceKind::kCollective,
                 .what = static_cast<uint8_t>(what)});
  return {};
}

Status Engine::all_reduce(Collective what, int64_t stage, std::span<const Rank> ranks, Tag tag,
                          std::span<double> values) {
  return collective(what, stage, [&] { return reducer_->all_reduce_sum(ranks, tag, values); });
}

Status Engine::reduce_gradients() {
  const int64_t begin = monotonic_ns();
  std::fill(sums_.begin(), sums_.end(), 0.0);
  // Before any rank can get past the sums of this step, and so write over the state before the
  // last, every rank's state of the last step is whole.
  settle();
  PENSTOCK_TRY(compare_replicas());
  if (training_) {
    for (const size_t d : layout_.by_stage) {
      PENSTOCK_TRY(reduce_stage(layout_.stages[d], *stages_[d]));
    }
    sums_[kSquareSum] = optimizer_->gradient_square_sum();
  }
  PENSTOCK_TRY(reduce_totals());
  const int64_t end = monotonic_ns();
  record_span(Op::kReduceGradients, begin, end);
  times_.reduce_seconds += seconds(end - begin);
  return {};
}

// Gradients: each replica ends with the sum of its own shard. Loads: everyone with all of them.
Status Engine::reduce_stage(const LocalStage& local, Stage& stage) {
  ParameterSet& parameters = stage.parameters();
  const auto unmagnify = static_cast<float>(1.0 / plan_->magnification);
  for (const ParameterKind kind : kParameterKinds) {
    const std::span<float> gradients = parameters.gradients(kind);
    if (gradients.empty()) continue;
    if (unmagnify != 1.0F) kernels_.scale(std::ssize(gradients), unmagnify, gradients.data());
    PENSTOCK_TRY(collective(kReduceCollectives[static_cast<size_t>(kind)], local.stage, [&] {
      return reducer_->reduce_scatter_sum(local.replicas_of(kind),
                                          tag_of(kReduceChannels, kind, local.stage), gradients);
    }));
  }
  const std::span<int64_t> counted = stage.expert_loads();
  if (counted.empty()) return {};
  std::vector<double>& load_sums = load_sums_[local.direction];
  std::vector<int64_t>& loads = loads_[local.direction];
  std::copy(counted.begin(), counted.end(), load_sums.begin());
  PENSTOCK_TRY(all_reduce(Collective::kReduceLoads, local.stage, local.dense_replicas,
                          tag_of(Channel::kReduceLoads, local.stage), load_sums));
  std::transform(load_sums.begin(), load_sums.end(), loads.begin(),
                 [](double load) { return static_cast<int64_t>(load); });  // exact below 2^53
  if (local.dense_replicas.front() == layout_.rank) {
    sums_[kStageImbalance + static_cast<size_t>(local.stage)] =
        Stage::load_imbalance(loads, spec_.model.n_routed_experts);
  }
  return {};
}

Status Engine::reduce_totals() {
  sums_[kLossSum] = totals_.loss;
  sums_[kTokenSum] = totals_.tokens;
  sums_[kPredictionSum] = totals_.prediction_loss;
  sums_[kBalanceSum] = totals_.balance_loss;
  sums_[kSaveSum] = training_ && wishes_.save ? 1.0 : 0.0;
  sums_[kPauseSum] = training_ && wishes_.pause ? 1.0 : 0.0;
  sums_[kDifferenceSum] = received_otherwise_.empty() ? 0.0 : 1.0;
  PENSTOCK_TRY(all_reduce(Collective::kReduceTotals, -1, layout_.world,
                          tag_of(Channel::kReduceTotals), sums_));
  diverged_ = false;
  if (!training_) return {};
  if (!received_otherwise_.empty()) return miscomputed(received_otherwise_);
  if (sums_[kDifferenceSum] > 0.0) return unavailable("another rank did not get what was sent");
  return judge(sums_[kLossSum] / sums_[kTokenSum], std::sqrt(sums_[kSquareSum]));
}

Status Engine::optimizer_step() {
  const int64_t begin = monotonic_ns();
  flight().begin({.begin_ns = begin,
                  .kind = TraceKind::kInstruction,
                  .what = static_cast<uint8_t>(Op::kOptimizerStep)});
  const double rate = learning_rate_at(spec_.optimizer, spec_.training.steps, step_);
  state_->begin_step();
  const std::byte* const previous = state_->current();
  optimizer_->step(step_, rate, optimizer_->clip_factor(std::sqrt(sums_[kSquareSum])), previous,
                   state_->next());
  const int64_t updated = monotonic_ns();
  record_span(Op::kOptimizerStep, begin, updated);
  times_.optimizer_seconds += seconds(updated - begin);
  PENSTOCK_TRY(gather_weights());
  const double speed =
      value_at(spec_.optimizer.bias_update_levels, spec_.optimizer.bias_update_speed, step_);
  recent_weight_ = kLoadDecay * recent_weight_ + 1.0;
  for (const size_t d : layout_.by_stage) {
    stages_[d]->update_router_bias(loads_[d], speed);
    for (size_t i = 0; i < loads_[d].size(); ++i) {
      recent_loads_[d][i] = kLoadDecay * recent_loads_[d][i] + static_cast<double>(loads_[d][i]);
    }
  }
  state_->finish_step(step_);
  if (average_) {
    average_->start(previous, state_->current());
  } else {
    state_->publish();
  }
  const int64_t end = monotonic_ns();
  record_span(Op::kReduceGradients, updated, end);
  times_.reduce_seconds += seconds(end - updated);
  return {};
}

// Each replica has updated its own shard of every buffer.
Status Engine::gather_weights() {
  for (const size_t d : layout_.by_stage) {
    const LocalStage& local = layout_.stages[d];
    ParameterSet& parameters = stages_[d]->parameters();
    for (const ParameterKind kind : kParameterKinds) {
      if (parameters.values(kind).empty()) continue;
      PENSTOCK_TRY(collective(kGatherCollectives[static_cast<size_t>(kind)], local.stage, [&] {
        return reducer_->all_gather(local.replicas_of(kind),
                                    tag_of(kGatherChannels, kind, local.stage),
                                    parameters.values(kind));
      }));
    }
  }
  return {};
}

}  // namespace penstock
