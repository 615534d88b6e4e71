// What every schedule promises, at random depths, micro-batch counts and operation costs.
#include <rapidcheck.h>

#include <algorithm>
#include <array>
#include <map>

#include "tests/coordinator/plan_test_support.h"

namespace penstock {
namespace {

int64_t between(int64_t min, int64_t max) {
  return *rc::gen::inRange<int64_t>(min, max + 1);
}

// With any number of micro-batches that the schedule allows.
ParallelismSpec any_layout(Schedule schedule, int64_t pipeline) {
  ParallelismSpec layout = pipeline_of(schedule, pipeline, 0);
  const int64_t more = *rc::gen::weightedOneOf<int64_t>(
      {{1, rc::gen::just<int64_t>(0)}, {4, rc::gen::inRange<int64_t>(1, 40)}});
  layout.microbatches = direction_count(layout) * pipeline + more;
  if (schedule == Schedule::kDualPipe) layout.microbatches += layout.microbatches % 2;
  return layout;
}

constexpr Schedule kDualPipes[] = {Schedule::kDualPipe, Schedule::kDualPipeV};

// Checks `property(layout)` at every depth of every schedule.
template <typename Schedules, typename Property>
void holds_for(const Schedules& schedules, const Property& property) {
  for (const Schedule schedule : schedules) {
    for (const int64_t pipeline : {1, 2, 3, 4, 8, 16, 32}) {
      if (schedule == Schedule::kDualPipe && pipeline == 3) continue;
      EXPECT_TRUE(rc::check([&] { property(any_layout(schedule, pipeline)); }))
          << to_string(schedule) << " over " << pipeline << " ranks";
    }
  }
}

// A length in sixteenths, so that every sum of lengths is exact.
double length(int64_t sixteenths_min, int64_t sixteenths_max) {
  return static_cast<double>(between(sixteenths_min, sixteenths_max)) / 16;
}

OperationCosts costs_of(double forward, double backward_input, double backward_weight) {
  OperationCosts costs{.forward = forward,
                       .backward = backward_input + backward_weight,
                       .backward_input = backward_input,
                       .backward_weight = backward_weight};
  const double shortest = std::max(costs.forward, costs.backward);
  costs.pair = shortest + length(0, 16) / 16 * (costs.forward + costs.backward - shortest);
  return costs;
}

// Results that leave before the last weight part, and none from a pair before a backward's time.
OperationCosts with_tails(OperationCosts costs) {
  costs.backward_tail = length(0, 16) * costs.backward_weight;
  costs.pair_tail = length(0, 16) * std::min(costs.backward_weight, costs.pair - costs.backward);
  return costs;
}

// Any lengths, stages of unequal length, sends that take time.
OperationCosts any_costs(const ParallelismSpec& layout) {
  OperationCosts costs = with_tails(costs_of(length(1, 64), length(1, 64), length(1, 64)));
  costs.send = length(0, 32);
  costs.reduce = length(0, 32);
  costs.optimizer = length(0, 32);
  for (int64_t stage = 0; stage < stage_count(layout); ++stage) {
    costs.stage_factors.push_back(length(8, 32));
  }
  return costs;
}

Timeline run(const ParallelismSpec& layout, const OperationCosts& costs,
             ProgramKind kind = ProgramKind::kTraining) {
  const auto programs = make_programs(layout);
  if (!programs.ok()) RC_FAIL(text_of(layout) + ": " + programs.status().message());
  const auto timeline = run_in_virtual_time(layout, *programs, kind, costs);
  if (!timeline.ok()) RC_FAIL(text_of(layout) + ": " + timeline.status().message());
  return *timeline;
}

void expect_equal(double value, double wanted, const ParallelismSpec& layout) {
  if (std::abs(value - wanted) > 1e-9 * std::max(1.0, std::abs(wanted))) {
    RC_FAIL(fmt::format("{}: {} instead of {}", text_of(layout), value, wanted));
  }
}

TEST(SchedulePropertyTest, EveryScheduleCompletesWhateverOperationsCost) {
  holds_for(kSchedules, [](const ParallelismSpec& layout) {
    const OperationCosts costs = any_costs(layout);
    for (const ProgramKind kind : {ProgramKind::kTraining, ProgramKind::kEvaluation}) {
      const Timeline timeline = run(layout, costs, kind);
      for (const RankTimeline& rank : timeline.ranks) {
        RC_ASSERT(rank.idle >= -1e-9);
        for (size_t i = 1; i < rank.spans.size(); ++i) {
          RC_ASSERT(rank.spans[i - 1].end <= rank.spans[i].begin);
        }
      }
    }
  });
}

TEST(SchedulePropertyTest, EveryMicrobatchRunsForwardBackwardAndWeightOnceInOrder) {
  holds_for(kSchedules, [](const ParallelismSpec& layout) {
    const int64_t count = microbatches_per_direction(layout);
    for (const Program& program : programs_of(layout)) {
      std::map<int, int64_t> forwards, backwards, weights;
      std::vector<std::pair<int, int64_t>> queue;
      const auto backward = [&](int direction, int64_t microbatch) {
        RC_ASSERT(microbatch == backwards[direction]++);
        RC_ASSERT(microbatch < forwards[direction]);
      };
      const auto weight = [&](int direction, int64_t microbatch) {
        RC_ASSERT(microbatch == weights[direction]++);
      };
      for (const Instruction& i : program.training) {
        if (i.op == Op::kForward || i.op == Op::kOverlapped) {
          RC_ASSERT(i.microbatch == forwards[i.direction]++);
        }
        if (i.op == Op::kBackward || i.op == Op::kBackwardInput)
          backward(i.direction, i.microbatch);
        if (i.op == Op::kOverlapped) backward(i.backward_direction, i.backward_microbatch);
        if (i.op == Op::kBackward) weight(i.direction, i.microbatch);
        if (i.op == Op::kOverlapped) weight(i.backward_direction, i.backward_microbatch);
        if (i.op == Op::kBackwardInput) queue.emplace_back(i.direction, i.microbatch);
        if (i.op == Op::kBackwardWeight) {
          RC_ASSERT(!queue.empty());
          weight(queue.front().first, queue.front().second);
          queue.erase(queue.begin());
        }
      }
      RC_ASSERT(queue.empty());
      for (int d = 0; d < direction_count(layout); ++d) {
        RC_ASSERT(forwards[d] == count);
        RC_ASSERT(backwards[d] == count);
        RC_ASSERT(weights[d] == count);
      }
    }
  });
}

std::map<Op, int64_t> counts_of(const Program& program) {
  std::map<Op, int64_t> counts;
  for (const Instruction& i : program.training) ++counts[i.op];
  return counts;
}

// H ranks from an end to the middle, h from the end, n micro-batches per direction.
std::map<Op, int64_t> two_direction_counts(int64_t H, int64_t h, int64_t n) {
  const int64_t middle = h == H - 1 ? 1 : 0;  // its first pair is not overlapped
  return {{Op::kForward, 3 * H - 1 - h + middle},
          {Op::kOverlapped, 2 * n - 3 * H + h + 1 - middle},
          {Op::kBackward, H + middle},
          {Op::kBackwardInput, 2 * H - 1 - h},
          {Op::kBackwardWeight, 2 * H - 1 - h}};
}

TEST(SchedulePropertyTest, OperationCountsEqualTheClosedForms) {
  holds_for(kSchedules, [](const ParallelismSpec& layout) {
    const int64_t P = layout.pipeline, n = microbatches_per_direction(layout);
    for (const Program& program : programs_of(layout)) {
      const int64_t rank = program.pipeline_index;
      std::map<Op, int64_t> wanted;
      switch (layout.schedule) {
        case Schedule::kOneForwardOneBackward:
          wanted = {{Op::kForward, n}, {Op::kBackward, n}};
          break;
        case Schedule::kZeroBubble:
          wanted = {{Op::kForward, n}, {Op::kBackwardInput, n}, {Op::kBackwardWeight, n}};
          break;
        case Schedule::kDualPipe:
          wanted = P == 1 ? std::map<Op, int64_t>{{Op::kForward, n}, {Op::kBackward, n}}
                          : two_direction_counts(P / 2, std::min(rank, P - 1 - rank), n);
          break;
        case Schedule::kDualPipeV:
          wanted = two_direction_counts(P, rank, n);
          break;
      }
      std::map<Op, int64_t> counts = counts_of(program);
      for (const auto& [op, count] : wanted) RC_ASSERT(counts[op] == count);
      for (const Op op : {Op::kForward, Op::kBackward, Op::kBackwardInput, Op::kBackwardWeight,
                          Op::kOverlapped}) {
        RC_ASSERT(wanted.contains(op) || counts[op] == 0);
      }
      RC_ASSERT(counts[Op::kReduceGradients] == 1 && counts[Op::kOptimizerStep] == 1);
    }
  });
}

TEST(SchedulePropertyTest, LiveActivationsEqualTheClosedForms) {
  holds_for(kSchedules, [](const ParallelismSpec& layout) {
    const Timeline timeline = run(layout, any_costs(layout));
    for (int64_t rank = 0; rank < layout.pipeline; ++rank) {
      const int64_t live = timeline.ranks[rank].live_max;
      switch (layout.schedule) {
        case Schedule::kOneForwardOneBackward:
          RC_ASSERT(live == layout.pipeline - rank);
          break;
        case Schedule::kZeroBubble:
          RC_ASSERT(live == layout.pipeline);
          break;
        case Schedule::kDualPipe:
        case Schedule::kDualPipeV:
          RC_ASSERT(live == (direction_count(layout) == 1 ? 1 : stage_count(layout) + 1));
          break;
      }
    }
  });
}

TEST(SchedulePropertyTest, TheWeightQueueIsAsLongAsPublished) {
  holds_for(kSchedules, [](const ParallelismSpec& layout) {
    const Timeline timeline = run(layout, {});
    const int64_t P = layout.pipeline;
    for (int64_t rank = 0; rank < P; ++rank) {
      const int64_t from_the_end =
          layout.schedule == Schedule::kDualPipe ? std::min(rank, P - 1 - rank) : rank;
      const bool queues = layout.schedule == Schedule::kZeroBubble || direction_count(layout) == 2;
      RC_ASSERT(timeline.ranks[rank].weight_queue_max == (queues ? from_the_end + 1 : 0));
    }
  });
}

TEST(SchedulePropertyTest, The1f1bBubbleEqualsTheFormulaWhateverOperationsCost) {
  holds_for(std::array{Schedule::kOneForwardOneBackward}, [](const ParallelismSpec& layout) {
    const OperationCosts costs = with_tails(costs_of(length(1, 64), length(1, 64), length(1, 64)));
    expect_equal(run(layout, costs).bubble(), bubble_by_formula(layout, costs), layout);
  });
}

TEST(SchedulePropertyTest, TheZb1pBubbleEqualsTheFormulaUnlessAWeightPartIsTheLongest) {
  holds_for(std::array{Schedule::kZeroBubble}, [](const ParallelismSpec& layout) {
    const double weight = length(1, 64);
    const OperationCosts costs =
        with_tails(costs_of(weight + length(0, 64), weight + length(0, 64), weight));
    expect_equal(run(layout, costs).bubble(), bubble_by_formula(layout, costs), layout);
  });
}

TEST(SchedulePropertyTest, TheDualPipeBubbleEqualsTheFormulaWhereForwardsCostAsMuchAsInputParts) {
  holds_for(kDualPipes, [](const ParallelismSpec& layout) {
    const double forward = length(1, 64);
    const OperationCosts costs = costs_of(forward, forward, forward * length(0, 16) / 16);
    expect_equal(run(layout, costs).bubble(), bubble_by_formula(layout, costs), layout);
  });
}

TEST(SchedulePropertyTest, TheDualPipeBubbleIsShorterByTheTailOfAPairAtEveryHop) {
  holds_for(kDualPipes, [](const ParallelismSpec& layout) {
    const double all = length(1, 64);
    const OperationCosts costs = with_tails(costs_of(all, all, all));
    expect_equal(run(layout, costs).bubble(), bubble_by_formula(layout, costs), layout);
  });
}

TEST(SchedulePropertyTest, LongerInputPartsMakeTheDualPipeBubbleAtMostOneTailOfABackwardShorter) {
  holds_for(kDualPipes, [](const ParallelismSpec& layout) {
    const double weight = length(1, 64), forward = weight + length(0, 64);
    const OperationCosts costs = with_tails(costs_of(forward, forward, weight));
    const double bubble = run(layout, costs).bubble();
    RC_ASSERT(bubble <= bubble_by_formula(layout, costs) + 1e-9);
    RC_ASSERT(bubble >= bubble_by_formula(layout, costs) - costs.backward_tail - 1e-9);
  });
}

double hops_to_the_middle(const ParallelismSpec& layout) {
  return direction_count(layout) == 1 ? 0.0 : static_cast<double>(stage_count(layout)) / 2 - 1;
}

TEST(SchedulePropertyTest, LongerForwardsMakeTheDualPipeBubbleWaitForForwardsInstead) {
  holds_for(kDualPipes, [](const ParallelismSpec& layout) {
    const double weight = length(1, 64), input = weight + length(0, 64);
    const OperationCosts costs = costs_of(input + length(0, 64), input, weight);
    expect_equal(run(layout, costs).bubble(),
                 hops_to_the_middle(layout) * (costs.pair + costs.forward - 2 * weight), layout);
  });
}

TEST(SchedulePropertyTest, ShorterForwardsMakeTheDualPipeFormulaAnUpperBound) {
  holds_for(kDualPipes, [](const ParallelismSpec& layout) {
    const double weight = length(1, 64), forward = weight + length(0, 64);
    const OperationCosts costs = costs_of(forward, forward + length(0, 64), weight);
    const double bubble = run(layout, costs).bubble();
    RC_ASSERT(bubble <= bubble_by_formula(layout, costs) + 1e-9);
    RC_ASSERT(bubble >= hops_to_the_middle(layout) * (costs.pair + forward - 2 * weight) - 1e-9);
  });
}

}  // namespace
}  // namespace penstock
