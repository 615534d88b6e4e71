#include "worker/model/feed_forward_block.h"

namespace penstock {

FeedForwardBlock::FeedForwardBlock(Kernels& kernels, const Linears& linears,
                                   const ParameterSet& parameters, const std::string& stem,
                                   int64_t width, int64_t hidden)
    : kernels_(kernels), linears_(linears), width_(width), hidden_(hidden) {
  if (width == 0) return;
  const Parameter* gate = parameters.find(stem + "gate_proj.weight");
  const Parameter* up = parameters.find(stem + "up_proj.weight");
  const Parameter* down = parameters.find(stem + "down_proj.weight");
  PENSTOCK_CHECK(gate && up && down, stem);
  gate_up_ = LinearWeight(*gate, up);
  down_ = LinearWeight(*down);
}

FeedForwardDeltas FeedForwardBlock::take_deltas(MemoryPlan& plan, int64_t tokens, int64_t width) {
  return {plan.floats(tokens * width), plan.floats(tokens * 2 * width)};
}

void FeedForwardBlock::forward(int64_t tokens, const float* x, float* gate_up, float* scratch,
                               float* y) const {
  if (width_ == 0) return;
  const int64_t both = 2 * width_;
  const Matrix gate = {gate_up, both};
  const Matrix up = {gate_up + width_, both};
  linears_.forward(tokens, gate_up_, {x, hidden_}, Store::kOverwrite, gate);
  kernels_.swiglu(tokens, width_, gate, up, {scratch, width_});
  linears_.round(RowFormat::kE4m3, tokens, width_, gate, gate);
  linears_.round(RowFormat::kE4m3, tokens, width_, up, up);
  linears_.forward(tokens, down_, {scratch, width_}, Store::kAccumulate, {y, hidden_});
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
  linears_.input_gradient(tokens, down_, {dy, hidden_}, {scratch, width_});
  kernels_.swiglu_backward(tokens, width_, gate, up, {scratch, width_}, {deltas.gate_up, both},
                           {deltas.gate_up + width_, both}, {.y = {deltas.hidden, width_}});
  linears_.input_gradient(tokens, gate_up_, {deltas.gate_up, both}, {dx, hidden_});
}

void FeedForwardBlock::backward_weight(int64_t tokens, const float* x, const float* dy,
                                       const FeedForwardDeltas& deltas) const {
  if (width_ == 0) return;
  linears_.weight_gradient(tokens, down_, {dy, hidden_}, {deltas.hidden, width_}, RowFormat::kFp32);
  linears_.weight_gradient(tokens, gate_up_, {deltas.gate_up, 2 * width_}, {x, hidden_});
}

}  // namespace penstock
