#include "coordinator/plan/virtual_time.h"

#include <algorithm>

#include "tests/coordinator/plan_test_support.h"

namespace penstock {
namespace {

constexpr double kAccuracy = 1e-9;

// When each compute instruction of a rank begins: "F0.0@0 F0.1@1 …".
std::string starts(const std::vector<Instruction>& program, const RankTimeline& rank) {
  std::string text;
  for (size_t i = 0; i < program.size(); ++i) {
    if (program[i].peer < 0)
      text += fmt::format("{}@{} ", to_string(program[i]), rank.spans[i].begin);
  }
  if (!text.empty()) text.pop_back();
  return text;
}

TEST(VirtualTimeTest, TwoRanksOf1f1bStartWhenAPersonWouldSay) {
  const ParallelismSpec layout = one_f_one_b(2, 2);
  const std::vector<Program> programs = programs_of(layout);
  const Timeline timeline = timeline_of(layout);
  EXPECT_EQ(starts(programs[0].training, timeline.ranks[0]),
            "F0.0@0 F0.1@1 B0.0@4 B0.1@7 reduce@9 optimizer@9");
  EXPECT_EQ(starts(programs[1].training, timeline.ranks[1]),
            "F0.0@1 B0.0@2 F0.1@4 B0.1@5 reduce@9 optimizer@9");
  EXPECT_EQ(timeline.makespan, 9.0);
  EXPECT_EQ(timeline.ranks[0].busy, 6.0);
  EXPECT_EQ(timeline.ranks[0].idle, 3.0);
  EXPECT_EQ(timeline.bubble(), 3.0);
}

TEST(VirtualTimeTest, ASendTakesTimeButNoCompute) {
  const ParallelismSpec layout = one_f_one_b(2, 2);
  const std::vector<Program> programs = programs_of(layout);
  const Timeline timeline = timeline_of(layout, {.send = 0.5});
  EXPECT_EQ(starts(programs[0].training, timeline.ranks[0]),
            "F0.0@0 F0.1@1 B0.0@5 B0.1@8 reduce@10 optimizer@10");
  EXPECT_EQ(timeline.ranks[0].busy, 6.0);
}

TEST(VirtualTimeTest, AGradientLeavesBeforeTheTailOfItsBackward) {
  const ParallelismSpec layout = one_f_one_b(2, 2);
  const std::vector<Program> programs = programs_of(layout);
  const Timeline timeline = timeline_of(layout, {.backward_tail = 0.5});
  EXPECT_EQ(starts(programs[0].training, timeline.ranks[0]),
            "F0.0@0 F0.1@1 B0.0@3.5 B0.1@6.5 reduce@8.5 optimizer@8.5");
  EXPECT_EQ(starts(programs[1].training, timeline.ranks[1]),
            "F0.0@1 B0.0@2 F0.1@4 B0.1@5 reduce@8.5 optimizer@8.5");
}

TEST(VirtualTimeTest, ATailIsAsMuchLongerAsItsStage) {
  const ParallelismSpec layout = one_f_one_b(2, 2);
  const std::vector<Program> programs = programs_of(layout);
  const Timeline timeline =
      timeline_of(layout, {.backward_tail = 0.5, .stage_factors = {1.0, 2.0}});
  EXPECT_EQ(starts(programs[0].training, timeline.ranks[0]),
            "F0.0@0 F0.1@1 B0.0@6 B0.1@12 reduce@14 optimizer@14");
}

TEST(VirtualTimeTest, AnInputPartHasNoTail) {
  const OperationCosts tails = {.backward_tail = 1.0, .pair_tail = 1.0};
  EXPECT_EQ(timeline_of(zero_bubble(8, 20), tails).makespan,
            timeline_of(zero_bubble(8, 20)).makespan);
}

TEST(VirtualTimeTest, OutputAndGradientOfAPairLeaveBeforeItsTail) {
  EXPECT_NEAR(timeline_of(dualpipe(8, 20), {.pair_tail = 0.5}).bubble(), 4.5, kAccuracy);
  EXPECT_NEAR(timeline_of(dualpipe(8, 20), {.pair_tail = 0.25}).bubble(), 5.25, kAccuracy);
  EXPECT_NEAR(timeline_of(dualpipe(8, 20), {.backward_tail = 0.5}).bubble(), 6.0, kAccuracy);
  EXPECT_NEAR(timeline_of(dualpipev(4, 10), {.pair_tail = 0.5}).bubble(), 4.5, kAccuracy);
}

TEST(VirtualTimeTest, AReceiveLastsAsLongAsItWaits) {
  const ParallelismSpec layout = one_f_one_b(2, 2);
  const std::vector<Program> programs = programs_of(layout);
  const Timeline timeline = timeline_of(layout);
  const auto& program = programs[0].training;
  const auto receive = std::find_if(program.begin(), program.end(), [](const Instruction& i) {
    return i.op == Op::kReceiveBackward;
  });
  const Span span = timeline.ranks[0].spans[static_cast<size_t>(receive - program.begin())];
  EXPECT_EQ(span.begin, 2.0);
  EXPECT_EQ(span.end, 4.0);
}

TEST(VirtualTimeTest, EveryRankReducesTogetherAndUpdatesAfterwards) {
  const Timeline timeline = timeline_of(dualpipe(4, 8), {.reduce = 2.0, .optimizer = 1.0});
  const Timeline bare = timeline_of(dualpipe(4, 8));
  EXPECT_NEAR(timeline.makespan, bare.makespan + 3.0, kAccuracy);
  EXPECT_NEAR(timeline.bubble(), bare.bubble(), kAccuracy);
  for (const RankTimeline& rank : timeline.ranks) {
    EXPECT_NEAR(rank.spans.back().begin, bare.makespan + 2.0, kAccuracy);
  }
}

TEST(VirtualTimeTest, AStageTwiceAsLongSlowsThePassesOfThatStage) {
  const ParallelismSpec layout = one_f_one_b(2, 2);
  const std::vector<Program> programs = programs_of(layout);
  const Timeline timeline = timeline_of(layout, {.stage_factors = {1.0, 2.0}});
  EXPECT_EQ(starts(programs[1].training, timeline.ranks[1]),
            "F0.0@1 B0.0@3 F0.1@7 B0.1@9 reduce@15 optimizer@15");
}

TEST(VirtualTimeTest, AWeightPartTakesTheTimeOfItsOwnStage) {
  const ParallelismSpec layout = dualpipe(2, 4);
  const Timeline timeline = timeline_of(layout, {.stage_factors = {1.0, 4.0}});
  const std::vector<Program> programs = programs_of(layout);
  const std::vector<Instruction>& program = programs[0].training;
  for (size_t i = 0; i < program.size(); ++i) {
    if (program[i].op != Op::kBackwardWeight) continue;
    const Span span = timeline.ranks[0].spans[i];  // of direction 0: its only queued part
    EXPECT_EQ(span.end - span.begin, 1.0);
  }
}

TEST(VirtualTimeTest, APairOfUnequalStagesTakesTheirWeightedMean) {
  const ParallelismSpec layout = dualpipe(2, 4);
  const Timeline timeline =
      timeline_of(layout, {.forward = 1.0, .backward = 2.0, .pair = 2.4, .stage_factors = {1, 4}});
  const std::vector<Program> programs = programs_of(layout);
  const std::vector<Instruction>& program = programs[0].training;
  const auto pair = std::find_if(program.begin(), program.end(),
                                 [](const Instruction& i) { return i.op == Op::kOverlapped; });
  ASSERT_NE(pair, program.end());
  ASSERT_EQ(to_string(*pair), "{F1.1 B0.0}");  // forward on stage 1, backward on stage 0
  const Span span = timeline.ranks[0].spans[static_cast<size_t>(pair - program.begin())];
  EXPECT_NEAR(span.end - span.begin, 2.4 * (1.0 / 3 * 4 + 2.0 / 3 * 1), kAccuracy);
}

TEST(VirtualTimeTest, AnEvaluationRunsForwardsOnly) {
  const Timeline timeline = timeline_of(dualpipe(4, 8), {}, ProgramKind::kEvaluation);
  for (const RankTimeline& rank : timeline.ranks) EXPECT_EQ(rank.busy, 8.0);
}

TEST(VirtualTimeTest, EightDualPipeRanksIdleAsPublished) {
  for (const auto& [pair, bubble] : {std::pair{3.0, 6.0}, {2.5, 4.5}, {2.2, 3.6}}) {
    EXPECT_NEAR(timeline_of(dualpipe(8, 20), {.pair = pair}).bubble(), bubble, kAccuracy);
    EXPECT_NEAR(timeline_of(dualpipev(4, 10), {.pair = pair}).bubble(), bubble, kAccuracy);
  }
}

TEST(VirtualTimeTest, FormulasOfTheDefaultCosts) {
  EXPECT_EQ(bubble_by_formula(one_f_one_b(8, 20), {}), 21.0);
  EXPECT_EQ(bubble_by_formula(zero_bubble(8, 20), {}), 7.0);
  EXPECT_EQ(bubble_by_formula(dualpipe(8, 20), {}), 6.0);
  EXPECT_EQ(bubble_by_formula(dualpipev(8, 20), {}), 14.0);
  EXPECT_EQ(bubble_by_formula(dualpipe(1, 20), {}), 0.0);
  const OperationCosts tails = {.backward_tail = 0.5, .pair_tail = 0.25};
  EXPECT_EQ(bubble_by_formula(one_f_one_b(8, 20), tails), 17.5);
  EXPECT_EQ(bubble_by_formula(zero_bubble(8, 20), tails), 7.0);
  EXPECT_EQ(bubble_by_formula(dualpipe(8, 20), tails), 5.25);
  EXPECT_EQ(bubble_by_formula(dualpipev(8, 20), tails), 12.25);
}

// A weight part longer than a forward keeps the rank before waiting, which the formula leaves out.
TEST(VirtualTimeTest, LongWeightPartsMakeZb1pIdleLongerThanTheFormula) {
  const OperationCosts costs{
      .forward = 1.0, .backward = 3.0, .backward_input = 1.0, .backward_weight = 2.0};
  EXPECT_GT(timeline_of(zero_bubble(4, 8), costs).bubble(),
            bubble_by_formula(zero_bubble(4, 8), costs) + 0.5);
}

}  // namespace
}  // namespace penstock
