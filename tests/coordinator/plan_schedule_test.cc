#include "coordinator/plan/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "comm/base/random.h"
#include "comm/run/layout.h"
#include "tests/coordinator/plan_simulator.h"

namespace penstock {
namespace {

ParallelismSpec dualpipe(int64_t pipeline, int64_t microbatches) {
  return {.pipeline = pipeline, .schedule = Schedule::kDualPipe, .microbatches = microbatches};
}
ParallelismSpec dualpipev(int64_t pipeline, int64_t microbatches) {
  return {.pipeline = pipeline, .schedule = Schedule::kDualPipeV, .microbatches = microbatches};
}
ParallelismSpec zero_bubble(int64_t pipeline, int64_t microbatches) {
  return {.pipeline = pipeline, .schedule = Schedule::kZeroBubble, .microbatches = microbatches};
}
ParallelismSpec one_f_one_b(int64_t pipeline, int64_t microbatches) {
  return {.pipeline = pipeline,
          .schedule = Schedule::kOneForwardOneBackward,
          .microbatches = microbatches};
}

std::vector<Program> programs_of(const ParallelismSpec& parallelism) {
  Result<std::vector<Program>> programs = make_programs(parallelism);
  EXPECT_TRUE(programs.ok()) << programs.status().to_string();
  return programs.ok() ? *programs : std::vector<Program>{};
}

std::vector<ParallelismSpec> every_layout() {
  std::vector<ParallelismSpec> layouts;
  for (const int64_t pipeline : {2, 4, 8, 16}) {
    for (const int64_t more : {0, 2, 4, 6, 10, 26, 88}) {
      layouts.push_back(dualpipe(pipeline, 2 * pipeline + more));
    }
  }
  for (const int64_t pipeline : {1, 2, 3, 4, 8, 16}) {
    for (const int64_t more : {0, 1, 2, 7, 20}) {
      layouts.push_back(one_f_one_b(pipeline, pipeline + more));
      layouts.push_back(zero_bubble(pipeline, pipeline + more));
      layouts.push_back(dualpipev(pipeline, 2 * pipeline + more));
    }
  }
  return layouts;
}

// The compute instructions as the published tables write them: no micro-batch numbers, no
// transfers.
std::string notation(const std::vector<Instruction>& instructions) {
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

TEST(ScheduleTest, EveryLayoutCompletesInTheSimulator) {
  for (const ParallelismSpec& layout : every_layout()) {
    EXPECT_TRUE(simulate(programs_of(layout), {}).completed)
        << layout.pipeline << " ranks, " << layout.microbatches << " micro-batches";
  }
}

TEST(ScheduleTest, EveryMicrobatchRunsForwardBackwardAndWeightOnceInOrder) {
  for (const ParallelismSpec& layout : every_layout()) {
    const auto directions = static_cast<int>(direction_count(layout));
    const auto per_direction = static_cast<int>(microbatches_per_direction(layout));
    for (const Program& program : programs_of(layout)) {
      int next_forward[2] = {0, 0}, next_backward[2] = {0, 0}, weights = 0;
      for (const Instruction& i : program.training) {
        const bool overlapped = i.op == Op::kOverlapped;
        if (i.op == Op::kForward || overlapped) {
          EXPECT_EQ(i.microbatch, next_forward[i.direction]++);
        }
        if (overlapped) {
          EXPECT_EQ(i.backward_microbatch, next_backward[i.backward_direction]++);
        }
        if (i.op == Op::kBackward || i.op == Op::kBackwardInput) {
          EXPECT_EQ(i.microbatch, next_backward[i.direction]++);
        }
        if (i.op == Op::kBackward || i.op == Op::kBackwardWeight || overlapped) ++weights;
      }
      for (int d = 0; d < directions; ++d) {
        EXPECT_EQ(next_forward[d], per_direction);
        EXPECT_EQ(next_backward[d], per_direction);
      }
      EXPECT_EQ(weights, directions * per_direction);
    }
  }
}

TEST(DualPipeScheduleTest, OperationCountsEqualTheClosedForms) {
  for (const ParallelismSpec& layout : every_layout()) {
    if (layout.schedule != Schedule::kDualPipe) continue;
    const int P = static_cast<int>(layout.pipeline), C = static_cast<int>(layout.microbatches),
              H = P / 2;
    const SimulatedStep step = simulate(programs_of(layout), {});
    for (int r = 0; r < P; ++r) {
      const int h = std::min(r, P - 1 - r);
      const int middle = r == H - 1 || r == H ? 1 : 0;
      std::map<Op, int> counts = step.ranks[r].counts;
      EXPECT_EQ(counts[Op::kForward], 3 * H - 1 - h + middle);
      EXPECT_EQ(counts[Op::kOverlapped], C - 3 * H + h + 1 - middle);
      EXPECT_EQ(counts[Op::kBackward], H + middle);
      EXPECT_EQ(counts[Op::kBackwardInput], P - 1 - h);
      EXPECT_EQ(counts[Op::kBackwardWeight], P - 1 - h);
      EXPECT_EQ(step.ranks[r].weight_queue_max, h + 1);
    }
  }
}

TEST(DualPipeScheduleTest, NoRankHoldsMoreThanDepthPlusOneActivations) {
  for (const ParallelismSpec& layout : every_layout()) {
    if (layout.schedule != Schedule::kDualPipe) continue;
    int most = 0;
    for (const SimulatedRank& rank : simulate(programs_of(layout), {}).ranks) {
      EXPECT_LE(rank.live_max, layout.pipeline + 1);
      most = std::max(most, rank.live_max);
    }
    EXPECT_EQ(most, layout.pipeline + 1);
  }
}

TEST(OneForwardOneBackwardScheduleTest, RankHoldsDepthMinusRankActivations) {
  for (const ParallelismSpec& layout : every_layout()) {
    if (layout.schedule != Schedule::kOneForwardOneBackward) continue;
    const SimulatedStep step = simulate(programs_of(layout), {});
    for (int r = 0; r < layout.pipeline; ++r)
      EXPECT_EQ(step.ranks[r].live_max, layout.pipeline - r);
  }
}

TEST(DualPipeScheduleTest, WorstBubbleEqualsTheFormula) {
  for (const ParallelismSpec& layout : every_layout()) {
    if (layout.schedule != Schedule::kDualPipe) continue;
    const std::vector<Program> programs = programs_of(layout);
    for (const double pair : {3.0, 2.5, 2.2}) {
      const OpCosts costs{.forward = 1.0, .backward = 2.0, .backward_weight = 1.0, .pair = pair};
      const double formula = (static_cast<double>(layout.pipeline) / 2 - 1) *
                             (pair + costs.backward - 3 * costs.backward_weight);
      EXPECT_NEAR(simulate(programs, costs).worst_bubble(), formula, 1e-9)
          << "P " << layout.pipeline << " C " << layout.microbatches << " pair " << pair;
    }
  }
}

TEST(OneForwardOneBackwardScheduleTest, WorstBubbleEqualsTheFormula) {
  for (const ParallelismSpec& layout : every_layout()) {
    if (layout.schedule != Schedule::kOneForwardOneBackward) continue;
    EXPECT_NEAR(simulate(programs_of(layout), {}).worst_bubble(),
                static_cast<double>(layout.pipeline - 1) * 3.0, 1e-9);
  }
}

TEST(ScheduleTest, EvaluationRunsTheSameForwardsInTheSameOrderAndNothingBackward) {
  for (const ParallelismSpec& layout : every_layout()) {
    for (const Program& program : programs_of(layout)) {
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
  EXPECT_FALSE(make_program(one_f_one_b(0, 3), 0).ok());
  EXPECT_FALSE(make_program(one_f_one_b(2, 3), 2).ok());
  EXPECT_FALSE(make_program(one_f_one_b(2, 3), -1).ok());
}

// --- the validator against damaged programs
// -----------------------------------------------------------------------

struct Damage {
  std::vector<Program> programs;
  std::vector<Instruction>& of(size_t rank, bool training) {
    return training ? programs[rank].training : programs[rank].evaluation;
  }
};

template <typename Mutate>
void expect_every_mutation_caught(const Mutate& mutate) {
  for (const ParallelismSpec& layout :
       {dualpipe(4, 10), dualpipe(2, 6), dualpipev(3, 7), one_f_one_b(3, 5), zero_bubble(3, 5)}) {
    const std::vector<Program> good = programs_of(layout);
    for (size_t rank = 0; rank < good.size(); ++rank) {
      for (const bool training : {true, false}) {
        Damage damage{good};
        const size_t size = damage.of(rank, training).size();
        for (size_t i = 0; i < size; ++i) {
          damage.programs = good;
          if (!mutate(damage.of(rank, training), i)) continue;  // nothing to change there
          EXPECT_FALSE(check_programs(layout, damage.programs).ok())
              << "P " << layout.pipeline << " rank " << rank << " instruction " << i << " training "
              << training;
        }
      }
    }
  }
}

TEST(CheckProgramsTest, CatchesEveryDroppedInstruction) {
  expect_every_mutation_caught([](std::vector<Instruction>& program, size_t i) {
    program.erase(program.begin() + static_cast<ptrdiff_t>(i));
    return true;
  });
}

TEST(CheckProgramsTest, CatchesEveryRepeatedInstruction) {
  expect_every_mutation_caught([](std::vector<Instruction>& program, size_t i) {
    const Instruction repeated = program[i];
    program.insert(program.begin() + static_cast<ptrdiff_t>(i), repeated);
    return true;
  });
}

TEST(CheckProgramsTest, CatchesEveryWrongPeer) {
  expect_every_mutation_caught([](std::vector<Instruction>& program, size_t i) {
    if (program[i].peer < 0) return false;
    program[i].peer += 1;
    return true;
  });
}

TEST(CheckProgramsTest, CatchesEveryWrongMicrobatch) {
  expect_every_mutation_caught([](std::vector<Instruction>& program, size_t i) {
    if (program[i].microbatch < 0) return false;
    program[i].microbatch += 1;
    return true;
  });
}

TEST(CheckProgramsTest, CatchesEveryWrongDirection) {
  expect_every_mutation_caught([](std::vector<Instruction>& program, size_t i) {
    if (program[i].microbatch < 0) return false;
    program[i].direction ^= 1;
    return true;
  });
}

// A swap of two instructions of one kind and direction, or of a value's maker and its user, always
// matters.
TEST(CheckProgramsTest, CatchesEverySwapThatChangesAnOrder) {
  expect_every_mutation_caught([](std::vector<Instruction>& program, size_t i) {
    for (size_t j = i + 1; j < program.size(); ++j) {
      const bool same_kind = program[i].op == program[j].op &&
                             program[i].direction == program[j].direction &&
                             program[i].op != Op::kBackwardWeight;
      const bool maker_and_user = program[i].op == Op::kReceiveForward &&
                                  program[j].op == Op::kForward &&
                                  program[i].direction == program[j].direction;
      if (same_kind || maker_and_user) {
        std::swap(program[i], program[j]);
        return true;
      }
    }
    return false;
  });
}

TEST(CheckProgramsTest, CatchesProgramsThatWaitInACircle) {
  const ParallelismSpec layout = one_f_one_b(2, 2);
  std::vector<Program> programs = programs_of(layout);
  // Rank 0 waits for gradient 0 before it sends activation 1, rank 1 wants both activations before
  // the first gradient.
  std::vector<Instruction>& first = programs[0].training;
  const auto at = [](std::vector<Instruction>& program, Op op, int32_t microbatch) {
    return std::find_if(program.begin(), program.end(), [&](const Instruction& i) {
      return i.op == op && i.microbatch == microbatch;
    });
  };
  Instruction gradient = *at(first, Op::kReceiveBackward, 0);
  first.erase(at(first, Op::kReceiveBackward, 0));
  first.insert(at(first, Op::kSendForward, 1), gradient);
  std::vector<Instruction>& last = programs[1].training;
  const Instruction activation = *at(last, Op::kReceiveForward, 1);
  last.erase(at(last, Op::kReceiveForward, 1));
  last.insert(at(last, Op::kForward, 0), activation);
  const Status status = check_programs(layout, programs);
  EXPECT_NE(status.message().find("deadlock"), std::string::npos) << status.to_string();
}

TEST(CheckProgramsTest, CatchesAMissingRankAndARankOutOfPlace) {
  const ParallelismSpec layout = dualpipe(4, 8);
  std::vector<Program> programs = programs_of(layout);
  std::swap(programs[1], programs[2]);
  EXPECT_FALSE(check_programs(layout, programs).ok());
  std::swap(programs[1], programs[2]);
  programs.pop_back();
  EXPECT_FALSE(check_programs(layout, programs).ok());
}

TEST(CheckProgramsTest, NamesRankPositionAndInstruction) {
  const ParallelismSpec layout = one_f_one_b(2, 2);
  std::vector<Program> programs = programs_of(layout);
  programs[1].training[0].peer = 7;
  EXPECT_EQ(check_programs(layout, programs).message(),
            "program of pipeline rank 1, instruction 0 (recvF0.0<7): wrong peer");
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
