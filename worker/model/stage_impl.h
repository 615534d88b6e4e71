// Inside of Stage: its buffers and sub-operations. Included by stage*.cc and pass.cc only.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/kernels.h"
#include "worker/model/attention_block.h"
#include "worker/model/expert_block.h"
#include "worker/model/feed_forward_block.h"
#include "worker/model/linear.h"
#include "worker/model/stage.h"

namespace penstock {

struct StageLayer {
  int64_t number = 0;                            // in the whole model
  int32_t moe_index = -1;                        // among the stage's MoE layers; -1: dense
  const Parameter* middle_norm = nullptr;        // post_attention_layernorm
  std::optional<AttentionBlock> attention;       // always there after construction
  std::optional<FeedForwardBlock> feed_forward;  // dense, or shared expert; the same
  std::optional<ExpertBlock> experts;            // MoE layers
  std::vector<int32_t> seat_of;                  // by expert; empty: experts sit in order
};

// Kept by the forward of one layer, of T tokens.
struct LayerActivations {
  AttentionActivations attention;
  float* middle = nullptr;       // [T, hidden] between attention and feed-forward
  float* normed = nullptr;       // [T, hidden] what the feed-forward and the gate read
  float* inverse_rms = nullptr;  // [T]
  float* gate_up = nullptr;      // [T, 2F] of the dense or shared network
  ExpertActivations experts;
};

// Kept by the backward of one layer for its weight gradients.
struct LayerDeltas {
  AttentionDeltas attention;
  float* middle = nullptr;  // [T, hidden] gradient of LayerActivations::middle
  FeedForwardDeltas feed_forward;
  ExpertDeltas experts;
};

// Kept by one run of the head, of T tokens.
struct HeadActivations {
  float* normed = nullptr;       // [T, hidden]
  float* inverse_rms = nullptr;  // [T]
  float* logits = nullptr;       // [T, vocab]; after a training forward their gradient
  float* losses = nullptr;       // [T]
};

// Kept by multi-token prediction besides its block's LayerActivations (stage_prediction.cc).
struct PredictionActivations {
  float* model_output = nullptr;  // [T, hidden]
  float* embedded = nullptr;      // [T, hidden] of the next tokens
  float* embedded_inverse_rms = nullptr;
  float* hidden_inverse_rms = nullptr;
  float* pair = nullptr;       // [T, 2 hidden]: normalised embedding, normalised output
  int32_t* targets = nullptr;  // [T] the tokens after the next; -1: none
  HeadActivations head;
};

struct PredictionParameters {  // null without multi-token prediction
  const Parameter* embedding_norm = nullptr;
  const Parameter* hidden_norm = nullptr;
  const Parameter* projection = nullptr;
  const Parameter* output_norm = nullptr;
};

// Everything of one micro-batch in flight.
struct StageSlot {
  MicroBatch micro_batch;
  TokenShape shape;
  bool training = false;
  double loss_sum = 0.0;
  double balance_sum = 0.0;
  double prediction_loss_sum = 0.0;
  std::vector<float*>
      x;  // [layers + 1] of [T, hidden]: each layer's input, then the stage's output
  std::vector<LayerActivations> layers;
  float* input_gradient = nullptr;   // not in the first stage
  float* output_gradient = nullptr;  // not in the last
  HeadActivations head;              // the last stage only, as the next
  PredictionActivations prediction;
};

// Everything of one backward until its weight part has run.
struct GradientSlot {
  std::vector<float*> x;  // gradient of StageSlot::x; ends that other stages exchange are null
  std::vector<LayerDeltas> layers;
  float* prediction_input = nullptr;  // [T, hidden] gradients of the projection's output and, as
  float* embedded = nullptr;          // the next, of PredictionActivations::embedded
  bool taken = false;
};

// Used inside one sub-operation only; all members share memory.
struct StageScratch {
  AttentionScratch attention;
  ExpertScratch experts;
  float* feed_forward = nullptr;  // [T, F]
  float* hidden = nullptr;        // [T, hidden]
  float* pair = nullptr;          // [T, 2 hidden], beside `hidden`; multi-token prediction only
};

class Stage::Impl {
 public:
  Impl(const StageOptions& options, Kernels& kernels, ExpertExchange* exchange);

  // Runs one sub-operation of a pass over `slot`; `layer` counts inside the stage.
  Status run_forward(SubOp op, int32_t layer, int32_t slot);
  Status run_backward(SubOp op, int32_t layer, int32_t slot, int32_t gradient_slot);

  // With the block of multi-token prediction, which only training passes have.
  int32_t layer_count() const { return static_cast<int32_t>(layers.size()); }
  int32_t layer_count_of_pass(bool training) const {
    return training ? layer_count() : static_cast<int32_t>(layer_range.size());
  }
  std::span<const PassOp> pass_ops(PassKind kind, bool training) const {
    return training ? training_ops[static_cast<size_t>(kind)] : evaluation_ops;
  }
  bool predicts_ahead() const {
    return trains() && is_last() && options.model.num_nextn_predict_layers > 0;
  }
  bool is_prediction(int32_t layer) const { return layer == layer_range.size(); }
  bool is_first() const { return options.stage_index == 0; }
  bool is_last() const { return options.stage_index == options.stage_count - 1; }
  bool trains() const { return options.gradient_slot_count > 0; }
  StageSlot& slot_at(int32_t slot);

  struct QueuedWeight {
    int32_t slot = -1;
    int32_t gradient_slot = -1;
  };

