// The steps of an engine: instructions, reductions, optimizer.
#include <algorithm>
#include <cmath>

#include "comm/base/check.h"
#include "comm/base/clock.h"
#include "comm/run/interleave.h"
#include "worker/engine/engine.h"
#include "worker/optim/lr_schedule.h"

namespace penstock {
namespace {

// Places in the vector of totals that all ranks add up.
enum Sum : size_t {
  kLossSum,
  kTokenSum,
  kSquareSum,
  kPredictionSum,
  kBalanceSum,
  kSaveSum,
  kStageImbalance
};

// By ParameterKind.
constexpr std::array kReduceChannels = {Channel::kReduceDense, Channel::kReduceExperts,
                                        Channel::kReduceShared};
constexpr std::array kGatherChannels = {Channel::kGatherDense, Channel::kGatherExperts,
                                        Channel::kGatherShared};
constexpr std::array kReduceCollectives = {Collective::kReduceDense, Collective::kReduceExperts,
                                           Collective::kReduceShared};
constexpr std::array kGatherCollectives = {Collective::kGatherDense, Collective::kGatherExperts,
                                           Collective::kGatherShared};
// What the ends of the pipeline share is of no one stage.
Tag tag_of(const std::array<Channel, kParameterKindCount>& channels, ParameterKind kind,
           int64_t stage) {
  return tag_of(channels[static_cast<size_t>(kind)], kind == ParameterKind::kShared ? 0 : stage);
}

// Of the moving average of expert loads: what an older step counts relative to the next one. Fifty
// steps' worth, long enough that the batches even out.
constexpr double kLoadDecay = 0.98;

double seconds(int64_t nanoseconds) {
  return static_cast<double>(nanoseconds) * 1e-9;
}

// What gradients are multiplied by while they pass through FP8 layers: a power of two, so that
// taking it out again changes no bit. It undoes the division by the tokens of a step, which would
// push them below the smallest scale that a tile can have (1e-4 / 448).
double magnification(Precision precision, int64_t step_tokens) {
  if (precision == Precision::kFp32) return 1.0;
  return std::exp2(std::ceil(std::log2(static_cast<double>(step_tokens))));
}

int64_t waited(const std::unique_ptr<MeasuredTransport>& transport) {
  return transport ? transport->waited_ns() : 0;
}

}  // namespace

Result<StepResult> Engine::train_step(int64_t step, bool ask_to_save) {
  ask_to_save_ = ask_to_save;
  PENSTOCK_CHECK(step == state_->step() + 1, step, state_->step());
  const int64_t begin = monotonic_ns();
  for (const std::unique_ptr<Stage>& stage : stages_) {
    stage->parameters().zero_gradients();
    stage->clear_expert_loads();
  }
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
      .save = sums_[kSaveSum] > 0.0};
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
  totals_ = {};
  weight_queue_.clear();
  weight_queue_head_ = 0;
  const int64_t pipeline_waited = waited(pipeline_transport_);
  for (const std::unique_ptr<Lane>& lane : lanes_) {
    lane->begin(training, microbatches_per_direction(plan.parallelism));
  }
  for (const Instruction& instruction : training ? *plan.training : program_.evaluation) {
    if (instruction.op == Op::kReduceGradients) {  // everything of the pipeline is over
      for (const std::unique_ptr<Lane>& lane : lanes_) PENSTOCK_TRY(lane->drain());
    }
    PENSTOCK_TRY(execute_one(instruction));
  }
  times_.pipeline_wait_seconds = seconds(waited(pipeline_transport_) - pipeline_waited);
  return {};
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

// Runs `call`, which returns Status, and writes it down unless it had nobody to talk to.
template <typename Call>
Status Engine::collective(Collective what, int64_t stage, const Call& call) {
  const int64_t begin = monotonic_ns();
  flight().begin({.begin_ns = begin,
                  .layer = static_cast<int16_t>(stage),
                  .kind = TraceKind::kCollective,
                  .what = static_cast<uint8_t>(what)});
  PENSTOCK_TRY(call());
  if (!reduce_transport_) return {};
  const TransportActivity activity = reduce_transport_->take_activity();
  if (activity.post_count == 0) return {};
  recorder_.add({.begin_ns = begin,
                 .end_ns = monotonic_ns(),
                 .wait_begin_ns = activity.wait_begin_ns,
                 .wait_end_ns = activity.wait_end_ns,
                 .bytes = activity.sent_bytes,
                 .layer = static_cast<int16_t>(stage),
                 .kind = TraceKind::kCollective,
                 .what = static_cast<uint8_t>(what)});
  return {};
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
                   .loss_scale = magnification(spec_.training.precision, plan_->tokens) /
                                 static_cast<double>(plan_->tokens),
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

Status Engine::reduce_gradients() {
  const int64_t begin = monotonic_ns();
  std::fill(sums_.begin(), sums_.end(), 0.0);
  // Before any rank can get past the sums of this step, and so write over the state before the
  // last, every rank's state of the last step is whole.
  settle();
  if (training_) {
    for (const size_t d : layout_.by_stage) {
      PENSTOCK_TRY(reduce_stage(layout_.stages[d], *stages_[d]));
    }
    sums_[kSquareSum] = optimizer_->gradient_square_sum();
  }
  PENSTOCK_TRY(reduce_totals());
  const int64_t end = monotonic_ns();
  record_span(Op::kReduceGradients, begin, end);
  times_.reduce_seconds += seconds(end - begin);
  return {};
}

// Gradients: each replica ends with the sum of its own shard. Loads: everyone with all of them.
Status Engine::reduce_stage(const LocalStage& local, Stage& stage) {
  ParameterSet& parameters = stage.parameters();
  const auto unmagnify =
      static_cast<float>(1.0 / magnification(spec_.training.precision, plan_->tokens));
  for (const ParameterKind kind : kParameterKinds) {
    const std::span<float> gradients = parameters.gradients(kind);
    if (gradients.empty()) continue;
    if (unmagnify != 1.0F) kernels_.scale(std::ssize(gradients), unmagnify, gradients.data());
    PENSTOCK_TRY(collective(kReduceCollectives[static_cast<size_t>(kind)], local.stage, [&] {
      return reducer_->reduce_scatter_sum(local.replicas_of(kind),
                                          tag_of(kReduceChannels, kind, local.stage), gradients);
    }));
  }
  const std::span<int64_t> counted = stage.expert_loads();
  if (counted.empty()) return {};
  std::vector<double>& load_sums = load_sums_[local.direction];
  std::vector<int64_t>& loads = loads_[local.direction];
  std::copy(counted.begin(), counted.end(), load_sums.begin());
  PENSTOCK_TRY(collective(Collective::kReduceLoads, local.stage, [&] {
    return reducer_->all_reduce_sum(local.dense_replicas,
                                    tag_of(Channel::kReduceLoads, local.stage), load_sums);
  }));
  std::transform(load_sums.begin(), load_sums.end(), loads.begin(),
                 [](double load) { return static_cast<int64_t>(load); });  // exact below 2^53
  if (local.dense_replicas.front() == layout_.rank) {
    sums_[kStageImbalance + static_cast<size_t>(local.stage)] =
        Stage::load_imbalance(loads, spec_.model.n_routed_experts);
  }
  return {};
}

Status Engine::reduce_totals() {
  sums_[kLossSum] = totals_.loss;
  sums_[kTokenSum] = totals_.tokens;
  sums_[kPredictionSum] = totals_.prediction_loss;
  sums_[kBalanceSum] = totals_.balance_loss;
  sums_[kSaveSum] = training_ && ask_to_save_ ? 1.0 : 0.0;
  PENSTOCK_TRY(collective(Collective::kReduceTotals, -1, [&] {
    return reducer_->all_reduce_sum(layout_.world, tag_of(Channel::kReduceTotals), sums_);
  }));
  diverged_ = false;
  if (!training_) return {};
  return judge(sums_[kLossSum] / sums_[kTokenSum], std::sqrt(sums_[kSquareSum]));
}

Status Engine::optimizer_step() {
  const int64_t begin = monotonic_ns();
  flight().begin({.begin_ns = begin,
                  .kind = TraceKind::kInstruction,
                  .what = static_cast<uint8_t>(Op::kOptimizerStep)});
  const double rate = learning_rate_at(spec_.optimizer, spec_.training.steps, step_);
  state_->begin_step();
  const std::byte* const previous = state_->current();
  optimizer_->step(step_, rate, optimizer_->clip_factor(std::sqrt(sums_[kSquareSum])), previous,
                   state_->next());
  const int64_t updated = monotonic_ns();
  record_span(Op::kOptimizerStep, begin, updated);
  times_.optimizer_seconds += seconds(updated - begin);
  PENSTOCK_TRY(gather_weights());
  const double speed =
      value_at(spec_.optimizer.bias_update_levels, spec_.optimizer.bias_update_speed, step_);
  recent_weight_ = kLoadDecay * recent_weight_ + 1.0;
  for (const size_t d : layout_.by_stage) {
    stages_[d]->update_router_bias(loads_[d], speed);
    for (size_t i = 0; i < loads_[d].size(); ++i) {
      recent_loads_[d][i] = kLoadDecay * recent_loads_[d][i] + static_cast<double>(loads_[d][i]);
    }
  }
  state_->finish_step(step_);
  if (average_) {
    average_->start(previous, state_->current());
  } else {
    state_->publish();
  }
  const int64_t end = monotonic_ns();
  record_span(Op::kReduceGradients, updated, end);
  times_.reduce_seconds += seconds(end - updated);
  return {};
}

// Each replica has updated its own shard of every buffer.
Status Engine::gather_weights() {
  for (const size_t d : layout_.by_stage) {
    const LocalStage& local = layout_.stages[d];
    ParameterSet& parameters = stages_[d]->parameters();
    for (const ParameterKind kind : kParameterKinds) {
      if (parameters.values(kind).empty()) continue;
      PENSTOCK_TRY(collective(kGatherCollectives[static_cast<size_t>(kind)], local.stage, [&] {
        return reducer_->all_gather(local.replicas_of(kind),
                                    tag_of(kGatherChannels, kind, local.stage),
                                    parameters.values(kind));
      }));
    }
  }
  return {};
}

}  // namespace penstock
