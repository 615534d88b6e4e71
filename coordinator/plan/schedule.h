// Schedules: pure functions from a layout to one program per pipeline rank. Below, P ranks, C
// micro-batches; F, B, Bi, W the seconds of a forward, a full backward, its input part and its
// weight part (B = Bi + W), pair those of an overlapped forward and backward; bubble: the idle
// seconds of the worst rank in a step; live: activations of micro-batches whose last backward part
// has not run. Digits are directions, b the input part, W the oldest queued weight part, braces an
// overlapped pair.
//
// 1f1b, one-forward-one-backward. Bubble (P - 1)(F + B), live P - rank. P = 4, 6 micro-batches:
//   rank 0: F0 F0 F0 F0 B0 F0 B0 F0 B0 B0 B0 B0
//   rank 3: F0 B0 F0 B0 F0 B0 F0 B0 F0 B0 F0 B0
//
// zb1p, the ZB-H1 schedule of Qi et al., "Zero Bubble Pipeline Parallelism" (2023): 1F1B whose
// weight parts run `rank` micro-batches late and fill the end. Bubble (P - 1)(F + B - 2W), live P
// on every rank. P = 4, 6 micro-batches:
//   rank 0: F0 F0 F0 F0 b0 W F0 b0 W F0 b0 W b0 W b0 W b0 W
//   rank 3: F0 b0 F0 b0 F0 b0 F0 b0 W F0 b0 W F0 b0 W W W W
//
// dualpipe, DualPipe of DeepSeek-V3 (2024): P stages, each on two ranks, and two directions. Rank r
// runs stage r for direction 0, which enters at rank 0, and stage P-1-r for direction 1, which
// enters at rank P-1. Bubble (P/2 - 1)(pair + B - 3W), live P + 1. P = 4, 8 micro-batches:
//   rank 0: F0 F0 F0 F1 b1 W F1 {F0B1} {F1B0} B1 {F1B0} B1 b0 W b0 W
//   rank 1: F0 F1 F0 F1 F0 B1 {F1B0} {F0B1} {F1B0} B1 B0 b1 b0 W W
//   ranks 3 and 2 mirror 0 and 1 with the digits swapped.
//
// dualpipev, the lower half of a DualPipe of 2P ranks, folded: 2P stages, each on one rank. Rank r
// runs stage r on the way down (direction 0) and stage 2P-1-r on the way back (direction 1) of the
// same micro-batches, handed over locally on the last rank. Bubble (P - 1)(pair + B - 3W), live
// 2P + 1; a stage is half as long as one of P. P = 2, 4 micro-batches: ranks 0 and 1 above.
//
// Every receive stands right before the instruction that uses its data, every send right after the
// one that made it; with FIFO channels and buffered sends no program waits in a circle
// (check_programs() proves it).
#pragma once

#include <cstdint>
#include <vector>

#include "comm/base/status.h"
#include "comm/run/job_spec.h"
#include "comm/run/program.h"

namespace penstock {

// The program of pipeline rank `pipeline_index`. kInvalidArgument when the layout breaks a rule of
// its schedule: 1f1b and zb1p need C >= P, dualpipev C >= 2P, dualpipe both of P and C even and
// C >= 2P; dualpipe on one rank is 1f1b.
// With a batch-size ramp: those of every size, see Program::resized.
Result<Program> make_program(const ParallelismSpec& parallelism, int64_t pipeline_index);

// Programs of all pipeline ranks, in order, checked with check_programs().
// The training steps of a batch-size ramp are checked like the first one.
Result<std::vector<Program>> make_programs(const ParallelismSpec& parallelism);

// Proves that `programs` (one per pipeline rank, in order) train and evaluate every micro-batch
// exactly once: every forward, backward and weight gradient in order, every value received before
// it is used and sent after it is made, every channel's sends equal to its receives, and no
// deadlock. kInvalidArgument names rank, position and instruction of the first violation. What it
// accepts computes the same bits: neighbours may stand in either order only if neither makes, uses
// or orders what the other does (tests/coordinator/plan_check_test.cc has the criterion).
Status check_programs(const ParallelismSpec& parallelism, const std::vector<Program>& programs);

}  // namespace penstock
