// Programs in virtual time: every rank works through its instructions as soon as their inputs are
// there, on FIFO channels with buffered sends, and operations take what a table says. What a step
// would take if nothing but the schedule cost time; check_programs() runs it to prove that no
// programs wait in a circle. Pure.
#pragma once

#include <cstdint>
#include <vector>

#include "comm/base/status.h"
#include "comm/run/job_spec.h"
#include "comm/run/program.h"

namespace penstock {

// Seconds, of any length: everything is proportional. The defaults are those in which schedules are
// usually drawn, with nothing gained by overlapping a pair.
struct OperationCosts {
  double forward = 1.0;
  double backward = 2.0;  // in full
  double backward_input = 1.0;
  double backward_weight = 1.0;
  double pair = 3.0;  // an overlapped forward and full backward
  // What a full backward or a pair still has to do (weight gradients) when what its neighbours wait
  // for is final and leaves; at most all of it. 0: it leaves at the end, as publications suppose.
  double backward_tail = 0.0;
  double pair_tail = 0.0;
  double send = 0.0;    // from a value's leaving until it is at the neighbour; takes no compute
  double reduce = 0.0;  // of gradients, once every rank is there
  double optimizer = 0.0;
  // By stage: how many times as long its passes take; a pair takes the mean of its stages, weighted
  // by forward and backward. Empty: 1 for every stage.
  std::vector<double> stage_factors = {};
};

struct Span {
  double begin = 0.0;
  double end = 0.0;
};

struct RankTimeline {
  std::vector<Span> spans;  // by instruction; a receive's is the wait for its data, a send's empty
  double busy = 0.0;        // computing, reducing and updating
  double idle = 0.0;        // the rest of the step
  int32_t live_max = 0;     // most micro-batches at once whose last backward part has not run
  int32_t weight_queue_max = 0;
};

// Ranks start together, and the step ends when the last one ends.
struct Timeline {
  double makespan = 0.0;
  std::vector<RankTimeline> ranks;  // by pipeline index
  double bubble() const;            // the most that a rank idles
};

enum class ProgramKind { kTraining, kEvaluation };
const std::vector<Instruction>& instructions_of(const Program& program, ProgramKind kind);

// kInvalidArgument names rank, position and instruction where a channel delivers another
// micro-batch, or where ranks wait in a circle, or a channel whose values nobody receives.
// REQUIRES: `programs`, one per pipeline rank, are each what check_programs() wants of one rank;
// `costs.stage_factors` is empty or has an entry per stage.
Result<Timeline> run_in_virtual_time(const ParallelismSpec& parallelism,
                                     const std::vector<Program>& programs, ProgramKind kind,
                                     const OperationCosts& costs);

// The published bubble of the schedule, as schedule.h lists them, but that on its way from rank to
// rank a value waits for no tail: 1f1b (P - 1)(F + B - backward_tail), dualpipe
// (P/2 - 1)(pair - pair_tail + B - 3W), dualpipev alike. Equal to Timeline::bubble() when
//   1f1b                  always;
//   zb1p                  W <= F and W <= Bi (a longer W delays what the rank before waits for);
//   dualpipe, dualpipev   F = Bi >= W and B <= pair <= F + B. With F > Bi the ranks at the ends
//                         wait for forwards instead: (H - 1)(pair + F - 2W) over H ranks to the
//                         middle. With F < Bi it is an upper bound. With tails: F = Bi = W and
//                         B <= pair - pair_tail; with F = Bi > W up to one backward_tail less.
// All stages equal, and sends free.
double bubble_by_formula(const ParallelismSpec& parallelism, const OperationCosts& costs);

}  // namespace penstock
