// Schedules: pure functions from a layout to one program per pipeline rank.
//
// DualPipe (DeepSeek-V3, 2024): P ranks, P stages, two directions. Rank r runs stage r for
// direction 0, which enters at rank 0, and stage P-1-r for direction 1, which enters at rank P-1. P
// = 4, 8 micro-batches (digit = direction, b = input gradient only, W = the oldest queued weight
// gradients, braces = overlapped pair):
//   rank 0: F0 F0 F0 F1 b1 W F1 {F0B1} {F1B0} B1 {F1B0} B1 b0 W b0 W
//   rank 1: F0 F1 F0 F1 F0 B1 {F1B0} {F0B1} {F1B0} B1 B0 b1 b0 W W
//   ranks 3 and 2 mirror 0 and 1 with the digits swapped.
// Idle time of the worst rank: (P/2 - 1) · (pair + B - 3W). Live activations: at most P + 1 on
// every rank.
//
// 1F1B: P ranks, P stages, one direction. P = 4, 6 micro-batches:
//   rank 0: F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5
//   rank 3: F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5
// Idle time: (P - 1) · (F + B). Live activations: at most P - rank.
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
// its schedule: DualPipe needs an even pipeline >= 2 and an even number of micro-batches >= 2 ·
// pipeline; 1F1B needs at least as many micro-batches as stages.
Result<Program> make_program(const ParallelismSpec& parallelism, int64_t pipeline_index);

// Programs of all pipeline ranks, in order, checked with check_programs().
Result<std::vector<Program>> make_programs(const ParallelismSpec& parallelism);

// Proves that `programs` (one per pipeline rank, in order) train and evaluate every micro-batch
// exactly once: every forward, backward and weight gradient in order, every value received before
// it is used and sent after it is made, every channel's sends equal to its receives, and no
// deadlock. kInvalidArgument names rank, position and instruction of the first violation.
Status check_programs(const ParallelismSpec& parallelism, const std::vector<Program>& programs);

}  // namespace penstock
