// The backward sub-operations of a stage.
#include "worker/model/stage_impl.h"

namespace penstock {
namespace {

std::span<const float> span_of(const float* data, int64_t count) {
  return {data, static_cast<size_t>(count)};
}

}  // namespace

Status Stage::Impl::run_backward(SubOp op, int32_t layer, int32_t slot_index,
                                 int32_t gradient_index) {
  StageSlot& slot = slot_at(slot_index);
  GradientSlot& gradient = gradient_slots[static_cast<size_t>(gradient_index)];
  switch (op) {
    case SubOp::kOutputBackward:
      output_backward(slot, gradient);
      return {};
    case SubOp::kOutputWeight:
      output_weight(slot);
      return {};
    case SubOp::kCombineBackward:
      combine_backward(layer, slot_index, gradient);
      return {};
    case SubOp::kMlpBackward:
      return mlp_backward(layer, slot_index, gradient);
    case SubOp::kDispatchBackward:
      dispatch_backward(layer, slot_index);
      return {};
    case SubOp::kMlpWeight:
      mlp_weight(layer, slot, gradient);
      return {};
    case SubOp::kAttentionBackward:
      return attention_backward(layer, slot_index, gradient);
    case SubOp::kAttentionWeight:
      attention_weight(layer, slot, gradient);
      return {};
    case SubOp::kEmbedWeight:
      embed_weight(slot, gradient);
      return {};
    default:
      PENSTOCK_CHECK(false, "not a backward operation:", sub_op_name(op));
      return {};
  }
}

float* Stage::Impl::gradient_of(StageSlot& slot, GradientSlot& gradient, int32_t layer) const {
  if (layer == 0 && !is_first()) return slot.input_gradient;
  if (layer == layer_count() && !is_last()) return slot.output_gradient;
  return gradient.x[static_cast<size_t>(layer)];
}

void Stage::Impl::output_backward(StageSlot& slot, GradientSlot& gradient) {
  const bool ahead = predicts_ahead();
  head_backward(slot, slot.x.back(), ahead ? *prediction.output_norm : *final_norm,
                ahead ? slot.prediction.head : slot.head, Store::kOverwrite,
                gradient_of(slot, gradient, layer_count()));
}

void Stage::Impl::head_backward(const StageSlot& slot, const float* x, const Parameter& norm,
                                const HeadActivations& kept, Store store, float* dx) {
  const int64_t tokens = slot.shape.tokens();
  const int64_t hidden = options.model.hidden_size;
  const int64_t vocab = options.model.vocab_size;
  kernels.matmul(tokens, hidden, vocab, {kept.logits, vocab}, Transpose::kNo,
                 {head_weight->value, hidden}, Transpose::kNo, store, {scratch_.hidden, hidden});
  kernels.rms_norm_backward(tokens, hidden, {x, hidden}, norm.value, kept.inverse_rms,
                            {scratch_.hidden, hidden}, Store::kOverwrite, {dx, hidden},
                            norm.gradient);
}

void Stage::Impl::output_weight(StageSlot& slot) {
  head_weight_gradient(slot, predicts_ahead() ? slot.prediction.head : slot.head);
}

void Stage::Impl::head_weight_gradient(const StageSlot& slot, const HeadActivations& kept) {
  const int64_t hidden = options.model.hidden_size;
  const int64_t vocab = options.model.vocab_size;
  kernels.matmul(vocab, hidden, slot.shape.tokens(), {kept.logits, vocab}, Transpose::kYes,
                 {kept.normed, hidden}, Transpose::kNo, Store::kAccumulate,
                 {head_weight->gradient, hidden});
}

void Stage::Impl::combine_backward(int32_t layer, int32_t slot_index, GradientSlot& gradient) {
  if (!layers[static_cast<size_t>(layer)].experts) return;
  StageSlot& slot = slot_at(slot_index);
  exchange->start_combine_backward(
      exchange_slot(layer, slot_index),
      span_of(dispatched_form(slot, gradient_of(slot, gradient, layer + 1), gradient_payload_),
              hidden_floats(slot)));
}

// The shared expert runs while the gradients travel.
Status Stage::Impl::mlp_backward(int32_t layer_index, int32_t slot_index, GradientSlot& gradient) {
  const auto index = static_cast<size_t>(layer_index);
  const StageLayer& layer = layers[index];
  StageSlot& slot = slot_at(slot_index);
  const LayerActivations& kept = slot.layers[index];
  const LayerDeltas& deltas = gradient.layers[index];
  layer.feed_forward->backward_input(slot.shape.tokens(), kept.gate_up,
                                     gradient_of(slot, gradient, layer_index + 1),
                                     deltas.feed_forward, scratch_.feed_forward, normed_gradient_);
  if (!layer.experts) return {};
  const int32_t place = exchange_slot(layer_index, slot_index);
  PENSTOCK_TRY_ASSIGN(const std::span<const float> d_rows,
                      exchange->finish_combine_backward(place));
  layer.experts->backward_input(exchange->dispatched(place), d_rows.data(), kept.experts,
                                deltas.experts, scratch_.experts, row_gradients_,
                                weight_gradients_);
  return {};
}

void Stage::Impl::dispatch_backward(int32_t layer, int32_t slot_index) {
  if (!layers[static_cast<size_t>(layer)].experts) return;
  const int32_t place = exchange_slot(layer, slot_index);
  const DispatchedRows dispatched = exchange->dispatched(place);
  const int64_t hidden = options.model.hidden_size;
  const Matrix gradients = {row_gradients_, hidden};
  linears.round(RowFormat::kBf16, dispatched.row_count, hidden, gradients, gradients);
  exchange->start_dispatch_backward(place, span_of(row_gradients_, dispatched.row_count * hidden),
                                    span_of(weight_gradients_, dispatched.assignment_count));
}

const float* Stage::Impl::normed_again(const StageLayer& layer, const StageSlot& slot,
                                       const LayerActivations& kept) const {
  if (backward_normed_ == nullptr) return kept.normed;
  const int64_t hidden = options.model.hidden_size;
  kernels.rms_norm(slot.shape.tokens(), hidden, {kept.middle, hidden}, layer.middle_norm->value,
                   static_cast<float>(options.model.rms_norm_eps), {backward_normed_, hidden},
                   kept.inverse_rms);
  return backward_normed_;
}

void Stage::Impl::mlp_weight(int32_t layer_index, StageSlot& slot, GradientSlot& gradient) {
  const auto index = static_cast<size_t>(layer_index);
  const StageLayer& layer = layers[index];
  const LayerActivations& kept = slot.layers[index];
  const LayerDeltas& deltas = gradient.layers[index];
  layer.feed_forward->backward_weight(slot.shape.tokens(), normed_again(layer, slot, kept),
                                      gradient_of(slot, gradient, layer_index + 1),
                                      deltas.feed_forward);
  if (layer.experts) layer.experts->backward_weight(kept.experts, deltas.experts);
}

Status Stage::Impl::attention_backward(int32_t layer_index, int32_t slot_index,
                                       GradientSlot& gradient) {
  const auto index = static_cast<size_t>(layer_index);
  const StageLayer& layer = layers[index];
  StageSlot& slot = slot_at(slot_index);
  const LayerActivations& kept = slot.layers[index];
  const LayerDeltas& deltas = gradient.layers[index];
  const int64_t tokens = slot.shape.tokens();
  const int64_t hidden = options.model.hidden_size;
  if (layer.experts) {
    const int64_t choices = tokens * options.model.num_experts_per_tok;
    PENSTOCK_TRY(exchange->finish_dispatch_backward(
        exchange_slot(layer_index, slot_index),
        {normed_gradient_, static_cast<size_t>(hidden_floats(slot))},
        {gate_gradients_, static_cast<size_t>(choices)}));
    layer.experts->route_backward(slot.shape, gate_gradients_, slot.micro_batch.loss_scale,
                                  kept.experts, deltas.experts, normed_gradient_);
  }
  kernels.copy_rows(tokens, hidden, {gradient_of(slot, gradient, layer_index + 1), hidden},
                    {deltas.middle, hidden});
  kernels.rms_norm_backward(tokens, hidden, {kept.middle, hidden}, layer.middle_norm->value,
                            kept.inverse_rms, {normed_gradient_, hidden}, Store::kAccumulate,
                            {deltas.middle, hidden}, layer.middle_norm->gradient);
  layer.attention->backward_input(slot.shape, slot.x[index], kept.attention, deltas.middle,
                                  deltas.attention, scratch_.attention,
                                  gradient_of(slot, gradient, layer_index));
  if (is_prediction(layer_index)) prediction_input_backward(slot, gradient);
  return {};
}

// The gate's weights wait for here: their gradient needs what dispatch backward brings home.
void Stage::Impl::attention_weight(int32_t layer_index, StageSlot& slot, GradientSlot& gradient) {
  const auto index = static_cast<size_t>(layer_index);
  const StageLayer& layer = layers[index];
  const LayerActivations& kept = slot.layers[index];
  const LayerDeltas& deltas = gradient.layers[index];
  layer.attention->backward_weight(slot.shape, slot.x[index], kept.attention, deltas.middle,
                                   deltas.attention);
  if (layer.experts) {
    layer.experts->route_weight(slot.shape.tokens(), normed_again(layer, slot, kept),
                                deltas.experts);
  }
  if (is_prediction(layer_index)) prediction_weight(slot, gradient);
}

void Stage::Impl::embed_weight(StageSlot& slot, GradientSlot& gradient) {
  const ModelConfig& model = options.model;
  kernels.embedding_backward(
      slot.shape.tokens(), model.vocab_size, model.hidden_size, slot.micro_batch.tokens.data(),
      {gradient_of(slot, gradient, 0), model.hidden_size}, embedding->gradient);
}

}  // namespace penstock
