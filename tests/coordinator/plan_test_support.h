// Layouts and notation that the tests of coordinator/plan share.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "comm/run/layout.h"
#include "coordinator/plan/schedule.h"
#include "coordinator/plan/virtual_time.h"

namespace penstock {

inline ParallelismSpec pipeline_of(Schedule schedule, int64_t pipeline, int64_t microbatches) {
  return {.pipeline = pipeline, .schedule = schedule, .microbatches = microbatches};
}
inline ParallelismSpec dualpipe(int64_t pipeline, int64_t microbatches) {
  return pipeline_of(Schedule::kDualPipe, pipeline, microbatches);
}
inline ParallelismSpec dualpipev(int64_t pipeline, int64_t microbatches) {
  return pipeline_of(Schedule::kDualPipeV, pipeline, microbatches);
}
inline ParallelismSpec one_f_one_b(int64_t pipeline, int64_t microbatches) {
  return pipeline_of(Schedule::kOneForwardOneBackward, pipeline, microbatches);
}
inline ParallelismSpec zero_bubble(int64_t pipeline, int64_t microbatches) {
  return pipeline_of(Schedule::kZeroBubble, pipeline, microbatches);
}

inline std::string text_of(const ParallelismSpec& layout) {
  return fmt::format("{} over {} ranks, {} micro-batches", to_string(layout.schedule),
                     layout.pipeline, layout.microbatches);
}

inline std::vector<Program> programs_of(const ParallelismSpec& parallelism) {
  Result<std::vector<Program>> programs = make_programs(parallelism);
  EXPECT_TRUE(programs.ok()) << programs.status().to_string();
  return programs.ok() ? *programs : std::vector<Program>{};
}

inline Timeline timeline_of(const ParallelismSpec& parallelism, const OperationCosts& costs = {},
                            ProgramKind kind = ProgramKind::kTraining) {
  Result<Timeline> timeline =
      run_in_virtual_time(parallelism, programs_of(parallelism), kind, costs);
  EXPECT_TRUE(timeline.ok()) << timeline.status().to_string();
  return timeline.ok() ? *timeline : Timeline{};
}

// The compute instructions as the published tables write them: no micro-batch numbers, no
// transfers.
inline std::string notation(const std::vector<Instruction>& instructions) {
  std::string text;
  for (const Instruction& i : instructions) {
    const std::string f = std::to_string(i.direction), b = std::to_string(i.backward_direction);
    switch (i.op) {
      case Op::kForward:
        text += "F" + f + " ";
        break;
      case Op::kBackward:
        text += "B" + f + " ";
        break;
      case Op::kBackwardInput:
        text += "b" + f + " ";
        break;
      case Op::kBackwardWeight:
        text += "W ";
        break;
      case Op::kOverlapped:
        text += "{F" + f + "B" + b + "} ";
        break;
      default:
        break;
    }
  }
  if (!text.empty()) text.pop_back();
  return text;
}

}  // namespace penstock
