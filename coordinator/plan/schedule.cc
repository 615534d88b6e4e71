#include "coordinator/plan/schedule.h"

#include <algorithm>
#include <array>
#include <set>
#include <string>

#include "comm/base/check.h"
#include "comm/run/layout.h"

namespace penstock {
namespace {

// Appends operations with their receives and sends; numbers micro-batches per direction as they
// come.
class ProgramBuilder {
 public:
  ProgramBuilder(const ParallelismSpec& parallelism, int32_t rank)
      : rank_(rank), microbatch_count_(microbatches_per_direction(parallelism)) {
    for (int64_t d = 0; d < direction_count(parallelism); ++d) {
      neighbours_.push_back(pipeline_neighbours(parallelism, rank, d));
    }
  }

  void forward(uint8_t direction) {
    const int32_t microbatch = forward_count_[direction]++;
    receive_forward(direction, microbatch);
    add({.op = Op::kForward, .direction = direction, .microbatch = microbatch});
    send_forward(direction, microbatch);
  }
  void backward(uint8_t direction) { backward(Op::kBackward, direction); }
  void backward_input(uint8_t direction) { backward(Op::kBackwardInput, direction); }
  void backward_weight() { add({.op = Op::kBackwardWeight}); }
  void overlapped(uint8_t forward_direction, uint8_t backward_direction) {
    const int32_t forward_microbatch = forward_count_[forward_direction]++;
    const int32_t backward_microbatch = backward_count_[backward_direction]++;
    receive_forward(forward_direction, forward_microbatch);
    receive_backward(backward_direction, backward_microbatch);
    add({.op = Op::kOverlapped,
         .direction = forward_direction,
         .microbatch = forward_microbatch,
         .backward_direction = backward_direction,
         .backward_microbatch = backward_microbatch});
    send_forward(forward_direction, forward_microbatch);
    send_backward(backward_direction, backward_microbatch);
  }
  std::vector<Instruction> finish() {
    for (size_t d = 0; d < neighbours_.size(); ++d) {
      PENSTOCK_CHECK(forward_count_[d] == microbatch_count_, d, forward_count_[d]);
      PENSTOCK_CHECK(backward_count_[d] == microbatch_count_, d, backward_count_[d]);
    }
    add({.op = Op::kReduceGradients});
    add({.op = Op::kOptimizerStep});
    return std::move(instructions_);
  }

 private:
  void add(Instruction instruction) { instructions_.push_back(instruction); }
  void backward(Op op, uint8_t direction) {
    const int32_t microbatch = backward_count_[direction]++;
    receive_backward(direction, microbatch);
    add({.op = op, .direction = direction, .microbatch = microbatch});
    send_backward(direction, microbatch);
  }
  void transfer(Op op, uint8_t direction, int32_t microbatch, int32_t peer) {
    if (peer < 0 || peer == rank_) return;  // enters or exits here, or is handed over locally
    add({.op = op, .direction = direction, .microbatch = microbatch, .peer = peer});
  }
  void receive_forward(uint8_t direction, int32_t microbatch) {
    transfer(Op::kReceiveForward, direction, microbatch, neighbours_[direction].previous);
  }
  void send_forward(uint8_t direction, int32_t microbatch) {
    transfer(Op::kSendForward, direction, microbatch, neighbours_[direction].next);
  }
  void receive_backward(uint8_t direction, int32_t microbatch) {
    transfer(Op::kReceiveBackward, direction, microbatch, neighbours_[direction].next);
  }
  void send_backward(uint8_t direction, int32_t microbatch) {
    transfer(Op::kSendBackward, direction, microbatch, neighbours_[direction].previous);
  }

