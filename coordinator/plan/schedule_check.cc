// check_programs(): one rank at a time first (what each rank computes, and that every value is
// received before and sent after), then all together (that channels match and nobody waits in a
// circle).
#include <algorithm>
#include <deque>
#include <string>

#include "comm/run/layout.h"
#include "coordinator/plan/schedule.h"
#include "coordinator/plan/virtual_time.h"

namespace penstock {
namespace {

Status violation(int32_t rank, size_t position, const Instruction& instruction,
                 std::string_view rule) {
  return invalid_argument(fmt::format("program of pipeline rank {}, instruction {} ({}): {}", rank,
                                      position, to_string(instruction), rule));
}

// Counters of one direction on one rank. Micro-batches pass every point strictly in order, so a
// count says it all: the micro-batch allowed next at a point is the number that passed it.
struct Flow {
  Neighbours neighbours;
  int32_t forward_received = 0;
  int32_t forward_done = 0;
  int32_t forward_sent = 0;
  int32_t backward_received = 0;
  int32_t backward_done = 0;
  int32_t backward_sent = 0;
};

class RankChecker {
 public:
  RankChecker(const ParallelismSpec& parallelism, int32_t rank, bool training)
      : rank_(rank),
        training_(training),
        microbatch_count_(static_cast<int32_t>(microbatches_per_direction(parallelism))) {
    for (int64_t d = 0; d < direction_count(parallelism); ++d) {
      flows_.push_back({.neighbours = pipeline_neighbours(parallelism, rank, d)});
    }
  }

  Status check(const std::vector<Instruction>& instructions) {
    for (size_t i = 0; i < instructions.size(); ++i) {
      if (const char* rule = broken_rule(instructions[i])) {
        return violation(rank_, i, instructions[i], rule);
      }
    }
    return check_end();
  }

 private:
  // The rule that `i` breaks where it stands, or null.
  const char* broken_rule(const Instruction& i) {
    if (reduced_ && i.op != Op::kOptimizerStep)
      return "nothing but the optimizer follows the reduction";
    if (i.direction >= flows_.size() || i.backward_direction >= flows_.size())
      return "no such direction";
    if (sets_more_than_it_needs(i)) return "it sets a field that means nothing to it";
    Flow& flow = flows_[i.direction];
    const auto [previous, next] = flow.neighbours;
    switch (i.op) {
      case Op::kReceiveForward:
        return transfer(i, previous, flow.forward_received, INT32_MAX);
      case Op::kForward:
        return forward(i.direction, i.microbatch);
      case Op::kSendForward:
        return transfer(i, next, flow.forward_sent, flow.forward_done);
      case Op::kReceiveBackward:
        return training_ ? transfer(i, next, flow.backward_received, flow.forward_sent)
                         : kNoGradients;
      case Op::kBackward:
        return full_backward(i.direction, i.microbatch);
      case Op::kBackwardInput:
        weight_queue_.push_back(i.direction);
        return backward(i.direction, i.microbatch);
      case Op::kBackwardWeight:
        if (weight_queue_.empty()) return "no weight part is queued";
        weight_queue_.pop_front();
        return nullptr;
      case Op::kSendBackward:
        return training_ ? transfer(i, previous, flow.backward_sent, flow.backward_done)
                         : kNoGradients;
      case Op::kOverlapped: {
        if (i.backward_direction == i.direction) return "both halves of a pair have one direction";
        const char* rule = forward(i.direction, i.microbatch);
        return rule ? rule : full_backward(i.backward_direction, i.backward_microbatch);
      }
      case Op::kReduceGradients:
        reduced_ = true;
        return nullptr;
      case Op::kOptimizerStep:
        if (!training_) return kNoGradients;
        if (!reduced_ || stepped_) return "the optimizer runs once, after the reduction";
        stepped_ = true;
        return nullptr;
    }
    return "unknown instruction";
  }

  // What equals program text must mean: an unused field has its default.
  static bool sets_more_than_it_needs(const Instruction& i) {
    const bool queue_or_step =
        i.op == Op::kBackwardWeight || i.op == Op::kReduceGradients || i.op == Op::kOptimizerStep;
    const bool moves = i.op == Op::kReceiveForward || i.op == Op::kSendForward ||
                       i.op == Op::kReceiveBackward || i.op == Op::kSendBackward;
    return (queue_or_step && (i.direction != 0 || i.microbatch != -1)) ||
           (!moves && i.peer != -1) ||
           (i.op != Op::kOverlapped && (i.backward_direction != 0 || i.backward_microbatch != -1));
  }

  bool is_local(int32_t neighbour) const { return neighbour == rank_; }

