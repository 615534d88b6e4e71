// check_programs() against programs damaged in one place.
//
// What it lets through must mean the same (plan_meaning.h). Of damages that change, drop or repeat
// one instruction it lets through none. Of swaps of two neighbours it lets through exactly those of
// independent() instructions.
#include <rapidcheck.h>

#include <algorithm>
#include <functional>

#include "tests/coordinator/plan_meaning.h"
#include "tests/coordinator/plan_test_support.h"

namespace penstock {
namespace {

std::vector<ParallelismSpec> small_layouts() {
  return {one_f_one_b(1, 2), one_f_one_b(3, 4), zero_bubble(1, 2), zero_bubble(4, 5),
          dualpipe(2, 6),    dualpipe(4, 10),   dualpipev(1, 3),   dualpipev(3, 7)};
}

constexpr ProgramKind kKinds[] = {ProgramKind::kTraining, ProgramKind::kEvaluation};

std::vector<Instruction>& list_of(Program& program, ProgramKind kind) {
  return kind == ProgramKind::kTraining ? program.training : program.evaluation;
}

// Calls `visit(layout, good programs, rank, kind, position)` for every instruction there is.
void for_every_instruction(
    const std::function<void(const ParallelismSpec&, const std::vector<Program>&, size_t,
                             ProgramKind, size_t)>& visit) {
  for (const ParallelismSpec& layout : small_layouts()) {
    const std::vector<Program> good = programs_of(layout);
    for (size_t rank = 0; rank < good.size(); ++rank) {
      for (const ProgramKind kind : kKinds) {
        for (size_t i = 0; i < instructions_of(good[rank], kind).size(); ++i) {
          visit(layout, good, rank, kind, i);
        }
      }
    }
  }
}

using Damage = std::function<void(std::vector<Instruction>&, size_t position)>;

void expect_caught(const ParallelismSpec& layout, std::vector<Program> programs, size_t rank,
                   ProgramKind kind, size_t position, const Damage& damage) {
  std::vector<Instruction>& list = list_of(programs[rank], kind);
  const std::string before = to_string(list[position]);
  damage(list, position);
  EXPECT_FALSE(check_programs(layout, programs).ok())
      << text_of(layout) << ", rank " << rank << ", instruction " << position << ", was " << before
      << (position < list.size() ? ", became " + to_string(list[position]) : "");
}

TEST(CheckProgramsTest, CatchesEveryDroppedInstruction) {
  for_every_instruction([](const auto& layout, const auto& good, size_t rank, auto kind, size_t i) {
    expect_caught(layout, good, rank, kind, i, [](std::vector<Instruction>& list, size_t at) {
      list.erase(list.begin() + static_cast<ptrdiff_t>(at));
    });
  });
}

TEST(CheckProgramsTest, CatchesEveryRepeatedInstruction) {
  for_every_instruction([](const auto& layout, const auto& good, size_t rank, auto kind, size_t i) {
    expect_caught(layout, good, rank, kind, i, [](std::vector<Instruction>& list, size_t at) {
      const Instruction repeated = list[at];
      list.insert(list.begin() + static_cast<ptrdiff_t>(at), repeated);
    });
  });
}

// Every other value that a field can have, and some that it cannot.
template <typename Field>
void expect_every_other_value_caught(Field Instruction::*field, const std::vector<Field>& values) {
  for_every_instruction([&](const auto& layout, const auto& good, size_t rank, auto kind,
                            size_t i) {
    for (const Field value : values) {
      if (instructions_of(good[rank], kind)[i].*field == value) continue;
      expect_caught(layout, good, rank, kind, i,
                    [&](std::vector<Instruction>& list, size_t at) { list[at].*field = value; });
    }
  });
}

TEST(CheckProgramsTest, CatchesEveryWrongPeer) {
  expect_every_other_value_caught(&Instruction::peer, {-2, -1, 0, 1, 2, 3, 4, 99});
}

TEST(CheckProgramsTest, CatchesEveryWrongMicrobatch) {
  const std::vector<int32_t> values = {-2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 1 << 30};
  expect_every_other_value_caught(&Instruction::microbatch, values);
  expect_every_other_value_caught(&Instruction::backward_microbatch, values);
}

TEST(CheckProgramsTest, CatchesEveryWrongDirection) {
  expect_every_other_value_caught<uint8_t>(&Instruction::direction, {0, 1, 2, 255});
  expect_every_other_value_caught<uint8_t>(&Instruction::backward_direction, {0, 1, 2, 255});
}

TEST(CheckProgramsTest, CatchesEveryWrongOperation) {
  std::vector<Op> values;
  for (int op = 0; op <= static_cast<int>(Op::kOptimizerStep) + 1; ++op) {
    values.push_back(static_cast<Op>(op));
  }
  expect_every_other_value_caught(&Instruction::op, values);
}

// --- swaps

enum class Line {
  kReceiveForward,
  kForward,
  kSendForward,
  kReceiveBackward,
  kBackward,
  kWeight,
  kSendBackward,
  kBarrier
};

// One thing that an instruction does, for a micro-batch of a direction.
struct Act {
  Line line;
  int direction;
  int microbatch;
};

// `oldest`: the micro-batch whose weight part a kBackwardWeight would run.
std::vector<Act> acts_of(const Instruction& i, const Act& oldest) {
  const auto act = [&](Line line) { return Act{line, i.direction, i.microbatch}; };
  switch (i.op) {
    case Op::kReceiveForward:
      return {act(Line::kReceiveForward)};
    case Op::kForward:
      return {act(Line::kForward)};
    case Op::kSendForward:
      return {act(Line::kSendForward)};
    case Op::kReceiveBackward:
      return {act(Line::kReceiveBackward)};
    case Op::kBackward:
      return {act(Line::kBackward), act(Line::kWeight)};
    case Op::kBackwardInput:
      return {act(Line::kBackward)};
    case Op::kBackwardWeight:
      return {oldest};
    case Op::kSendBackward:
      return {act(Line::kSendBackward)};
    case Op::kOverlapped:
      return {act(Line::kForward),
              {Line::kBackward, i.backward_direction, i.backward_microbatch},
              {Line::kWeight, i.backward_direction, i.backward_microbatch}};
    case Op::kReduceGradients:
    case Op::kOptimizerStep:
      return {{Line::kBarrier, 0, 0}};
  }
  return {};
}

// The criterion. Two acts depend on each other when
//   - they are of one line and direction: channels are FIFO, sums have an order;
//   - they are of one micro-batch of one direction: its receive, forward, send, receive of the
//     gradient, backward, send of the gradient and weight part make and use one another's values
//     (all but the two ends of the chain that share nothing: weight part and gradient's send);
//   - a local hand-off is between them: forwards, or backwards, of the two legs;
//   - one is the reduction or the optimizer.
bool depend(const Act& a, const Act& b, bool hands_over) {
  if (a.line == Line::kBarrier || b.line == Line::kBarrier) return true;
  const bool passes = a.line == b.line && (a.line == Line::kForward || a.line == Line::kBackward);
  if (a.direction != b.direction) return hands_over && passes;
  if (a.line == b.line) return true;
  const auto are = [&](Line x, Line y) {
    return (a.line == x && b.line == y) || (a.line == y && b.line == x);
  };
  return a.microbatch == b.microbatch && !are(Line::kWeight, Line::kSendBackward);
}

bool independent(const Instruction& a, const Instruction& b, const Act& oldest, bool hands_over) {
  for (const Act& x : acts_of(a, oldest)) {
    for (const Act& y : acts_of(b, oldest)) {
      if (depend(x, y, hands_over)) return false;
    }
  }
  return true;
}

// The weight part that runs next when `list` stands at `position`. With nothing queued, the one
// that the instruction there queues.
Act oldest_weight(const std::vector<Instruction>& list, size_t position) {
  std::vector<Act> queue;
  for (size_t i = 0; i <= position + 1 && i < list.size(); ++i) {
    const bool runs_before = i < position;
    if (list[i].op == Op::kBackwardInput) {
      queue.push_back({Line::kWeight, list[i].direction, list[i].microbatch});
    } else if (list[i].op == Op::kBackwardWeight && runs_before) {
      queue.erase(queue.begin());
    }
  }
  return queue.empty() ? Act{Line::kWeight, -1, -1} : queue.front();
}

struct SwapCounts {
  int harmless = 0;
  int harmful = 0;
};

// Swaps instruction i with the next one and compares the check with criterion and meaning.
void try_swap(const ParallelismSpec& layout, const std::vector<Program>& good, size_t rank,
              ProgramKind kind, size_t i, SwapCounts& counts) {
  const std::vector<Instruction>& list = instructions_of(good[rank], kind);
  if (i + 1 == list.size() || list[i] == list[i + 1]) return;
  std::vector<Program> programs = good;
  std::swap(list_of(programs[rank], kind)[i], list_of(programs[rank], kind)[i + 1]);
  const Status status = check_programs(layout, programs);
  const bool hands_over =
      layout.schedule == Schedule::kDualPipeV && static_cast<int64_t>(rank) == layout.pipeline - 1;
  const bool harmless = independent(list[i], list[i + 1], oldest_weight(list, i), hands_over);
  const std::string swap =
      fmt::format("{}, rank {}, instructions {} and {}: {} <-> {}: {}", text_of(layout), rank, i,
                  i + 1, to_string(list[i]), to_string(list[i + 1]), status.message());
  EXPECT_EQ(status.ok(), harmless) << swap;
  if (harmless) {
    EXPECT_EQ(meaning_of(layout, programs, kind), meaning_of(layout, good, kind)) << swap;
  }
  ++(harmless ? counts.harmless : counts.harmful);
}

TEST(CheckProgramsTest, CatchesEverySwapOfNeighboursThatDependOnEachOther) {
  SwapCounts counts;
  for_every_instruction([&](const auto& layout, const auto& good, size_t rank, auto kind,
                            size_t i) { try_swap(layout, good, rank, kind, i, counts); });
  EXPECT_GT(counts.harmless, 0);
  EXPECT_GT(counts.harmful, counts.harmless);
  RecordProperty("harmless", counts.harmless);
  RecordProperty("harmful", counts.harmful);
}

// --- any damage, in deeper pipelines

ParallelismSpec any_layout() {
  const Schedule schedule =
      *rc::gen::elementOf(std::vector(std::begin(kSchedules), std::end(kSchedules)));
  ParallelismSpec layout = pipeline_of(schedule, *rc::gen::element<int64_t>(2, 4, 8), 0);
  layout.microbatches =
      direction_count(layout) * layout.pipeline + 2 * *rc::gen::inRange<int64_t>(0, 5);
  return layout;
}

TEST(CheckProgramsPropertyTest, WhateverItLetsThroughMeansTheSame) {
  EXPECT_TRUE(rc::check([] {
    const ParallelismSpec layout = any_layout();
    const std::vector<Program> good = *make_programs(layout);
    std::vector<Program> programs = good;
    const ProgramKind kind = *rc::gen::element(ProgramKind::kTraining, ProgramKind::kEvaluation);
    const size_t rank = *rc::gen::inRange<size_t>(0, programs.size());
    std::vector<Instruction>& list = list_of(programs[rank], kind);
    for (int moves = *rc::gen::inRange(1, 4); moves > 0; --moves) {
      const size_t from = *rc::gen::inRange<size_t>(0, list.size());
      const Instruction moved = list[from];
      list.erase(list.begin() + static_cast<ptrdiff_t>(from));
      const size_t near =
          *rc::gen::inRange<size_t>(from < 3 ? 0 : from - 3, std::min(list.size(), from + 3) + 1);
      list.insert(list.begin() + static_cast<ptrdiff_t>(near), moved);
    }
    const bool passes = check_programs(layout, programs).ok();
    RC_CLASSIFY(passes, "let through");
    if (passes) RC_ASSERT(meaning_of(layout, programs, kind) == meaning_of(layout, good, kind));
  }));
}

TEST(CheckProgramsPropertyTest, EverySchedulesProgramsHaveAMeaning) {
  EXPECT_TRUE(rc::check([] {
    const ParallelismSpec layout = any_layout();
    const std::vector<Program> good = *make_programs(layout);
    for (const ProgramKind kind : kKinds) RC_ASSERT(meaning_of(layout, good, kind).has_value());
  }));
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

}  // namespace
}  // namespace penstock
