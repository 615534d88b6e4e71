// The forward sub-operations of a stage.
#include "worker/model/stage_impl.h"

namespace penstock {
namespace {

std::span<const float> span_of(const float* data, int64_t count) {
  return {data, static_cast<size_t>(count)};
}

}  // namespace

Status Stage::Impl::run_forward(SubOp op, int32_t layer, int32_t slot_index) {
  switch (op) {
    case SubOp::kEmbed:
      embed(slot_at(slot_index));
      return {};
    case SubOp::kAttention:
      return attention(layer, slot_index);
    case SubOp::kDispatch:
      dispatch(layer, slot_index);
      return {};
    case SubOp::kMlp:
      return mlp(layer, slot_index);
    case SubOp::kCombine:
      combine(layer, slot_index);
      return {};
    case SubOp::kOutput:
      return output(slot_index);
    default:
      PENSTOCK_CHECK(false, "not a forward operation:", sub_op_name(op));
      return {};
  }
}

int32_t Stage::Impl::exchange_slot(int32_t layer, int32_t slot_index) const {
  if (!trains()) return slot_index;
  return slot_index * static_cast<int32_t>(routers.size()) +
         layers[static_cast<size_t>(layer)].moe_index;
}

Tag Stage::Impl::exchange_tag(int32_t layer, int32_t slot_index) const {
  const auto number = static_cast<uint64_t>(slot_index) * routers.size() +
                      static_cast<uint64_t>(layers[static_cast<size_t>(layer)].moe_index);
  return {options.tag_base + number * ExpertExchange::kTagBaseStep};
}

void Stage::Impl::embed(StageSlot& slot) {
  const ModelConfig& model = options.model;
  kernels.embedding(slot.shape.tokens(), model.vocab_size, model.hidden_size,
                    slot.micro_batch.tokens.data(), embedding->value,
                    {slot.x[0], model.hidden_size});
}

Status Stage::Impl::finish_combine(int32_t layer, int32_t slot_index) {
  if (layer < 0 || !layers[static_cast<size_t>(layer)].experts) return {};
  StageSlot& slot = slot_at(slot_index);
  return exchange->finish_combine(
      exchange_slot(layer, slot_index),
      {slot.x[static_cast<size_t>(layer) + 1], static_cast<size_t>(hidden_floats(slot))});
}

Status Stage::Impl::attention(int32_t layer_index, int32_t slot_index) {
  PENSTOCK_TRY(finish_combine(layer_index - 1, slot_index));
  const auto index = static_cast<size_t>(layer_index);
  const StageLayer& layer = layers[index];
  StageSlot& slot = slot_at(slot_index);
  if (is_prediction(layer_index)) prediction_input(slot);
  const LayerActivations& kept = slot.layers[index];
  const int64_t tokens = slot.shape.tokens();
  const int64_t hidden = options.model.hidden_size;
  layer.attention->forward(slot.shape, slot.x[index], kept.attention, scratch_.attention,
                           kept.middle);
  kernels.rms_norm(tokens, hidden, {kept.middle, hidden}, layer.middle_norm->value,
                   static_cast<float>(options.model.rms_norm_eps), {kept.normed, hidden},
                   kept.inverse_rms);
  if (!layer.experts) return {};
  const Router& router = routers[static_cast<size_t>(layer.moe_index)];
  layer.experts->route(tokens, kept.normed, router.bias.data(), kept.experts, scratch_.experts);
  if (slot.training) {
    slot.balance_sum += layer.experts->balance(slot.shape, kept.experts);
    for (size_t e = 0; e < router.load.size(); ++e) router.load[e] += scratch_.experts.counts[e];
  }
  return {};
}

const float* Stage::Impl::dispatched_form(const StageSlot& slot, const float* x,
                                          float* payload) const {
  if (!linears.fp8()) return x;
  const int64_t hidden = options.model.hidden_size;
  linears.round(RowFormat::kE4m3PowerOfTwo, slot.shape.tokens(), hidden, {x, hidden},
                {payload, hidden});
  return payload;
}

void Stage::Impl::dispatch(int32_t layer_index, int32_t slot_index) {
  const auto index = static_cast<size_t>(layer_index);
  if (!layers[index].experts) return;
  const StageSlot& slot = slot_at(slot_index);
  const LayerActivations& kept = slot.layers[index];
  const int64_t choices = slot.shape.tokens() * options.model.num_experts_per_tok;
  exchange->start_dispatch(
      exchange_slot(layer_index, slot_index), exchange_tag(layer_index, slot_index),
      span_of(dispatched_form(slot, kept.normed, payload_), hidden_floats(slot)),
      {kept.experts.expert_ids, static_cast<size_t>(choices)}, span_of(kept.experts.gates, choices),
      layers[index].seat_of);
}

// The shared expert runs while the tokens travel.
Status Stage::Impl::mlp(int32_t layer_index, int32_t slot_index) {
  const auto index = static_cast<size_t>(layer_index);
  const StageLayer& layer = layers[index];
  StageSlot& slot = slot_at(slot_index);
  const LayerActivations& kept = slot.layers[index];
  const int64_t tokens = slot.shape.tokens();
  const int64_t hidden = options.model.hidden_size;
  float* const y = slot.x[index + 1];
  kernels.copy_rows(tokens, hidden, {kept.middle, hidden}, {y, hidden});
  layer.feed_forward->forward(tokens, kept.normed, kept.gate_up, scratch_.feed_forward, y);
  if (!layer.experts) return {};
  PENSTOCK_TRY_ASSIGN(const DispatchedRows dispatched,
                      exchange->finish_dispatch(exchange_slot(layer_index, slot_index)));
  layer.experts->forward(dispatched, kept.experts, scratch_.experts, partial_rows_);
  return {};
}

void Stage::Impl::combine(int32_t layer_index, int32_t slot_index) {
  if (!layers[static_cast<size_t>(layer_index)].experts) return;
  const int32_t place = exchange_slot(layer_index, slot_index);
  const int64_t rows = exchange->dispatched(place).row_count;
  const Matrix partial = {partial_rows_, options.model.hidden_size};
  linears.round(RowFormat::kBf16, rows, options.model.hidden_size, partial, partial);
  exchange->start_combine(place, span_of(partial_rows_, rows * options.model.hidden_size));
}

Status Stage::Impl::output(int32_t slot_index) {
  StageSlot& slot = slot_at(slot_index);
  PENSTOCK_TRY(finish_combine(layer_count_of_pass(slot.training) - 1, slot_index));
  if (!is_last()) return {};
  if (slot.training && predicts_ahead()) {
    prediction_output(slot);
    return {};
  }
  const std::span<const int32_t> targets = slot.micro_batch.targets;
  slot.loss_sum =
      head(slot, slot.x[static_cast<size_t>(layer_range.size())], *final_norm, slot.head,
           targets.empty() ? nullptr : targets.data(), slot.micro_batch.loss_scale);
  return {};
}

double Stage::Impl::head(const StageSlot& slot, const float* x, const Parameter& norm,
                         const HeadActivations& kept, const int32_t* targets, double scale) {
  const ModelConfig& model = options.model;
  const int64_t tokens = slot.shape.tokens();
  const int64_t hidden = model.hidden_size;
  const int64_t vocab = model.vocab_size;
  kernels.rms_norm(tokens, hidden, {x, hidden}, norm.value, static_cast<float>(model.rms_norm_eps),
                   {kept.normed, hidden}, kept.inverse_rms);
  kernels.matmul(tokens, vocab, hidden, {kept.normed, hidden}, Transpose::kNo,
                 {head_weight->value, hidden}, Transpose::kYes, Store::kOverwrite,
                 {kept.logits, vocab});
  if (targets == nullptr) return 0.0;
  kernels.cross_entropy(tokens, vocab, {kept.logits, vocab}, targets, static_cast<float>(scale),
                        kept.losses, slot.training ? Matrix{kept.logits, vocab} : Matrix{});
  double sum = 0.0;
  for (int64_t t = 0; t < tokens; ++t) sum += kept.losses[t];
  return sum;
}

}  // namespace penstock
