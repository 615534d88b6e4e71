#include "worker/engine/slot_needs.h"

#include <gtest/gtest.h>

#include "coordinator/plan/schedule.h"

namespace penstock {
namespace {

Program program_of(Schedule schedule, int64_t pipeline, int64_t microbatches, int64_t index) {
  const ParallelismSpec parallelism{
      .pipeline = pipeline, .schedule = schedule, .microbatches = microbatches};
  return *make_program(parallelism, index);
}

TEST(SlotNeedsTest, OneForwardOneBackwardNeedsDepthMinusRank) {
  for (int64_t rank = 0; rank < 4; ++rank) {
    const auto needs = slot_needs(program_of(Schedule::kOneForwardOneBackward, 4, 9, rank));
    EXPECT_EQ(needs[0].activations, 4 - rank);
    EXPECT_EQ(needs[0].gradients, 1);
    EXPECT_EQ(needs[1].activations, 0);
  }
}

TEST(SlotNeedsTest, BothDirectionsOfDualPipeNeedAtMostDepthPlusTwoTogether) {
  for (const int64_t pipeline : {2, 4, 8}) {
    for (int64_t rank = 0; rank < pipeline; ++rank) {
      const auto needs = slot_needs(program_of(Schedule::kDualPipe, pipeline, 4 * pipeline, rank));
      // Live together are at most P + 1 (the plan's tests); the two peaks need not be at one time.
      EXPECT_LE(needs[0].activations + needs[1].activations, pipeline + 2);
      EXPECT_GE(needs[0].activations + needs[1].activations, pipeline + 1);
    }
  }
}

TEST(SlotNeedsTest, MoreMicrobatchesNeedNoMoreSlots) {
  for (int64_t rank = 0; rank < 4; ++rank) {
    const auto few = slot_needs(program_of(Schedule::kDualPipe, 4, 8, rank));
    const auto many = slot_needs(program_of(Schedule::kDualPipe, 4, 80, rank));
    for (int d = 0; d < 2; ++d) {
      EXPECT_EQ(few[d].gradients, many[d].gradients);
      EXPECT_LE(many[d].activations, few[d].activations + 1);
    }
  }
}

TEST(SlotNeedsTest, ARampNeedsTheMostOfItsSteps) {
  // GPipe's order, which needs a slot for every micro-batch.
  const auto step_of = [](int32_t microbatches) {
    std::vector<Instruction> step;
    for (const Op op : {Op::kForward, Op::kBackwardInput, Op::kBackwardWeight}) {
      for (int32_t m = 0; m < microbatches; ++m) step.push_back({.op = op, .microbatch = m});
    }
    return step;
  };
  const Program grows{
      .training = step_of(2), .evaluation = {}, .resized = {{3, step_of(3)}, {5, step_of(5)}}};
  const Program shrinks{.training = step_of(5), .evaluation = {}, .resized = {{2, step_of(2)}}};
  for (const Program& ramp : {grows, shrinks}) {
    EXPECT_EQ(slot_needs(ramp)[0].activations, 5);
    EXPECT_EQ(slot_needs(ramp)[0].gradients, 5);
  }
}

TEST(SlotNeedsTest, WeightPartsThatWaitNeedAGradientSlotEach) {
  Program program;
  const auto add = [&](Op op, int32_t m) {
    program.training.push_back({.op = op, .direction = 0, .microbatch = m});
  };
  for (int32_t m = 0; m < 3; ++m) add(Op::kForward, m);
  for (int32_t m = 0; m < 3; ++m) add(Op::kBackwardInput, m);
  for (int32_t m = 0; m < 3; ++m) add(Op::kBackwardWeight, -1);
  EXPECT_EQ(slot_needs(program)[0].activations, 3);
  EXPECT_EQ(slot_needs(program)[0].gradients, 3);
}

}  // namespace
}  // namespace penstock
