// The steps of an engine: instructions.
#include <algorithm>
#include <cmath>

#include "comm/base/check.h"
#include "comm/base/clock.h"
#include "comm/run/interleave.h"
#include "worker/engine/engine.h"
#include "worker/optim/lr_schedule.h"

namespace penstock {
namespace {

double seconds(int64_t nanoseconds) {
  return to_seconds(Duration(nanoseconds));
}

int64_t waited(const std::unique_ptr<MeasuredTransport>& transport) {
  return transport ? transport->waited_ns() : 0;
}

}  // namespace

Result<StepResult> Engine::train_step(int64_t step, StepWishes wishes) {
  wishes_ = wishes;
  PENSTOCK_CHECK(step == state_->step() + 1, step, state_->step());
  const int64_t begin = monotonic_ns();
  clear_sums();
  PENSTOCK_TRY(execute(plan_of(step), true, step));
  StepResult result{
      .step = step,
      .loss = sums_[kLossSum] / sums_[kTokenSum],
      .prediction_loss = sums_[kPredictionSum] / sums_[kTokenSum],
      .balance_loss = sums_[kBalanceSum] / sums_[kTokenSum],
      .grad_norm = std::sqrt(sums_[kSquareSum]),
      .learning_rate = learning_rate_at(spec_.optimizer, spec_.training.steps, step),
      .tokens = finding_.action == GuardPolicy::kSkip ? 0 : static_cast<int64_t>(sums_[kTokenSum]),
      .guard = finding_,
      .save = sums_[kSaveSum] > 0.0,
      .pause = sums_[kPauseSum] > 0.0};
  for (size_t i = kStageImbalance; i < sums_.size(); ++i) {
    result.expert_load_max_ratio = std::max(result.expert_load_max_ratio, sums_[i]);
  }
  const int64_t end = monotonic_ns();
  recorder_.add({.begin_ns = begin, .end_ns = end, .kind = TraceKind::kStep});
  times_.total_seconds = seconds(end - begin);
  result.times = times_;
  return result;
}

Result<EvaluationResult> Engine::evaluate() {
  PENSTOCK_CHECK(validation_data_ != nullptr);
  if (!spec_.optimizer.ema_evaluation) return evaluate_weights();
  // Every rank puts what it owns, and then has the others' as well.
  settle();
  average_->put_in_place_of_weights(state_->current());
  PENSTOCK_TRY(gather_weights());
  PENSTOCK_TRY_ASSIGN(const EvaluationResult result, evaluate_weights());
  state_->put_back_weights();
  PENSTOCK_TRY(gather_weights());
  return result;
}

Result<EvaluationResult> Engine::evaluate_weights() {
  double loss = 0.0;
  double tokens = 0.0;
  for (int64_t batch = 1; batch <= spec_.training.evaluation_batches; ++batch) {
    PENSTOCK_TRY(execute(plans_.front(), false, batch));
    loss += sums_[kLossSum];
    tokens += sums_[kTokenSum];
  }
  diverged_ = !std::isfinite(loss);
  if (diverged_) {
    return internal_error(fmt::format("step {}: held-out loss {}; lower the learning rate",
                                      state_->step(), loss / tokens));
  }
  return EvaluationResult{loss / tokens, static_cast<int64_t>(tokens)};
}

const Engine::StepPlan& Engine::plan_of(int64_t step) const {
  const int64_t microbatches = spec_.microbatches_at(step);
  const auto plan = std::find_if(plans_.begin(), plans_.end(), [&](const StepPlan& candidate) {
    return candidate.parallelism.microbatches == microbatches;
  });
  PENSTOCK_CHECK(plan != plans_.end(), microbatches);  // check_sizes() saw to it
  return *plan;
}

Status Engine::execute(const StepPlan& plan, bool training, int64_t step) {
  training_ = training;
  plan_ = &plan;
  step_ = step;
  recorder_.begin_step(training ? step : 0);
  if (training) flight().begin_phase(FlightPhase::kTraining, step);
  times_ = {};
  const int64_t pipeline_waited = waited(pipeline_transport_);
  const std::vector<Instruction>& all = training ? *plan.training : program_.evaluation;
  const auto reduction = std::find_if(
      all.begin(), all.end(), [](const Instruction& i) { return i.op == Op::kReduceGradients; });
  const std::span<const Instruction> pass(all.begin(), reduction);
  PENSTOCK_TRY(duplicates(step) ? compute_twice(pass) : run_pass(pass));
  for (auto rest = reduction; rest != all.end(); ++rest) PENSTOCK_TRY(execute_one(*rest));
  times_.pipeline_wait_seconds = seconds(waited(pipeline_transport_) - pipeline_waited);
  return {};
}

// Everything of a step but what its sums and its optimizer do.
Status Engine::run_pass(std::span<const Instruction> instructions) {
  totals_ = {};
  weight_queue_.clear();
  weight_queue_head_ = 0;
  for (const std::unique_ptr<Lane>& lane : lanes_) {
    lane->begin(training_, microbatches_per_direction(plan_->parallelism));
  }
  for (const Instruction& instruction : instructions) PENSTOCK_TRY(execute_one(instruction));
  for (const std::unique_ptr<Lane>& lane : lanes_) PENSTOCK_TRY(lane->drain());
  return {};
}

void Engine::clear_sums() {
  for (const std::unique_ptr<Stage>& stage : stages_) {
    stage->parameters().zero_gradients();
    stage->clear_expert_loads();
  }
}

Status Engine::execute_one(const Instruction& i) {
  Lane& lane = *lanes_[i.direction];
  switch (i.op) {
    case Op::kReceiveForward:
      return {};  // posted long ago; begin_forward() waits for it
    case Op::kForward:
      return forward(i);
    case Op::kSendForward:
      lane.send_forward(i.microbatch);
      return {};
    case Op::kReceiveBackward:
      return lane.receive_gradient(i.microbatch);
    case Op::kBackward:
      return backward(i);
    case Op::kBackwardInput:
      return backward_input(i);
    case Op::kBackwardWeight:
      return backward_weight(i);
    case Op::kSendBackward:
      lane.send_gradient(i.microbatch);
      return {};
    case Op::kOverlapped:
      return overlapped(i);
    case Op::kReduceGradients:
      return reduce_gradients();
    case Op::kOptimizerStep:
      if (finding_.action != GuardPolicy::kSkip) return optimizer_step();
      state_->repeat_step(step_);
      return {};
  }
  return internal_error("unknown instruction");
}

// Runs `work`, which returns Status, and books its time as compute but for what it waited for
// expert peers.
template <typename Work>
Status Engine::compute(const Instruction& i, const Work& work) {
  const int64_t begin = monotonic_ns();
  const int64_t waited_before = waited(expert_transport_);
  PENSTOCK_TRY(work());
  const int64_t end = monotonic_ns();
  const int64_t waiting = waited(expert_transport_) - waited_before;
  times_.expert_wait_seconds += seconds(waiting);
  times_.compute_seconds += seconds(end - begin - waiting);
  recorder_.add({.begin_ns = begin,
                 .end_ns = end,
                 .microbatch = i.microbatch,
                 .kind = TraceKind::kInstruction,
                 .what = static_cast<uint8_t>(i.op),
                 .direction = i.direction});
  return {};
}

RecordedPass Engine::recorded(Pass pass, uint8_t direction, int32_t microbatch) {
  return {pass, direction, microbatch, recorder_, expert_transport_.get()};
}

void Engine::record_span(Op op, int64_t begin_ns, int64_t end_ns) {
  recorder_.add({.begin_ns = begin_ns,
                 .end_ns = end_ns,
                 .kind = TraceKind::kInstruction,
                 .what = static_cast<uint8_t>(op)});
}

// Tokens and targets of a micro-batch, read into the slot's place; empty where this stage needs
// none.
Result<MicroBatch> Engine::micro_batch(uint8_t direction, int32_t microbatch, int32_t slot) {
  const int64_t length = spec_.data.seq_length;
  Feed& feed = feeds_[direction];
  MicroBatch batch{.sequence_count = spec_.parallelism.micro_batch_size,
                   .sequence_length = length,
                   .tokens = {},
                   .targets = {},
                   .loss_scale = plan_->magnification / static_cast<double>(plan_->tokens),
                   .prediction_weight = value_at(spec_.optimizer.mtp_loss_levels,
                                                 spec_.optimizer.mtp_loss_weight, step_)};
  if (feed.tokens.empty() && feed.targets.empty()) return batch;
  flight().begin({.begin_ns = monotonic_ns(),  // reading may take long
                  .microbatch = microbatch,
                  .kind = TraceKind::kInstruction,
                  .what = static_cast<uint8_t>(Op::kForward),
                  .direction = direction});
  const size_t offset = static_cast<size_t>(slot * microbatch_tokens_);
  const auto count = static_cast<size_t>(microbatch_tokens_);
  const std::span<int32_t> tokens =
      feed.tokens.empty() ? std::span<int32_t>() : std::span(feed.tokens).subspan(offset, count);
  const std::span<int32_t> targets =
      feed.targets.empty() ? std::span<int32_t>() : std::span(feed.targets).subspan(offset, count);
  const Sampler& data = training_ ? training_data_ : *validation_data_;
  const int64_t index_in_step = microbatch_index(plan_->parallelism, direction, microbatch);
  for (int64_t i = 0; i < batch.sequence_count; ++i) {
    const int64_t index = sequence_index(plan_->parallelism, layout_.replica, index_in_step, i);
    PENSTOCK_TRY(data.sequence(step_, index, sequence_));
    const auto row = static_cast<size_t>(i * length);
    if (!tokens.empty()) std::copy_n(sequence_.begin(), length, tokens.begin() + row);
    if (!targets.empty()) std::copy_n(sequence_.begin() + 1, length, targets.begin() + row);
  }
  batch.tokens = tokens;
  batch.targets = targets;
  return batch;
}

Result<Pass> Engine::begin_forward(uint8_t direction, int32_t microbatch, int32_t* slot) {
  PENSTOCK_TRY_ASSIGN(*slot, lanes_[direction]->begin_forward(microbatch));
  PENSTOCK_TRY_ASSIGN(const MicroBatch batch, micro_batch(direction, microbatch, *slot));
  Stage& stage = *stages_[direction];
  return training_ ? stage.forward(*slot, batch) : stage.forward_only(*slot, batch);
}

void Engine::end_forward(uint8_t direction, int32_t microbatch, int32_t slot) {
  if (stages_[direction]->is_last()) {
    totals_.loss += stages_[direction]->loss_sum(slot);
    totals_.prediction_loss += stages_[direction]->prediction_loss_sum(slot);
    totals_.tokens += static_cast<double>(microbatch_tokens_);
  }
  totals_.balance_loss += stages_[direction]->balance_loss_sum(slot);
  lanes_[direction]->end_forward(microbatch);
}

namespace {

// A pass that hands over what the neighbouring stage waits for as soon as it is final: the weight
// parts that may be left have the send beside them.
template <typename HandOver>
class HandingPass {
 public:
  HandingPass(RecordedPass& pass, HandOver hand_over) : pass_(pass), hand_over_(hand_over) {}