  // A send or receive of the next micro-batch of its channel; `available` values exist so far.
  const char* transfer(const Instruction& i, int32_t peer, int32_t& count, int32_t available) {
    if (peer < 0 || is_local(peer) || i.peer != peer) return "wrong peer";
    if (i.microbatch != count) return "micro-batches of a channel go in order, each once";
    if (count >= available) return "the value does not exist yet";
    if (count >= microbatch_count_) return "more micro-batches than the step has";
    ++count;
    return nullptr;
  }
  const char* forward(uint8_t direction, int32_t microbatch) {
    Flow& flow = flows_[direction];
    const auto [previous, next] = flow.neighbours;
    if (microbatch != flow.forward_done) return "forwards of a direction go in order, each once";
    if (microbatch >= microbatch_count_) return "more micro-batches than the step has";
    if (is_local(previous) && flows_[0].forward_done <= microbatch)
      return "its input, the other leg's output, does not exist yet";
    if (is_local(next) && flows_[1].forward_done < microbatch)
      return "the output handed over before was not used yet";
    if (previous >= 0 && !is_local(previous) && flow.forward_received <= microbatch)
      return "its input was not received";
    ++flow.forward_done;
    return nullptr;
  }
  const char* full_backward(uint8_t direction, int32_t microbatch) {
    if (std::count(weight_queue_.begin(), weight_queue_.end(), direction) > 0)
      return "an earlier weight part of its direction is still queued";
    return backward(direction, microbatch);
  }
  const char* backward(uint8_t direction, int32_t microbatch) {
    if (!training_) return kNoGradients;
    Flow& flow = flows_[direction];
    const auto [previous, next] = flow.neighbours;
    if (microbatch != flow.backward_done) return "backwards of a direction go in order, each once";
    if (microbatch >= flow.forward_done) return "its forward did not run";
    if (is_local(next) && flows_[1].backward_done <= microbatch)
      return "its gradient, from the other leg, does not exist yet";
    if (is_local(previous) && flows_[0].backward_done < microbatch)
      return "the gradient handed over before was not used yet";
    if (next >= 0 && !is_local(next) && flow.backward_received <= microbatch)
      return "its gradient was not received";
    ++flow.backward_done;
    return nullptr;
  }

  Status check_end() const {
    const auto incomplete = [&](std::string_view what) {
      return invalid_argument(fmt::format("program of pipeline rank {}: {}", rank_, what));
    };
    if (!reduced_ || stepped_ != training_)
      return incomplete("it does not end with reduction and optimizer");
    if (!weight_queue_.empty()) return incomplete("a queued weight part never runs");
    for (const Flow& flow : flows_) {
      const int32_t backward_count = training_ ? microbatch_count_ : 0;
      if (flow.forward_done != microbatch_count_) return incomplete("a forward is missing");
      if (flow.backward_done != backward_count) return incomplete("a backward is missing");
      const auto over = [&](int32_t neighbour, int32_t count) {
        return neighbour >= 0 && !is_local(neighbour) ? count : 0;
      };
      const auto [previous, next] = flow.neighbours;
      const bool received = flow.forward_received == over(previous, microbatch_count_) &&
                            flow.backward_received == over(next, backward_count);
      const bool sent = flow.forward_sent == over(next, microbatch_count_) &&
                        flow.backward_sent == over(previous, backward_count);
      if (!received || !sent) return incomplete("a send or receive is missing");
    }
    return {};
  }

  static constexpr const char* kNoGradients = "an evaluation has no gradients";
  const int32_t rank_;
  const bool training_;
  const int32_t microbatch_count_;
  std::vector<Flow> flows_;           // by direction
  std::deque<uint8_t> weight_queue_;  // directions of queued weight parts, oldest first
  bool reduced_ = false;
  bool stepped_ = false;
};

}  // namespace

Status check_programs(const ParallelismSpec& parallelism, const std::vector<Program>& programs) {
  if (static_cast<int64_t>(programs.size()) != parallelism.pipeline) {
    return invalid_argument(fmt::format("{} programs for a pipeline of {} ranks", programs.size(),
                                        parallelism.pipeline));
  }
  for (size_t r = 0; r < programs.size(); ++r) {
    const auto rank = static_cast<int32_t>(r);
    if (programs[r].pipeline_index != rank) {
      return invalid_argument(
          fmt::format("program {} is of pipeline rank {}", r, programs[r].pipeline_index));
    }
    PENSTOCK_TRY(RankChecker(parallelism, rank, true).check(programs[r].training));
    PENSTOCK_TRY(RankChecker(parallelism, rank, false)
                     .check(programs[r].evaluation)
                     .with_context("evaluation"));
  }
  for (const ProgramKind kind : {ProgramKind::kTraining, ProgramKind::kEvaluation}) {
    PENSTOCK_TRY(run_in_virtual_time(parallelism, programs, kind, {}).status());
  }
  return {};
}

}  // namespace penstock
