// The routed part of a mixture layer on one rank: the gate, which every rank has whole, and the
// experts of one expert index, which work on the rows that dispatch delivered (DeepSeek-V3 report
// §2.1.2).
//
//   forward of row r:  y[r] = Σ over its local experts e of g · W_down,e (silu(W_gate,e x_r) ·
//   W_up,e x_r)
//
// Rows are gathered into one list sorted by expert, of A assignments, on which grouped products
// run.
#pragma once

#include <cstdint>
#include <span>

#include "comm/data/expert_exchange.h"
#include "comm/run/model_config.h"
#include "kernels/kernels.h"
#include "worker/model/balance_loss.h"
#include "worker/model/linear.h"
#include "worker/model/memory_plan.h"
#include "worker/model/parameter.h"

namespace penstock {

// What the forward keeps, of T own tokens and A assignments of local experts; k =
// num_experts_per_tok, F = moe_intermediate_size.
struct ExpertActivations {
  float* scores = nullptr;        // [T, experts]
  int32_t* expert_ids = nullptr;  // [T, k]
  float* gates = nullptr;         // [T, k]
  float* inputs = nullptr;        // [A, hidden], sorted by expert
  float* gate_up = nullptr;       // [A, 2F]
  float* sorted_gates = nullptr;  // [A]
  int64_t* offsets = nullptr;     // [local experts + 1]
  float* fractions = nullptr;     // [sequences, experts] of balance_loss.h; null without that loss
};

// What the backward keeps for the weight gradients.
struct ExpertDeltas {
  float* logits = nullptr;  // [T, experts]: gradient
  float* outputs =
      nullptr;              // [A, hidden]: gradient of each expert's output, before the gate weight
  float* hidden = nullptr;  // [A, F]: gate weight · silu(gate) · up
  float* gate_up = nullptr;  // [A, 2F]: gradient
};

// Used inside one call only.
struct ExpertScratch {
  float* logits = nullptr;    // [T, experts]
  int64_t* counts = nullptr;  // [experts]
  float* rows = nullptr;      // [A, hidden]
  float* hidden = nullptr;    // [A, F]
  float* gates = nullptr;     // [A]
};

// How many rows and assignments one rank can be sent at most.
struct ExpertCapacity {
  int64_t rows = 0;
  int64_t assignments = 0;
};
ExpertCapacity expert_capacity(const ModelConfig& model, int64_t tokens, int64_t expert_count);

// Stateless but for its borrowed weights.
class ExpertBlock {
 public:
  // `experts`: those that `parameters` has of the layer, in its order.
  ExpertBlock(Kernels& kernels, const Linears& linears, const ModelConfig& model,
              const ParameterSet& parameters, int64_t layer, std::span<const int32_t> experts);

  static ExpertActivations take_activations(MemoryPlan& plan, const ModelConfig& model,
                                            const TokenShape& shape, int64_t expert_count);
  static ExpertDeltas take_deltas(MemoryPlan& plan, const ModelConfig& model, int64_t tokens,
                                  int64_t expert_count);
  static ExpertScratch take_scratch(MemoryPlan& plan, const ModelConfig& model, int64_t tokens,
                                    int64_t expert_count);

  // The gate: fills kept.scores, expert_ids and gates, and scratch.counts, from x[tokens, hidden].
  void route(int64_t tokens, const float* x, const float* bias, const ExpertActivations& kept,
             const ExpertScratch& scratch) const;
  // After route(), in training: aux_loss_alpha times sequence_balance(). 0 without that loss.
  double balance(const TokenShape& shape, const ExpertActivations& kept) const;
  // dx += the part of x's gradient that comes through the gate; `loss_scale` of the balance loss.
  void route_backward(const TokenShape& shape, const float* d_gates, double loss_scale,
                      const ExpertActivations& kept, const ExpertDeltas& deltas, float* dx) const;
  void route_weight(int64_t tokens, const float* x, const ExpertDeltas& deltas) const;

  // y[rows, hidden] from what was dispatched.
  void forward(const DispatchedRows& dispatched, const ExpertActivations& kept,
               const ExpertScratch& scratch, float* y) const;
  // d_rows: gradient of y. Sets dx_rows [rows, hidden] and d_weight [assignments], in assignment
  // order.
  void backward_input(const DispatchedRows& dispatched, const float* d_rows,
                      const ExpertActivations& kept, const ExpertDeltas& deltas,
                      const ExpertScratch& scratch, float* dx_rows, float* d_weight) const;
  void backward_weight(const ExpertActivations& kept, const ExpertDeltas& deltas) const;

 private:
  RouterShape router_shape(int64_t tokens) const;
  BalanceShape balance_shape(const TokenShape& shape) const;

  Kernels& kernels_;
  const Linears& linears_;
  const ModelConfig& model_;
  const Parameter* router_;
  LinearWeight gate_up_;  // of the local experts: gate_proj with up_proj behind it
  LinearWeight down_;
  int64_t local_count_;
};

}  // namespace penstock