  bool finished() const { return pass_.finished(); }
  SubOp next() const { return pass_.next(); }
  Status run_next() {
    PENSTOCK_TRY(pass_.run_next());
    if (!handed_over_ && pass_.result_final()) {
      handed_over_ = true;
      hand_over_();
    }
    return {};
  }
  Status run() {
    while (!finished()) PENSTOCK_TRY(run_next());
    return {};
  }

 private:
  RecordedPass& pass_;
  const HandOver hand_over_;
  bool handed_over_ = false;
};

}  // namespace

Status Engine::forward(const Instruction& i) {
  int32_t slot = -1;
  PENSTOCK_TRY_ASSIGN(const Pass begun, begin_forward(i.direction, i.microbatch, &slot));
  RecordedPass pass = recorded(begun, i.direction, i.microbatch);
  PENSTOCK_TRY(compute(i, [&] { return pass.run(); }));
  end_forward(i.direction, i.microbatch, slot);
  return {};
}

Status Engine::backward(const Instruction& i) {
  Lane& lane = *lanes_[i.direction];
  RecordedPass recorded_pass =
      recorded(stages_[i.direction]->backward(lane.slot(i.microbatch)), i.direction, i.microbatch);
  HandingPass pass(recorded_pass, [&] { lane.gradient_final(i.microbatch); });
  PENSTOCK_TRY(compute(i, [&] { return pass.run(); }));
  lane.end_weight(i.microbatch);
  return {};
}

Status Engine::backward_input(const Instruction& i) {
  Lane& lane = *lanes_[i.direction];
  RecordedPass pass = recorded(stages_[i.direction]->backward_input(lane.slot(i.microbatch)),
                               i.direction, i.microbatch);
  PENSTOCK_TRY(compute(i, [&] { return pass.run(); }));
  weight_queue_.push_back({i.direction, i.microbatch});
  return {};
}

Status Engine::backward_weight(const Instruction& i) {
  PENSTOCK_CHECK(weight_queue_head_ < weight_queue_.size());
  const PendingWeight oldest = weight_queue_[weight_queue_head_++];
  RecordedPass pass =
      recorded(stages_[oldest.direction]->weight(), oldest.direction, oldest.microbatch);
  PENSTOCK_TRY(compute(i, [&] { return pass.run(); }));
  lanes_[oldest.direction]->end_weight(oldest.microbatch);
  return {};
}

Status Engine::overlapped(const Instruction& i) {
  int32_t slot = -1;
  PENSTOCK_TRY_ASSIGN(const Pass begun, begin_forward(i.direction, i.microbatch, &slot));
  RecordedPass recorded_forward = recorded(begun, i.direction, i.microbatch);
  HandingPass forward(recorded_forward, [&] { lanes_[i.direction]->output_final(i.microbatch); });
  Lane& lane = *lanes_[i.backward_direction];
  RecordedPass recorded_backward =
      recorded(stages_[i.backward_direction]->backward(lane.slot(i.backward_microbatch)),
               i.backward_direction, i.backward_microbatch);
  HandingPass backward(recorded_backward, [&] { lane.gradient_final(i.backward_microbatch); });
  PENSTOCK_TRY(compute(i, [&] { return run_overlapped(forward, backward); }));
  end_forward(i.direction, i.microbatch, slot);
  lane.end_weight(i.backward_microbatch);
  return {};
}

}  // namespace penstock
