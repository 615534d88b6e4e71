#include "coordinator/plan/schedule.h"

#include <gtest/gtest.h>

#include <string>

#include "tests/coordinator/plan_test_support.h"

namespace penstock {
namespace {

TEST(ScheduleTest, ARampBringsTheProgramOfEveryOtherSizeOnce) {
  for (ParallelismSpec ramp :
       {dualpipe(4, 8), dualpipev(2, 8), one_f_one_b(3, 8), zero_bubble(3, 8)}) {
    ramp.microbatch_levels = {{3, 16}, {5, 8}, {7, 12}, {9, 16}};
    const std::vector<Program> programs = programs_of(ramp);
    ASSERT_EQ(programs.size(), static_cast<size_t>(ramp.pipeline));
    for (const Program& program : programs) {
      const auto alone = [&](int64_t microbatches) {
        return make_program(ramp.with_microbatches(microbatches), program.pipeline_index).value();
      };
      EXPECT_EQ(program.training, alone(8).training);
      EXPECT_EQ(program.evaluation, alone(8).evaluation);
      ASSERT_EQ(program.resized.size(), 2u);
      EXPECT_EQ(program.resized[0], (ResizedTraining{12, alone(12).training}));
      EXPECT_EQ(program.resized[1], (ResizedTraining{16, alone(16).training}));
    }
  }
}

TEST(ScheduleTest, ARampThatBreaksTheScheduleIsRefused) {
  ParallelismSpec ramp = dualpipe(4, 8);
  ramp.microbatch_levels = {{3, 9}};
  EXPECT_EQ(make_programs(ramp).status().code(), Code::kInvalidArgument);
}

TEST(DualPipeScheduleTest, FourRanksEightMicrobatchesEqualThePublishedTable) {
  const std::vector<Program> programs = programs_of(dualpipe(4, 8));
  ASSERT_EQ(programs.size(), 4u);
  EXPECT_EQ(notation(programs[0].training),
            "F0 F0 F0 F1 b1 W F1 {F0B1} {F1B0} B1 {F1B0} B1 b0 W b0 W");
  EXPECT_EQ(notation(programs[1].training),
            "F0 F1 F0 F1 F0 B1 {F1B0} {F0B1} {F1B0} B1 B0 b1 b0 W W");
  EXPECT_EQ(notation(programs[2].training),
            "F1 F0 F1 F0 F1 B0 {F0B1} {F1B0} {F0B1} B0 B1 b0 b1 W W");
  EXPECT_EQ(notation(programs[3].training),
            "F1 F1 F1 F0 b0 W F0 {F1B0} {F0B1} B0 {F0B1} B0 b1 W b1 W");
}

TEST(OneForwardOneBackwardScheduleTest, FourStagesSixMicrobatchesEqualTheTextbook) {
  const std::vector<Program> programs = programs_of(one_f_one_b(4, 6));
  ASSERT_EQ(programs.size(), 4u);
  EXPECT_EQ(notation(programs[0].training), "F0 F0 F0 F0 B0 F0 B0 F0 B0 B0 B0 B0");
  EXPECT_EQ(notation(programs[3].training), "F0 B0 F0 B0 F0 B0 F0 B0 F0 B0 F0 B0");
}

TEST(ZeroBubbleScheduleTest, FourStagesSixMicrobatchesEqualTheFigure) {
  const std::vector<Program> programs = programs_of(zero_bubble(4, 6));
  ASSERT_EQ(programs.size(), 4u);
  EXPECT_EQ(notation(programs[0].training), "F0 F0 F0 F0 b0 W F0 b0 W F0 b0 W b0 W b0 W b0 W");
  EXPECT_EQ(notation(programs[3].training), "F0 b0 F0 b0 F0 b0 F0 b0 W F0 b0 W F0 b0 W W W W");
}

TEST(DualPipeVScheduleTest, RanksRunWhatTheLowerHalfOfADualPipeTwiceAsDeepRuns) {
  for (const int64_t pipeline : {1, 2, 5}) {
    const int64_t microbatches = 2 * pipeline + 3;
    const std::vector<Program> folded = programs_of(dualpipev(pipeline, microbatches));
    const std::vector<Program> straight = programs_of(dualpipe(2 * pipeline, 2 * microbatches));
    for (int64_t rank = 0; rank < pipeline; ++rank) {
      EXPECT_EQ(notation(folded[rank].training), notation(straight[rank].training));
    }
  }
}

TEST(DualPipeVScheduleTest, TheLastRankHandsOverWithoutATransfer) {
  const std::vector<Program> programs = programs_of(dualpipev(3, 7));
  for (const Instruction& i : programs[2].training) {
    EXPECT_TRUE(i.peer == -1 || i.peer == 1) << to_string(i);
  }
}

TEST(DualPipeScheduleTest, OneRankRunsOneForwardOneBackward) {
  EXPECT_EQ(programs_of(dualpipe(1, 3)), programs_of(one_f_one_b(1, 3)));
}

TEST(OneForwardOneBackwardScheduleTest, OneRankAlternatesForwardAndBackwardWithoutTransfers) {
  const std::vector<Program> programs = programs_of(one_f_one_b(1, 3));
  ASSERT_EQ(programs.size(), 1u);
  std::string text;
  for (const Instruction& i : programs[0].training) text += to_string(i) + " ";
  EXPECT_EQ(text, "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2 reduce optimizer ");
}

TEST(ScheduleTest, EvaluationRunsTheSameForwardsInTheSameOrderAndNothingBackward) {
  for (const ParallelismSpec& layout :
       {one_f_one_b(4, 7), zero_bubble(4, 7), dualpipe(4, 10), dualpipev(3, 7)}) {
    const std::vector<Program> programs = programs_of(layout);
    for (const Program& program : programs) {
      std::vector<std::pair<int, int>> trained, evaluated;
      for (const Instruction& i : program.training) {
        if (i.op == Op::kForward || i.op == Op::kOverlapped)
          trained.emplace_back(i.direction, i.microbatch);
      }
      for (const Instruction& i : program.evaluation) {
        if (i.op == Op::kForward) evaluated.emplace_back(i.direction, i.microbatch);
        EXPECT_NE(i.op, Op::kOverlapped);
        EXPECT_NE(i.op, Op::kBackward);
        EXPECT_NE(i.op, Op::kOptimizerStep);
      }
      EXPECT_EQ(trained, evaluated);
      EXPECT_EQ(program.evaluation.back().op, Op::kReduceGradients);
    }
  }
}

TEST(ScheduleTest, ImpossibleLayoutsAreRefusedWithTheRuleBroken) {
  const auto message = [](const ParallelismSpec& layout) {
    return make_program(layout, 0).status().message();
  };
  EXPECT_NE(message(dualpipe(3, 8)).find("even pipeline"), std::string::npos);
  EXPECT_NE(message(zero_bubble(4, 3)).find("at least 4"), std::string::npos);
  EXPECT_NE(message(dualpipev(3, 5)).find("at least 6"), std::string::npos);
  EXPECT_NE(message(dualpipe(4, 9)).find("even number of micro-batches"), std::string::npos);
  EXPECT_NE(message(dualpipe(4, 6)).find("at least 8"), std::string::npos);
  EXPECT_NE(message(one_f_one_b(4, 3)).find("at least 4"), std::string::npos);
  EXPECT_NE(message(one_f_one_b(1 << 10, 1 << 10)).find("at most 131072"), std::string::npos);
  EXPECT_NE(message(one_f_one_b(INT64_MAX, INT64_MAX)).find("at most 131072"), std::string::npos);
  EXPECT_FALSE(make_program(one_f_one_b(0, 3), 0).ok());
  EXPECT_FALSE(make_program(one_f_one_b(2, 3), 2).ok());
  EXPECT_FALSE(make_program(one_f_one_b(2, 3), -1).ok());
}

TEST(InstructionTest, PrintsInTheNotationOfTheTables) {
  EXPECT_EQ(to_string(Instruction{.op = Op::kForward, .direction = 0, .microbatch = 3}), "F0.3");
  EXPECT_EQ(to_string(Instruction{.op = Op::kBackward, .direction = 1, .microbatch = 2}), "B1.2");
  EXPECT_EQ(to_string(Instruction{.op = Op::kBackwardInput, .direction = 1, .microbatch = 0}),
            "b1.0");
  EXPECT_EQ(to_string(Instruction{.op = Op::kBackwardWeight}), "W");
  EXPECT_EQ(to_string(Instruction{.op = Op::kOverlapped,
                                  .direction = 0,
                                  .microbatch = 4,
                                  .backward_direction = 1,
                                  .backward_microbatch = 2}),
            "{F0.4 B1.2}");
  EXPECT_EQ(
      to_string(Instruction{.op = Op::kReceiveForward, .direction = 0, .microbatch = 3, .peer = 1}),
      "recvF0.3<1");
  EXPECT_EQ(
      to_string(Instruction{.op = Op::kSendBackward, .direction = 1, .microbatch = 5, .peer = 0}),
      "sendB1.5>0");
}

}  // namespace
}  // namespace penstock
