// Multi-token prediction of depth 1 (DeepSeek-V3 report §2.2): one more block behind the last
// stage's layers, which predicts token i+2 at position i.
//
//   x'_i = M [enorm(embedding(t_{i+1})) ; hnorm(h_i)]
//   logits_i = head(shared_head.norm(block(x')_i))
//
// Embedding and head are those of the model. h, its output, enters after the final norm, and the
// embedding comes first in M, as the released weights are used
// (vllm/model_executor/models/deepseek_mtp.py).
//
// The block is the last of `layers`, in training passes only: its sub-operations are those of every
// layer, and what stands before and behind it joins them, so that schedules and interleaving see
// one more layer and nothing else. Its input takes the place of the model's output in StageSlot::x,
// and the gradient of that output the place of the input's in GradientSlot::x.
#include "worker/model/stage_impl.h"

namespace penstock {

void Stage::Impl::find_prediction_parameters() {
  if (!predicts_ahead()) return;
  const std::string stem = fmt::format("model.layers.{}.", options.model.num_hidden_layers);
  prediction = {parameters->find(stem + "enorm.weight"), parameters->find(stem + "hnorm.weight"),
                parameters->find(stem + "eh_proj.weight"),
                parameters->find(stem + "shared_head.norm.weight")};
  PENSTOCK_CHECK(prediction.projection != nullptr, stem);
}

PredictionActivations Stage::Impl::take_prediction(MemoryPlan& plan, int64_t tokens) const {
  const int64_t hidden = options.model.hidden_size;
  PredictionActivations kept;
  kept.model_output = plan.floats(tokens * hidden);
  kept.embedded = plan.floats(tokens * hidden);
  kept.embedded_inverse_rms = plan.floats(tokens);
  kept.hidden_inverse_rms = plan.floats(tokens);
  kept.pair = plan.floats(tokens * 2 * hidden);
  kept.targets = plan.int32s(tokens);
  kept.head = take_head(plan, tokens);
  return kept;
}

// Runs the model's own head, and replaces its input by the block's.
void Stage::Impl::prediction_input(StageSlot& slot) {
  const ModelConfig& model = options.model;
  const PredictionActivations& kept = slot.prediction;
  const int64_t tokens = slot.shape.tokens();
  const int64_t hidden = model.hidden_size;
  const auto epsilon = static_cast<float>(model.rms_norm_eps);
  float* const x = slot.x[static_cast<size_t>(layer_range.size())];
  slot.loss_sum = head(slot, x, *final_norm, slot.head, slot.micro_batch.targets.data(),
                       slot.micro_batch.loss_scale);
  kernels.copy_rows(tokens, hidden, {x, hidden}, {kept.model_output, hidden});
  kernels.embedding(tokens, model.vocab_size, hidden, slot.micro_batch.targets.data(),
                    embedding->value, {kept.embedded, hidden});
  kernels.rms_norm(tokens, hidden, {kept.embedded, hidden}, prediction.embedding_norm->value,
                   epsilon, {kept.pair, 2 * hidden}, kept.embedded_inverse_rms);
  kernels.rms_norm(tokens, hidden, {slot.head.normed, hidden}, prediction.hidden_norm->value,
                   epsilon, {kept.pair + hidden, 2 * hidden}, kept.hidden_inverse_rms);
  kernels.matmul(tokens, hidden, 2 * hidden, {kept.pair, 2 * hidden}, Transpose::kNo,
                 {prediction.projection->value, 2 * hidden}, Transpose::kYes, Store::kOverwrite,
                 {x, hidden});
}

// The last position of a sequence has no token i+2 in it and is left out of the sum.
void Stage::Impl::prediction_output(StageSlot& slot) {
  const PredictionActivations& kept = slot.prediction;
  const std::span<const int32_t> next = slot.micro_batch.targets;
  const int64_t length = slot.shape.length;
  for (int64_t t = 0; t < slot.shape.tokens(); ++t) {
    const bool last = t % length == length - 1;
    kept.targets[t] = last ? -1 : next[static_cast<size_t>(t) + 1];
  }
  slot.prediction_loss_sum =
      head(slot, slot.x.back(), *prediction.output_norm, kept.head, kept.targets,
           slot.micro_batch.loss_scale * slot.micro_batch.prediction_weight);
}

// The gradient of the block's input, on to the embedding and to the model's output.
void Stage::Impl::prediction_input_backward(StageSlot& slot, GradientSlot& gradient) {
  const PredictionActivations& kept = slot.prediction;
  const int64_t tokens = slot.shape.tokens();
  const int64_t hidden = options.model.hidden_size;
  const ConstMatrix d_pair = {scratch_.pair, 2 * hidden};
  float* const dx = gradient.x[static_cast<size_t>(layer_range.size())];
  kernels.copy_rows(tokens, hidden, {dx, hidden}, {gradient.prediction_input, hidden});
  kernels.matmul(tokens, 2 * hidden, hidden, {dx, hidden}, Transpose::kNo,
                 {prediction.projection->value, 2 * hidden}, Transpose::kNo, Store::kOverwrite,
                 {scratch_.pair, 2 * hidden});
  kernels.rms_norm_backward(tokens, hidden, {kept.embedded, hidden},
                            prediction.embedding_norm->value, kept.embedded_inverse_rms, d_pair,
                            Store::kOverwrite, {gradient.embedded, hidden},
                            prediction.embedding_norm->gradient);
  kernels.rms_norm_backward(tokens, hidden, {slot.head.normed, hidden},
                            prediction.hidden_norm->value, kept.hidden_inverse_rms,
                            {d_pair.data + hidden, d_pair.stride}, Store::kOverwrite,
                            {scratch_.hidden, hidden}, prediction.hidden_norm->gradient);
  head_backward(slot, kept.model_output, *final_norm, slot.head, Store::kAccumulate, dx);
}

void Stage::Impl::prediction_weight(StageSlot& slot, GradientSlot& gradient) {
  const int64_t tokens = slot.shape.tokens();
  const int64_t hidden = options.model.hidden_size;
  head_weight_gradient(slot, slot.head);
  kernels.matmul(hidden, 2 * hidden, tokens, {gradient.prediction_input, hidden}, Transpose::kYes,
                 {slot.prediction.pair, 2 * hidden}, Transpose::kNo, Store::kAccumulate,
                 {prediction.projection->gradient, 2 * hidden});
  kernels.embedding_backward(tokens, options.model.vocab_size, hidden,
                             slot.micro_batch.targets.data(), {gradient.embedded, hidden},
                             embedding->gradient);
}

}  // namespace penstock