  const int32_t rank_;
  const int64_t microbatch_count_;
  std::vector<Neighbours> neighbours_;  // by direction
  std::array<int32_t, 2> forward_count_{};
  std::array<int32_t, 2> backward_count_{};
  std::vector<Instruction> instructions_;
};

// The eight phases of DualPipe, in the letters of the published description: H ranks from the end
// where direction a enters to the middle, h this rank's distance to that end, k to the middle; n
// micro-batches per direction. DualPipeV is the same with the pipeline cut in half: its last rank
// is the middle, and direction a comes back from there as z.
std::vector<Instruction> eight_phases(ProgramBuilder build, int32_t H, int32_t h, int32_t n,
                                      uint8_t a) {
  const int32_t k = H - 1 - h;
  const uint8_t z = 1 - a;
  const bool middle = k == 0;

  for (int32_t i = 0; i < 2 * k; ++i) build.forward(a);
  for (int32_t i = 0; i < h + 1; ++i) {
    build.forward(a);
    build.forward(z);
  }
  for (int32_t i = 0; i < k; ++i) {
    build.backward_input(z);
    build.backward_weight();
    build.forward(z);
  }
  for (int32_t i = 0; i < n - 2 * H + h + 1; ++i) {
    if (middle &&
        i == 0) {  // not overlapped: the gradient below is the first of its direction, and late
      build.forward(a);
      build.backward(z);
    } else {
      build.overlapped(a, z);
    }
    build.overlapped(z, a);
  }
  for (int32_t i = 0; i < k; ++i) {
    build.backward(z);
    build.overlapped(z, a);
  }
  for (int32_t i = 0; i < 2 * (h + 1);
       ++i) {  // full first; the last h + 1 leave their weight part for phase 8
    const uint8_t direction = i % 2 == 0 ? z : a;
    if (i < h + 1) {
      build.backward(direction);
    } else {
      build.backward_input(direction);
    }
  }
  for (int32_t i = 0; i < k; ++i) {
    build.backward_weight();
    build.backward_input(a);
  }
  for (int32_t i = 0; i < h + 1; ++i) build.backward_weight();
  return build.finish();
}

std::vector<Instruction> one_forward_one_backward(ProgramBuilder build, int32_t P, int32_t C,
                                                  int32_t rank) {
  const int32_t warmup_count = P - rank - 1;
  PENSTOCK_CHECK(warmup_count >= 0 && warmup_count < C, warmup_count, C);
  for (int32_t i = 0; i < warmup_count; ++i) build.forward(0);
  for (int32_t i = warmup_count; i < C; ++i) {
    build.forward(0);
    build.backward(0);
  }
  for (int32_t i = 0; i < warmup_count; ++i) build.backward(0);
  return build.finish();
}

// 1F1B with its backward cut in two: the input part, which the rank before waits for, at once; the
// weight part `rank` micro-batches later, so that it fills what would be idle at the end.
std::vector<Instruction> zero_bubble(ProgramBuilder build, int32_t P, int32_t C, int32_t rank) {
  const int32_t warmup_count = P - rank - 1;
  PENSTOCK_CHECK(warmup_count >= 0 && warmup_count < C, warmup_count, C);
  for (int32_t i = 0; i < warmup_count; ++i) build.forward(0);
  for (int32_t i = 0; i < C; ++i) {
    if (i < C - warmup_count) build.forward(0);
    build.backward_input(0);
    if (i >= rank) build.backward_weight();
  }
  for (int32_t i = 0; i < rank; ++i) build.backward_weight();
  return build.finish();
}

// The same micro-batches in the same order with everything backward removed. The final reduction
// carries only loss and tokens.
std::vector<Instruction> evaluation_of(const std::vector<Instruction>& training) {
  std::vector<Instruction> evaluation;
  for (const Instruction& instruction : training) {
    switch (instruction.op) {
      case Op::kReceiveForward:
      case Op::kForward:
      case Op::kSendForward:
      case Op::kReduceGradients:
        evaluation.push_back(instruction);
        break;
      case Op::kOverlapped:
        evaluation.push_back({.op = Op::kForward,
                              .direction = instruction.direction,
                              .microbatch = instruction.microbatch});
        break;
      case Op::kReceiveBackward:
      case Op::kBackward:
      case Op::kBackwardInput:
      case Op::kBackwardWeight:
      case Op::kSendBackward:
      case Op::kOptimizerStep:
        break;
    }
  }
  return evaluation;
}

Status check_layout(const ParallelismSpec& parallelism) {
  const int64_t P = parallelism.pipeline;
  const int64_t C = parallelism.microbatches;
  if (P < 1 || C < 1 || P > kPlannedMicrobatchesMax || C > kPlannedMicrobatchesMax / P) {
    return invalid_argument(
        fmt::format("pipeline {} with {} micro-batches: both must be positive, their product at "
                    "most {}",
                    P, C, kPlannedMicrobatchesMax));
  }
  const bool dualpipe = parallelism.schedule == Schedule::kDualPipe && P > 1;
  if (dualpipe && (P % 2 != 0 || C % 2 != 0)) {
    return invalid_argument(fmt::format(
        "dualpipe needs an even pipeline and an even number of micro-batches, not {} and {}", P,
        C));
  }
  const bool two_per_rank = dualpipe || parallelism.schedule == Schedule::kDualPipeV;
  const int64_t microbatches_min = two_per_rank ? 2 * P : P;
  if (C >= microbatches_min) return {};
  return invalid_argument(fmt::format("{} over {} ranks needs at least {} micro-batches, not {}",
                                      to_string(parallelism.schedule), P, microbatches_min, C));
}

std::vector<Instruction> training_of(const ParallelismSpec& parallelism, int32_t rank) {
  const auto P = static_cast<int32_t>(parallelism.pipeline);
  const auto C = static_cast<int32_t>(parallelism.microbatches);
  ProgramBuilder build(parallelism, rank);
  switch (parallelism.schedule) {
    case Schedule::kDualPipe:
      if (P == 1) break;  // no second end to enter at
      return rank < P / 2 ? eight_phases(std::move(build), P / 2, rank, C / 2, 0)
                          : eight_phases(std::move(build), P / 2, P - 1 - rank, C / 2, 1);
    case Schedule::kDualPipeV:
      return eight_phases(std::move(build), P, rank, C, 0);
    case Schedule::kZeroBubble:
      return zero_bubble(std::move(build), P, C, rank);
    case Schedule::kOneForwardOneBackward:
      break;
  }
  return one_forward_one_backward(std::move(build), P, C, rank);
}

// Every number of micro-batches that a ramp brings besides the first, ascending.
std::set<int64_t> other_sizes(const ParallelismSpec& parallelism) {
  std::set<int64_t> sizes;
  for (const StepLevel<int64_t>& level : parallelism.microbatch_levels) sizes.insert(level.value);
  sizes.erase(parallelism.microbatches);
  return sizes;
}

// check_programs() of the steps with `microbatches`.
Status check_resized(const ParallelismSpec& parallelism, const std::vector<Program>& programs,
                     size_t index) {
  std::vector<Program> steps;
  for (const Program& program : programs) {
    const std::vector<Instruction>& training = program.resized[index].training;
    steps.push_back({program.pipeline_index, training, evaluation_of(training)});
  }
  return check_programs(parallelism.with_microbatches(programs[0].resized[index].microbatches),
                        steps);
}

}  // namespace

Result<Program> make_program(const ParallelismSpec& parallelism, int64_t pipeline_index) {
  PENSTOCK_TRY(check_layout(parallelism));
  if (pipeline_index < 0 || pipeline_index >= parallelism.pipeline) {
    return invalid_argument(
        fmt::format("pipeline index {} of {}", pipeline_index, parallelism.pipeline));
  }
  Program program;
  program.pipeline_index = static_cast<int32_t>(pipeline_index);
  program.training = training_of(parallelism, program.pipeline_index);
  program.evaluation = evaluation_of(program.training);
  for (const int64_t microbatches : other_sizes(parallelism)) {
    const ParallelismSpec resized = parallelism.with_microbatches(microbatches);
    PENSTOCK_TRY(check_layout(resized));
    program.resized.push_back(
        {static_cast<int32_t>(microbatches), training_of(resized, program.pipeline_index)});
  }
  return program;
}

Result<std::vector<Program>> make_programs(const ParallelismSpec& parallelism) {
  std::vector<Program> programs;
  for (int64_t p = 0; p < parallelism.pipeline; ++p) {
    PENSTOCK_TRY_ASSIGN(Program program, make_program(parallelism, p));
    programs.push_back(std::move(program));
  }
  if (programs.empty()) return invalid_argument("pipeline must be positive");
  PENSTOCK_TRY(check_programs(parallelism, programs));
  for (size_t i = 0; i < programs[0].resized.size(); ++i) {
    PENSTOCK_TRY(check_resized(parallelism, programs, i));
  }
  return programs;
}

}  // namespace penstock
