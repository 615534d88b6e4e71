#include "worker/model/expert_block.h"

namespace penstock {

ExpertCapacity expert_capacity(const ModelConfig& model, int64_t tokens, int64_t expert_count) {
  const int64_t local = model.n_routed_experts / expert_count;
  const int64_t rows = tokens * expert_count;
  return {rows, rows * std::min(model.num_experts_per_tok, local)};
}

ExpertBlock::ExpertBlock(Kernels& kernels, const Linears& linears, const ModelConfig& model,
                         const ParameterSet& parameters, int64_t layer,
                         std::span<const int32_t> experts)
    : kernels_(kernels), linears_(linears), model_(model), local_count_(std::ssize(experts)) {
  const std::string stem = fmt::format("model.layers.{}.mlp.", layer);
  const auto find = [&](int64_t expert, const char* name) {
    return parameters.find(fmt::format("{}experts.{}.{}.weight", stem, expert, name));
  };
  router_ = parameters.find(stem + "gate.weight");
  const Parameter* gate = find(experts[0], "gate_proj");
  const Parameter* up = find(experts[0], "up_proj");
  const Parameter* down = find(experts[0], "down_proj");
  PENSTOCK_CHECK(router_ && gate && up && down, stem);
  gate_up_ = LinearWeight(*gate, up);
  down_ = LinearWeight(*down);
  if (experts.size() == 1) return;
  gate_up_.group_stride = find(experts[1], "gate_proj")->offset - gate->offset;
  down_.group_stride = gate_up_.group_stride;
}

ExpertActivations ExpertBlock::take_activations(MemoryPlan& plan, const ModelConfig& model,
                                                const TokenShape& shape, int64_t expert_count) {
  const int64_t tokens = shape.tokens();
  const int64_t assignments = expert_capacity(model, tokens, expert_count).assignments;
  ExpertActivations kept;
  kept.scores = plan.floats(tokens * model.n_routed_experts);
  kept.expert_ids = plan.int32s(tokens * model.num_experts_per_tok);
  kept.gates = plan.floats(tokens * model.num_experts_per_tok);
  kept.inputs = plan.floats(assignments * model.hidden_size);
  kept.gate_up = plan.floats(assignments * 2 * model.moe_intermediate_size);
  kept.sorted_gates = plan.floats(assignments);
  kept.offsets = plan.int64s(model.n_routed_experts / expert_count + 1);
  if (model.aux_loss_alpha > 0.0) {
    kept.fractions = plan.floats(shape.sequences * model.n_routed_experts);
  }
  return kept;
}

ExpertDeltas ExpertBlock::take_deltas(MemoryPlan& plan, const ModelConfig& model, int64_t tokens,
                                      int64_t expert_count) {
  const int64_t assignments = expert_capacity(model, tokens, expert_count).assignments;
  ExpertDeltas deltas;
  deltas.logits = plan.floats(tokens * model.n_routed_experts);
  deltas.outputs = plan.floats(assignments * model.hidden_size);
  deltas.hidden = plan.floats(assignments * model.moe_intermediate_size);
  deltas.gate_up = plan.floats(assignments * 2 * model.moe_intermediate_size);
  return deltas;
}

ExpertScratch ExpertBlock::take_scratch(MemoryPlan& plan, const ModelConfig& model, int64_t tokens,
                                        int64_t expert_count) {
  const int64_t assignments = expert_capacity(model, tokens, expert_count).assignments;
  ExpertScratch scratch;
  scratch.logits = plan.floats(tokens * model.n_routed_experts);
  scratch.counts = plan.int64s(model.n_routed_experts);
  scratch.rows = plan.floats(assignments * model.hidden_size);
  scratch.hidden = plan.floats(assignments * model.moe_intermediate_size);
  scratch.gates = plan.floats(assignments);
  return scratch;
}

RouterShape ExpertBlock::router_shape(int64_t tokens) const {
  return {tokens,
          model_.n_routed_experts,
          model_.n_group,
          model_.topk_group,
          model_.num_experts_per_tok,
          model_.norm_topk_prob,
          static_cast<float>(model_.routed_scaling_factor)};
}

void ExpertBlock::route(int64_t tokens, const float* x, const float* bias,
                        const ExpertActivations& kept, const ExpertScratch& scratch) const {
  const int64_t hidden = model_.hidden_size;
  const int64_t experts = model_.n_routed_experts;
  kernels_.matmul(tokens, experts, hidden, {x, hidden}, Transpose::kNo, {router_->value, hidden},
                  Transpose::kYes, Store::kOverwrite, {scratch.logits, experts});
  kernels_.router(router_shape(tokens), {scratch.logits, experts}, bias, kept.scores,
                  kept.expert_ids, kept.gates, scratch.counts);
}

BalanceShape ExpertBlock::balance_shape(const TokenShape& shape) const {
  return {shape, model_.n_routed_experts, model_.num_experts_per_tok};
}

double ExpertBlock::balance(const TokenShape& shape, const ExpertActivations& kept) const {
  if (kept.fractions == nullptr) return 0.0;
  return model_.aux_loss_alpha *
         sequence_balance(balance_shape(shape), kept.scores, kept.fractions);
}

void ExpertBlock::route_backward(const TokenShape& shape, const float* d_gates, double loss_scale,
                                 const ExpertActivations& kept, const ExpertDeltas& deltas,
                                 float* dx) const {
  const int64_t tokens = shape.tokens();
  const int64_t hidden = model_.hidden_size;
  const int64_t experts = model_.n_routed_experts;
  kernels_.router_backward(router_shape(tokens), kept.scores, kept.expert_ids, d_gates,
                           {deltas.logits, experts});
  if (kept.fractions != nullptr) {
    sequence_balance_backward(balance_shape(shape), model_.aux_loss_alpha * loss_scale, kept.scores,
                              kept.fractions, deltas.logits);
  }
  kernels_.matmul(tokens, hidden, experts, {deltas.logits, experts}, Transpose::kNo,
                  {router_->value, hidden}, Transpose::kNo, Store::kAccumulate, {dx, hidden});
}

void ExpertBlock::route_weight(int64_t tokens, const float* x, const ExpertDeltas& deltas) const {
  const int64_t hidden = model_.hidden_size;
  const int64_t experts = model_.n_routed_experts;
  kernels_.matmul(experts, hidden, tokens, {deltas.logits, experts}, Transpose::kYes, {x, hidden},
                  Transpose::kNo, Store::kAccumulate, {router_->gradient, hidden});
}

void ExpertBlock::forward(const DispatchedRows& dispatched, const ExpertActivations& kept,
                          const ExpertScratch& scratch, float* y) const {
  const int64_t hidden = model_.hidden_size;
  const int64_t width = model_.moe_intermediate_size;
  const int64_t count = dispatched.assignment_count;
  const int32_t* const row = dispatched.expert_row.data();
  for (int64_t e = 0; e <= local_count_; ++e) kept.offsets[e] = dispatched.expert_offset[e];
  for (int64_t a = 0; a < count; ++a) {
    kept.sorted_gates[a] = dispatched.assignment_weight[dispatched.expert_assignment[a]];
  }
  kernels_.gather_rows(count, hidden, dispatched.row_count, {dispatched.rows.data(), hidden}, row,
                       nullptr, {kept.inputs, hidden});
  const RowGroups groups(local_count_, kept.offsets);
  const Matrix gate = {kept.gate_up, 2 * width};
  const Matrix up = {kept.gate_up + width, 2 * width};
  linears_.forward(groups, gate_up_, {kept.inputs, hidden}, Store::kOverwrite, gate,
                   RowFormat::kE4m3PowerOfTwo);
  kernels_.swiglu(count, width, gate, up, {scratch.hidden, width});
  linears_.round(RowFormat::kE4m3, count, width, gate, gate);
  linears_.round(RowFormat::kE4m3, count, width, up, up);
  linears_.forward(groups, down_, {scratch.hidden, width}, Store::kOverwrite,
                   {scratch.rows, hidden});
  kernels_.fill(dispatched.row_count * hidden, 0.0F, y);
  kernels_.scatter_add_rows(count, hidden, dispatched.row_count, {scratch.rows, hidden}, row,
                            kept.sorted_gates, {y, hidden});
}

// With p the ungated gradient W_down^T dy: the gate weight's gradient is p · hidden, which spares
// keeping the experts' outputs; the hidden layer's is g p; and W_down's is dy (g hidden)^T.
void ExpertBlock::backward_input(const DispatchedRows& dispatched, const float* d_rows,
                                 const ExpertActivations& kept, const ExpertDeltas& deltas,
                                 const ExpertScratch& scratch, float* dx_rows,
                                 float* d_weight) const {
  const int64_t hidden = model_.hidden_size;
  const int64_t width = model_.moe_intermediate_size;
  const int64_t count = dispatched.assignment_count;
  const int32_t* const row = dispatched.expert_row.data();
  const RowGroups groups(local_count_, kept.offsets);
  const ConstMatrix gate = {kept.gate_up, 2 * width};
  const ConstMatrix up = {kept.gate_up + width, 2 * width};
  kernels_.gather_rows(count, hidden, dispatched.row_count, {d_rows, hidden}, row, nullptr,
                       {deltas.outputs, hidden});
  linears_.input_gradient(groups, down_, {deltas.outputs, hidden}, {scratch.hidden, width},
                          RowFormat::kE4m3PowerOfTwo);
  kernels_.swiglu_backward(
      count, width, gate, up, {scratch.hidden, width}, {deltas.gate_up, 2 * width},
      {deltas.gate_up + width, 2 * width},
      {.weights = kept.sorted_gates, .y = {deltas.hidden, width}, .dots = scratch.gates});
  for (int64_t a = 0; a < count; ++a) {
    d_weight[dispatched.expert_assignment[a]] = scratch.gates[a];
  }
  linears_.input_gradient(groups, gate_up_, {deltas.gate_up, 2 * width}, {scratch.rows, hidden});
  kernels_.fill(dispatched.row_count * hidden, 0.0F, dx_rows);
  kernels_.scatter_add_rows(count, hidden, dispatched.row_count, {scratch.rows, hidden}, row,
                            nullptr, {dx_rows, hidden});
}

void ExpertBlock::backward_weight(const ExpertActivations& kept, const ExpertDeltas& deltas) const {
  const int64_t hidden = model_.hidden_size;
  const int64_t width = model_.moe_intermediate_size;
  const RowGroups groups(local_count_, kept.offsets);
  linears_.weight_gradient(groups, down_, {deltas.outputs, hidden}, {deltas.hidden, width},
                           RowFormat::kFp32, RowFormat::kE4m3PowerOfTwo);
  linears_.weight_gradient(groups, gate_up_, {deltas.gate_up, 2 * width}, {kept.inputs, hidden},
                           RowFormat::kE4m3PowerOfTwo);
}

}  // namespace penstock
