// A gated feed-forward network: y += W_down (silu(W_gate x) · W_up x). The whole of a dense layer's
// second half, and the shared expert of a mixture layer.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/kernels.h"
#include "worker/model/linear.h"
#include "worker/model/memory_plan.h"
#include "worker/model/parameter.h"

namespace penstock {

// What the weight gradients need besides the forward's [gate | up], all of T tokens and width F.
struct FeedForwardDeltas {
  float* hidden = nullptr;   // [T, F]: silu(gate) · up, computed again
  float* gate_up = nullptr;  // [T, 2F]: gradient of [gate | up]
};

// Stateless but for its borrowed weights. Width 0 (no shared expert) does nothing.
class FeedForwardBlock {
 public:
  // `stem`: "model.layers.0.mlp." or "model.layers.3.mlp.shared_experts.".
  FeedForwardBlock(Kernels& kernels, const Linears& linears, const ParameterSet& parameters,
                   const std::string& stem, int64_t width, int64_t hidden);

  static FeedForwardDeltas take_deltas(MemoryPlan& plan, int64_t tokens, int64_t width);

  // y += FFN(x). Keeps gate_up [tokens, 2F]. `scratch`: [tokens, F].
  void forward(int64_t tokens, const float* x, float* gate_up, float* scratch, float* y) const;
  // dx = gradient of x, from dy. `scratch`: [tokens, F].
  void backward_input(int64_t tokens, const float* gate_up, const float* dy,
                      const FeedForwardDeltas& deltas, float* scratch, float* dx) const;
  // Adds the gradients of the matrices.
  void backward_weight(int64_t tokens, const float* x, const float* dy,
                       const FeedForwardDeltas& deltas) const;

 private:
  Kernels& kernels_;
  const Linears& linears_;
  int64_t width_;  // F
  int64_t hidden_;
  LinearWeight gate_up_;  // gate_proj with up_proj behind it; empty when width is 0, as the next
  LinearWeight down_;
};

}  // namespace penstock
