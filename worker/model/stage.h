// One pipeline stage of a DeepSeek-V3-shaped model on one rank: some decoder layers, with the
// embedding in the first stage and final norm, head and loss, and multi-token prediction, in the
// last; of the routed experts those of one expert index.
// Explicit forward, backward-input and backward-weight; no autograd.
//
// Use: for each micro-batch take a free slot, fill input(slot) (unless first), run forward(slot,
// …), send output(slot) (unless last), fill output_gradient(slot) (unless last), run backward(slot)
// or backward_input(slot) followed some time later by weight(), send input_gradient(slot) (unless
// first). All four buffers have fixed addresses for the life of the stage; a slot may be used again
// once its backward (and weight part) has run and its sends are complete.
//
// At most one forward and one backward (or backward_input) pass are under way at a time; those two,
// and a weight pass, may be interleaved. The ranks of an expert group run the same passes on the
// same slots in the same order.
//
// Gradients are added to what the parameter set holds, over every micro-batch, until
// zero_gradients().
// Memory is taken when the stage is made and never again.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "comm/base/status.h"
#include "comm/data/expert_exchange.h"
#include "comm/run/expert_seats.h"
#include "comm/run/job_spec.h"
#include "comm/run/layout.h"
#include "comm/run/model_config.h"
#include "worker/model/parameter.h"
#include "worker/model/pass.h"

namespace penstock {

class Kernels;

struct StageOptions {
  ModelConfig model;
  int64_t stage_index = 0;
  int64_t stage_count = 1;
  int64_t expert_count = 1;   // ranks of the expert group
  int64_t expert_index = 0;   // this rank's place in it
  ExpertSeats seats = {};     // which experts have their seats here
  int64_t sequences_max = 1;  // per micro-batch
  int64_t sequence_length_max = 0;
  // Most micro-batches between forward's start and backward's (weight part's) end; kept
  // activations.
  int32_t slot_count = 1;
  // Most micro-batches between backward's start and weight part's end: deepest weight queue + 1.
  // 0: this stage only runs forward_only().
  int32_t gradient_slot_count = 1;
  // Of a last stage with multi-token prediction, which needs the model's embedding: whether another
  // stage of this rank has it; use_embedding_of() then says which. Otherwise the stage holds a
  // copy, and whoever reduces gradients adds up all copies'.
  bool embedding_elsewhere = false;
  // First of the data plane tags for token exchanges, a multiple of ExpertExchange::kTagBaseStep;
  // they go up to tag_base + expert_tag_count(). Equal on all ranks of the expert group, different
  // for its two stages.
  uint64_t tag_base = 0;
  Precision precision = Precision::kFp32;
  Recompute recompute = {};
};

// What the exchange a stage works with must be made from. It is the stage's alone. `group`: the
// ranks of the expert group, in order.
ExpertExchangeConfig expert_exchange_config(const StageOptions& options, std::vector<Rank> group);
uint64_t expert_tag_count(const StageOptions& options);
bool has_moe_layer(const StageOptions& options);

// What a micro-batch brings besides the buffers of its slot. Spans are borrowed until its last pass
// ends.
struct MicroBatch {
  int64_t sequence_count = 0;
  int64_t sequence_length = 0;
  std::span<const int32_t> tokens;  // first stage: [sequence_count · sequence_length], row-major
  std::span<const int32_t>
      targets;  // last stage: the token that follows each; may be empty in forward_only()
  double loss_scale = 1.0;         // gradient of the loss sum: 1 / (tokens of the global batch)
  double prediction_weight = 0.0;  // of the multi-token prediction's loss sum, relative to that
};

// One MoE layer's balance state.
struct Router {
  int64_t layer = 0;      // in the whole model
  std::string bias_name;  // model.layers.N.mlp.gate.e_score_correction_bias
  std::span<float> bias;  // [n_routed_experts]; no gradient, moved by update_router_bias()
  std::span<int64_t>
      load;  // [n_routed_experts]: choices since clear_expert_loads(), this rank's tokens
};

class Stage {
 public:
  // Borrows `kernels` and `exchange`, which must outlive it. `exchange` is made from
  // expert_exchange_config(); null when the stage has no MoE layer. Values are undefined until
  // initialize() or until the caller fills them.
  Stage(const StageOptions& options, Kernels& kernels, ExpertExchange* exchange);
  virtual ~Stage();
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

