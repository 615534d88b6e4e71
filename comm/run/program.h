// The program of one pipeline rank for one training step: a flat list of instructions that an
// engine executes without knowing the schedule's name. Computed by pure functions in
// coordinator/plan, shipped in the assignment.
//
// Micro-batches are numbered per direction from 0; layout.h says which stage serves a direction.
// Under DualPipe direction 0 enters at pipeline rank 0 and direction 1, with micro-batches of its
// own, at rank P-1. Under DualPipeV both directions are legs of one way: micro-batch m goes down
// the ranks as 0.m and up again as 1.m.
//
// Sends and receives are FIFO per (peer, direction, kind): the engine may start them early but must
// match them in program order. Sends are asynchronous, a receive completes before the instruction
// that uses its data.
//
// Local hand-off (DualPipeV's last rank, where both neighbouring stages are; pipeline_neighbours()
// in layout.h tells): no instruction stands for it. The output of F0.m is the input of F1.m, and
// the gradient that B1.m (or b1.m) makes of its input is the gradient B0.m (or b0.m) starts from.
// Forward and backward, each value is used before the next one is made, so one waits at a time;
// maker and user are never the two halves of one pair.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "comm/base/status.h"

namespace penstock {

enum class Op : uint8_t {
  kReceiveForward,  // activations of (direction, microbatch) from pipeline rank `peer`
  kForward,
  kSendForward,      // … to `peer`
  kReceiveBackward,  // gradient of the stage's output from `peer`
  kBackward,         // input and weight gradients
  kBackwardInput,    // input gradient only; the weight part is queued
  kBackwardWeight,   // the oldest queued weight part
  kSendBackward,     // gradient of the stage's input to `peer`
  kOverlapped,  // one forward and one backward of the other direction, sub-operations interleaved
  kReduceGradients,  // over every replica, in rank order; also tokens, loss and expert loads
  kOptimizerStep,
};

struct Instruction {
  Op op = Op::kForward;
  uint8_t direction = 0;           // of the forward, for kOverlapped
  int32_t microbatch = -1;         // of the forward, for kOverlapped; -1 where none applies
  uint8_t backward_direction = 0;  // kOverlapped only
  int32_t backward_microbatch = -1;
  int32_t peer = -1;  // pipeline rank; sends and receives only
  bool operator==(const Instruction&) const = default;
};

// The training step of another number of micro-batches: a batch-size ramp has several.
struct ResizedTraining {
  int32_t microbatches = 0;  // per replica and step, as ParallelismSpec::microbatches
  std::vector<Instruction> training;
  bool operator==(const ResizedTraining&) const = default;
};

struct Program {
  int32_t pipeline_index = 0;
  std::vector<Instruction> training;  // one training step
  std::vector<Instruction>
      evaluation;  // the same micro-batches, forward only, reductions of the loss at the end
  std::vector<ResizedTraining> resized = {};  // ascending; evaluations are never resized
  bool operator==(const Program&) const = default;
};

std::string_view op_name(Op op);  // "receive_forward", "forward", …
// One instruction in the notation of the DualPipe tables: "F0.3", "B1.2", "b1.0", "W", "{F0.4
// B1.2}", "recvF0.3<1".
std::string to_string(const Instruction& instruction);

}  // namespace penstock
