#include "tests/support/timed_stage.h"

#include "comm/base/check.h"

namespace penstock {

TimedStage::TimedStage(const StageOptions& options, const TimedStageOptions& timed,
                       ComputeClock& clock, Kernels& kernels, ExpertExchange* exchange)
    : Stage(options, kernels, exchange),
      timed_(timed),
      clock_(clock),
      exchange_(exchange),
      layer_count_(static_cast<int32_t>(layers().size())),
      tokens_(options.sequences_max * options.sequence_length_max),
      hidden_(options.model.hidden_size),
      rows_(static_cast<size_t>(options.expert_count * tokens_ * hidden_)),
      sums_(static_cast<size_t>(tokens_ * hidden_)),
      experts_(static_cast<size_t>(tokens_ * options.model.num_experts_per_tok), -1),
      gates_(experts_.size(), 1.0F),
      gate_gradients_(experts_.size()) {
  PENSTOCK_CHECK(options.model.first_k_dense_replace == 0, options.model.first_k_dense_replace);
  if (timed_.exchange_tokens) route_tokens();
}

void TimedStage::route_tokens() {
  const int64_t choices = options().model.num_experts_per_tok;
  const int64_t members = options().expert_count;
  const int64_t experts_here = options().model.n_routed_experts / members;
  PENSTOCK_CHECK(choices <= members, "a token goes to each member at most once");
  for (int64_t t = 0; t < tokens_; ++t) {
    for (int64_t c = 0; c < choices; ++c) {
      const int64_t member = (t + c) % members;
      const int64_t expert = member * experts_here + t / members % experts_here;
      experts_[static_cast<size_t>(t * choices + c)] = static_cast<int32_t>(expert);
    }
  }
}

Status TimedStage::run_sub_op(SubOp op, int32_t layer, int32_t slot, int32_t) {
  PENSTOCK_TRY(finish_exchange(op, layer, slot));
  clock_.run(timed_.costs[op]);
  start_exchange(op, layer, slot);
  return {};
}

Status TimedStage::finish_exchange(SubOp op, int32_t layer, int32_t slot) {
  switch (op) {
    case SubOp::kAttention:
      if (layer == 0) return {};
      return exchange_->finish_combine(exchange_slot(layer - 1, slot), sums_);
    case SubOp::kOutput:
      return exchange_->finish_combine(exchange_slot(layer_count_ - 1, slot), sums_);
    case SubOp::kMlp:
      return exchange_->finish_dispatch(exchange_slot(layer, slot)).status();
    case SubOp::kMlpBackward:
      return exchange_->finish_combine_backward(exchange_slot(layer, slot)).status();
    case SubOp::kAttentionBackward:
      return exchange_->finish_dispatch_backward(exchange_slot(layer, slot), sums_,
                                                 gate_gradients_);
    default:
      return {};
  }
}

void TimedStage::start_exchange(SubOp op, int32_t layer, int32_t slot) {
  if (!is_exchange(op)) return;
  const int32_t place = exchange_slot(layer, slot);
  switch (op) {
    case SubOp::kDispatch:
      return exchange_->start_dispatch(
          place,
          Tag{options().tag_base + static_cast<uint64_t>(place) * ExpertExchange::kTagBaseStep},
          rows(tokens_), experts_, gates_);
    case SubOp::kCombine:
      return exchange_->start_combine(place, rows(exchange_->dispatched(place).row_count));
    case SubOp::kCombineBackward:
      return exchange_->start_combine_backward(place, rows(tokens_));
    default: {
      const DispatchedRows dispatched = exchange_->dispatched(place);
      const std::span<const float> d_rows = rows(dispatched.row_count);
      return exchange_->start_dispatch_backward(
          place, d_rows, d_rows.first(static_cast<size_t>(dispatched.assignment_count)));
    }
  }
}

std::span<const float> TimedStage::rows(int64_t count) const {
  return std::span(rows_).first(static_cast<size_t>(count * hidden_));
}

}  // namespace penstock
