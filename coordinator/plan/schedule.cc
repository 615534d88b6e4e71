#include "coordinator/plan/schedule.h"

#include <algorithm>
#include <array>
#include <string>

#include "comm/base/check.h"

namespace penstock {
namespace {

// The two neighbours of a rank in one direction; -1 where the direction enters or exits.
struct Neighbours {
  int32_t previous = -1;
  int32_t next = -1;
};

Neighbours neighbours(int32_t pipeline_size, int32_t pipeline_index, uint8_t direction) {
  const int32_t step = direction == 0 ? 1 : -1;
  const auto inside = [&](int32_t rank) { return rank >= 0 && rank < pipeline_size ? rank : -1; };
  return {inside(pipeline_index - step), inside(pipeline_index + step)};
}

// Appends operations with their receives and sends; numbers micro-batches per direction as they
// come.
class ProgramBuilder {
 public:
  ProgramBuilder(int32_t pipeline_size, int32_t pipeline_index)
      : neighbours_{neighbours(pipeline_size, pipeline_index, 0),
                    neighbours(pipeline_size, pipeline_index, 1)} {}

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
  void finish() {
    add({.op = Op::kReduceGradients});
    add({.op = Op::kOptimizerStep});
  }

  int32_t forward_count(uint8_t direction) const { return forward_count_[direction]; }
  int32_t backward_count(uint8_t direction) const { return backward_count_[direction]; }
  std::vector<Instruction> take() { return std::move(instructions_); }

 private:
  void add(Instruction instruction) { instructions_.push_back(instruction); }
  void backward(Op op, uint8_t direction) {
    const int32_t microbatch = backward_count_[direction]++;
    receive_backward(direction, microbatch);
    add({.op = op, .direction = direction, .microbatch = microbatch});
    send_backward(direction, microbatch);
  }
  void transfer(Op op, uint8_t direction, int32_t microbatch, int32_t peer) {
    if (peer < 0) return;  // the direction enters or exits here
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

  const std::array<Neighbours, 2> neighbours_;
  std::array<int32_t, 2> forward_count_{};
  std::array<int32_t, 2> backward_count_{};
  std::vector<Instruction> instructions_;
};

// The eight phases, in the letters of the published description: P ranks, H half of them, h the
// distance to the nearer end, k to the middle, n micro-batches per direction; a enters on this
// rank's half, z on the other.
std::vector<Instruction> dualpipe(int32_t P, int32_t C, int32_t rank) {
  const int32_t H = P / 2;
  const int32_t h = std::min(rank, P - 1 - rank);
  const int32_t k = H - 1 - h;
  const int32_t n = C / 2;
  const uint8_t a = rank < H ? 0 : 1;
  const uint8_t z = 1 - a;
  const bool middle = k == 0;
  ProgramBuilder build(P, rank);

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
  for (int32_t i = 0; i < n - P + h + 1; ++i) {
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

  for (const uint8_t direction : {0, 1}) {
    PENSTOCK_CHECK(build.forward_count(direction) == n, direction, build.forward_count(direction));
    PENSTOCK_CHECK(build.backward_count(direction) == n, direction,
                   build.backward_count(direction));
  }
  build.finish();
  return build.take();
}

std::vector<Instruction> one_forward_one_backward(int32_t P, int32_t C, int32_t rank) {
  const int32_t warmup_count = P - rank - 1;
  PENSTOCK_CHECK(warmup_count >= 0 && warmup_count < C, warmup_count, C);
  ProgramBuilder build(P, rank);
  for (int32_t i = 0; i < warmup_count; ++i) build.forward(0);
  for (int32_t i = warmup_count; i < C; ++i) {
    build.forward(0);
    build.backward(0);
  }
  for (int32_t i = 0; i < warmup_count; ++i) build.backward(0);
  PENSTOCK_CHECK(build.forward_count(0) == C && build.backward_count(0) == C);
  build.finish();
  return build.take();
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
  if (P < 1 || P > INT32_MAX || C < 1 || C > INT32_MAX / 4) {
    return invalid_argument(
        fmt::format("pipeline {} with {} micro-batches: both must be positive", P, C));
  }
  if (parallelism.schedule == Schedule::kOneForwardOneBackward) {
    if (C >= P) return {};
    return invalid_argument(fmt::format(
        "1f1b over {} stages needs at least {} micro-batches, not {}; raise microbatches", P, P,
        C));
  }
  if (P % 2 != 0) {
    return invalid_argument(
        fmt::format("dualpipe needs an even pipeline, not {}; use 1f1b or another depth", P));
  }
  if (C % 2 != 0 || C < 2 * P) {
    return invalid_argument(fmt::format(
        "dualpipe over {} ranks needs an even number of micro-batches, at least {}, not {}", P,
        2 * P, C));
  }
  return {};
}

}  // namespace

Result<Program> make_program(const ParallelismSpec& parallelism, int64_t pipeline_index) {
  PENSTOCK_TRY(check_layout(parallelism));
  if (pipeline_index < 0 || pipeline_index >= parallelism.pipeline) {
    return invalid_argument(
        fmt::format("pipeline index {} of {}", pipeline_index, parallelism.pipeline));
  }
  const auto P = static_cast<int32_t>(parallelism.pipeline);
  const auto C = static_cast<int32_t>(parallelism.microbatches);
  const auto rank = static_cast<int32_t>(pipeline_index);
  Program program;
  program.pipeline_index = rank;
  program.training = parallelism.schedule == Schedule::kDualPipe
                         ? dualpipe(P, C, rank)
                         : one_forward_one_backward(P, C, rank);
  program.evaluation = evaluation_of(program.training);
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
  return programs;
}

}  // namespace penstock