  const StageOptions options;
  const Range layer_range;
  Kernels& kernels;
  ExpertExchange* const exchange;
  Linears linears;
  std::unique_ptr<ParameterSet> parameters;
  const Parameter* embedding = nullptr;   // first stage, and the one that predicts ahead
  const Parameter* final_norm = nullptr;  // last stage, as the next
  const Parameter* head_weight = nullptr;
  PredictionParameters prediction;
  std::vector<StageLayer> layers;
  std::array<std::vector<PassOp>, 4> training_ops;  // by PassKind
  std::vector<PassOp> evaluation_ops;               // of forward_only()
  std::vector<StageSlot> slots;
  std::vector<GradientSlot> gradient_slots;
  std::vector<QueuedWeight> weight_queue;  // oldest first; capacity reserved
  std::vector<Router> routers;             // by MoE layer
  std::vector<float> biases;               // [MoE layers, experts]
  std::vector<int64_t> loads;              // the same
  bool forward_under_way = false;
  bool backward_under_way = false;
  uint64_t buffer_bytes = 0;

 private:
  void make_layers();
  void make_routers();
  void make_recompute_buffers();
  void make_slots();
  void make_shared_buffers();
  StageSlot take_slot(MemoryPlan& plan) const;
  GradientSlot take_gradient_slot(MemoryPlan& plan) const;
  LayerActivations take_layer(MemoryPlan& plan, const StageLayer& layer) const;
  LayerDeltas take_layer_deltas(MemoryPlan& plan, const StageLayer& layer) const;
  HeadActivations take_head(MemoryPlan& plan, int64_t tokens) const;
  PredictionActivations take_prediction(MemoryPlan& plan, int64_t tokens) const;
  void find_prediction_parameters();
  int64_t feed_forward_width(const StageLayer& layer) const;
  Arena& make_arena(const char* name, int64_t bytes);

  // Sub-operations.
  void embed(StageSlot& slot);
  Status attention(int32_t layer, int32_t slot_index);
  void dispatch(int32_t layer, int32_t slot_index);
  Status mlp(int32_t layer, int32_t slot_index);
  void combine(int32_t layer, int32_t slot_index);
  Status output(int32_t slot_index);
  // Final norm `norm` of `x`, logits, and the sum of losses; in training the logits' gradient,
  // which `scale` multiplies, replaces them.
  double head(const StageSlot& slot, const float* x, const Parameter& norm,
              const HeadActivations& kept, const int32_t* targets, double scale);
  // dx from the logits' gradient; kAccumulate: and from that of the normed x in scratch_.hidden.
  void head_backward(const StageSlot& slot, const float* x, const Parameter& norm,
                     const HeadActivations& kept, Store store, float* dx);
  void head_weight_gradient(const StageSlot& slot, const HeadActivations& kept);
  void prediction_input(StageSlot& slot);
  void prediction_output(StageSlot& slot);
  void prediction_input_backward(StageSlot& slot, GradientSlot& gradient);
  void prediction_weight(StageSlot& slot, GradientSlot& gradient);
  void output_backward(StageSlot& slot, GradientSlot& gradient);
  void output_weight(StageSlot& slot);
  void combine_backward(int32_t layer, int32_t slot_index, GradientSlot& gradient);
  Status mlp_backward(int32_t layer, int32_t slot_index, GradientSlot& gradient);
  void dispatch_backward(int32_t layer, int32_t slot_index);
  void mlp_weight(int32_t layer, StageSlot& slot, GradientSlot& gradient);
  Status attention_backward(int32_t layer, int32_t slot_index, GradientSlot& gradient);
  void attention_weight(int32_t layer, StageSlot& slot, GradientSlot& gradient);
  void embed_weight(StageSlot& slot, GradientSlot& gradient);

  // Finishes the combine of `layer` into the next layer's input.
  Status finish_combine(int32_t layer, int32_t slot_index);
  // Gradient of the input of `layer`, or of the stage's output for layer == layer_count().
  float* gradient_of(StageSlot& slot, GradientSlot& gradient, int32_t layer) const;
  // `x` [T, hidden] in the format of dispatched rows: `x` itself, or `payload` when it is rounded.
  const float* dispatched_form(const StageSlot& slot, const float* x, float* payload) const;
  int32_t exchange_slot(int32_t layer, int32_t slot_index) const;
  Tag exchange_tag(int32_t layer, int32_t slot_index) const;
  // LayerActivations::normed in a backward: as it was kept, or computed again.
  const float* normed_again(const StageLayer& layer, const StageSlot& slot,
                            const LayerActivations& kept) const;
  int64_t hidden_floats(const StageSlot& slot) const {
    return slot.shape.tokens() * options.model.hidden_size;
  }

  std::vector<std::unique_ptr<Arena>> arenas_;
  std::vector<float> cosine_;
  std::vector<float> sine_;
  StageScratch scratch_;
  // Shared by all layers and slots; null where these are kept (Recompute).
  AttentionRecomputed attention_recomputed_;
  float* forward_normed_ = nullptr;   // [T, hidden] of the forward pass under way
  float* backward_normed_ = nullptr;  // [T, hidden] inside one sub-operation
  // Of the forward pass under way.
  float* partial_rows_ = nullptr;  // [R, hidden] this rank's share of its peers' outputs
  float* payload_ = nullptr;       // [T, hidden] tokens as dispatched; fp8 only
  // Of the backward pass under way.
  float* normed_gradient_ = nullptr;   // [T, hidden] gradient of LayerActivations::normed
  float* row_gradients_ = nullptr;     // [R, hidden] of dispatched rows
  float* weight_gradients_ = nullptr;  // [A] of gate weights, on the experts' side
  float* gate_gradients_ = nullptr;    // [T, k] the same, back on the tokens' side
  float* gradient_payload_ = nullptr;  // [T, hidden] gradients as dispatched; fp8 only
};

}  // namespace penstock