  const StageOptions& options() const;
  Range layers() const;
  bool is_first() const;
  bool is_last() const;

  ParameterSet& parameters();
  const ParameterSet& parameters() const;
  void initialize(uint64_t seed);  // parameters; router biases to 0
  // Shares the parameter with `first`, which must outlive this; before the first pass. REQUIRES:
  // options().embedding_elsewhere.
  void use_embedding_of(Stage& first);

  // [sequences_max · sequence_length_max · hidden_size] each. input and input_gradient are not for
  // the first stage, output and output_gradient not for the last.
  std::span<float> input(int32_t slot);
  std::span<float> output(int32_t slot);
  std::span<float> output_gradient(int32_t slot);
  std::span<float> input_gradient(int32_t slot);
  // Makes slot s read its input where slot s of `before` leaves its output, and leave its input
  // gradient where that one looks for it: two stages of one rank that follow each other hand over
  // without a copy. Before any pass. REQUIRES: neither is at that end of the model; as many slots.
  void join(Stage& before);

  Pass forward(int32_t slot, const MicroBatch& micro_batch);
  // No activations are kept and no loads counted; the slot is free again once its output has been
  // used.
  Pass forward_only(int32_t slot, const MicroBatch& micro_batch);
  // Input and weight gradients.
  Pass backward(int32_t slot);
  // Input gradients; joins the weight queue.
  Pass backward_input(int32_t slot);
  // The oldest entry of the weight queue. REQUIRES: weight_queue_depth() > 0.
  Pass weight();
  int32_t weight_queue_depth() const;

  // Last stage, after forward: sum over the micro-batch's tokens of the cross-entropy, nats,
  // unscaled.
  double loss_sum(int32_t slot) const;
  // Last stage, after forward: the same of multi-token prediction, unweighted; 0 without it. The
  // last position of every sequence has nothing to predict and adds 0.
  double prediction_loss_sum(int32_t slot) const;
  // After forward: the balance losses of this stage's MoE layers, unscaled, as loss_sum(): over the
  // sum of tokens they give the mean over sequences (balance_loss.h).
  double balance_loss_sum(int32_t slot) const;
  // Last stage, after forward_only: [tokens, vocab_size].
  std::span<const float> logits(int32_t slot) const;

  // By MoE layer, ascending. The loads of all of them lie behind each other in expert_loads().
  std::span<Router> routers();
  std::span<int64_t> expert_loads();
  void clear_expert_loads();
  // b_i += gamma · sign(mean load - load_i), per layer (DeepSeek-V3 report §2.1.2). `loads`: sums
  // over the global batch, laid out as expert_loads().
  void update_router_bias(std::span<const int64_t> loads, double gamma);
  // Largest over the layers of max load / mean load; 0 without MoE layers or tokens.
  static double load_imbalance(std::span<const int64_t> loads, int64_t expert_count);

  // Bytes of activations, scratch, values and gradients.
  uint64_t memory_bytes() const;

 protected:
  // Runs one sub-operation of a pass over `slot`: everything a stage asks of a device and of its
  // expert peers. Virtual so that a measurement can put timed waits in place of the model's compute
  // (tests/support/timed_stage.h). `layer` counts inside the stage, -1 for embedding and output;
  // `gradient_slot` is -1 in a forward.
  virtual Status run_sub_op(SubOp op, int32_t layer, int32_t slot, int32_t gradient_slot);

 private:
  friend class Pass;
  class Impl;
  Pass start_forward(int32_t slot, const MicroBatch& micro_batch, bool training);
  Pass start_backward(int32_t slot, bool weights_too);
  std::unique_ptr<Impl> impl_;
};

}  // namespace penstock
