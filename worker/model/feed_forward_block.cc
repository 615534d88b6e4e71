#include "worker/model/feed_forward_block.h"

namespace penstock {

FeedForwardBlock::FeedForwardBlock(Kernels& kernels, const ParameterSet& parameters,
                                   const std::string& stem, int64_t width, int64_t hidden)
    : kernels_(kernels), width_(width), hidden_(hidden) {
  if (width == 0) return;
  gate_ = parameters.find(stem + "gate_proj.weight");
  down_ = parameters.find(stem + "down_proj.weight");
  const Parameter* up = parameters.find(stem + "up_proj.weight");
  PENSTOCK_CHECK(gate_ && up && down_, stem);
  PENSTOCK_CHECK(up->offset == gate_->offset + gate_->size, up->offset);
}

FeedForwardDeltas FeedForwardBlock::take_deltas(MemoryPlan& plan, int64_t tokens, int64_t width) {
  return {plan.floats(tokens * width), plan.floats(tokens * 2 * width)};
}

void FeedForwardBlock::forward(int64_t tokens, const float* x, float* gate_up, float* scratch,
                               float* y) const {
  if (width_ == 0) return;
  const int64_t both = 2 * width_;
  kernels_.matmul(tokens, both, hidden_, {x, hidden_}, Transpose::kNo, {gate_->value, hidden_},
                  Transpose::kYes, Store::kOverwrite, {gate_up, both});
  kernels_.swiglu(tokens, width_, {gate_up, both}, {gate_up + width_, both}, {scratch, width_});
  kernels_.matmul(tokens, hidden_, width_, {scratch, width_}, Transpose::kNo,
                  {down_->value, width_}, Transpose::kYes, Store::kAccumulate, {y, hidden_});
}

void FeedForwardBlock::backward_input(int64_t tokens, const float* gate_up, const float* dy,
                                      const FeedForwardDeltas& deltas, float* scratch,
                                      float* dx) const {
  if (width_ == 0) {
    kernels_.fill(tokens * hidden_, 0.0F, dx);
    return;
  }
  const int64_t both = 2 * width_;
  const ConstMatrix gate = {gate_up, both};
  const ConstMatrix up = {gate_up + width_, both};
  kernels_.matmul(tokens, width_, hidden_, {dy, hidden_}, Transpose::kNo, {down_->value, width_},
                  Transpose::kNo, Store::kOverwrite, {scratch, width_});
  kernels_.swiglu(tokens, width_, gate, up, {deltas.hidden, width_});
  kernels_.swiglu_backward(tokens, width_, gate, up, {scratch, width_}, {deltas.gate_up, both},
                           {deltas.gate_up + width_, both});
  kernels_.matmul(tokens, hidden_, both, {deltas.gate_up, both}, Transpose::kNo,
                  {gate_->value, hidden_}, Transpose::kNo, Store::kOverwrite, {dx, hidden_});
}

void FeedForwardBlock::backward_weight(int64_t tokens, const float* x, const float* dy,
                                       const FeedForwardDeltas& deltas) const {
  if (width_ == 0) return;
  const int64_t both = 2 * width_;
  kernels_.matmul(hidden_, width_, tokens, {dy, hidden_}, Transpose::kYes, {deltas.hidden, width_},
                  Transpose::kNo, Store::kAccumulate, {down_->gradient, width_});
  kernels_.matmul(both, hidden_, tokens, {deltas.gate_up, both}, Transpose::kYes, {x, hidden_},
                  Transpose::kNo, Store::kAccumulate, {gate_->gradient, hidden_});
}

}  // namespace penstock
