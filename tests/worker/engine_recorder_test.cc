// What an engine writes down about its steps.
#include "worker/engine/recorder.h"

#include <gtest/gtest.h>

#include <map>
#include <mutex>

#include "comm/run/trace_summary.h"
#include "coordinator/plan/schedule.h"
#include "tests/worker/engine_test_support.h"

namespace penstock {
namespace {

TEST(RecorderTest, TheOldestRecordsGoAndStepsThatAreNotWholeAreKnown) {
  Recorder recorder(0);
  EXPECT_EQ(recorder.capacity(), Recorder::kRecordsMin);
  const auto add_step = [&](int64_t step, size_t records) {
    recorder.begin_step(step);
    for (size_t i = 0; i + 1 < records; ++i) recorder.add({.kind = TraceKind::kSubOp});
    recorder.add({.kind = TraceKind::kStep});
  };
  EXPECT_GT(recorder.steps().first, recorder.steps().last);
  for (int64_t step = 1; step <= 4; ++step) add_step(step, Recorder::kRecordsMin / 4);
  EXPECT_EQ(recorder.steps().first, 1);
  add_step(5, 1);
  EXPECT_EQ(recorder.records().size(), Recorder::kRecordsMin);
  EXPECT_EQ(recorder.steps().first, 2);
  EXPECT_EQ(recorder.steps().last, 5);
  EXPECT_EQ(recorder.records().back().step, 5);
}

TEST(RecorderTest, EvaluationsAndADisabledRecorderWriteNothing) {
  Recorder recorder(0);
  recorder.begin_step(0);
  recorder.add({.kind = TraceKind::kSubOp});
  recorder.begin_step(1);
  recorder.set_enabled(false);
  recorder.add({.kind = TraceKind::kSubOp});
  EXPECT_TRUE(recorder.records().empty());
}

class EngineRecordsTest : public ::testing::TestWithParam<Schedule> {
 protected:
  static constexpr int64_t kSteps = 3;
  // The records of every rank of a run.
  std::map<int32_t, std::vector<TraceRecord>> records(const TinyLayout& layout) {
    ScratchDirectory directory;
    write_tiny_corpus(directory.path());
    JobSpec spec = tiny_spec(directory.path(), layout, kSteps);
    spec.parallelism.microbatch_levels = {{2, 8}, {3, 20}};  // a step of each size
    StandaloneOptions options = tiny_run(spec);
    options.evaluate = true;
    programs_ = options.programs;
    std::mutex mutex;
    std::map<int32_t, std::vector<TraceRecord>> all;
    options.on_end = [&](const Engine& engine) {
      const std::lock_guard lock(mutex);
      all[engine.layout().rank.value] = engine.recorder().records();
    };
    train_tiny(options);
    return all;
  }
  std::vector<Program> programs_;
};

// Each exchange that a sub-operation starts is written down once, and everything in it happens in
// the order that its name says.
TEST_P(EngineRecordsTest, EveryInstructionExchangeAndTransferOfAStepIsThereOnceInOrder) {
  for (const auto& [rank, all] : records({2, 2, 1, GetParam()})) {
    const Program& program = programs_[static_cast<size_t>(rank / 2)];
    ASSERT_EQ(program.resized.size(), 2u);
    int64_t passes = 0, transfers = 0, pairs = 0;
    for (const auto* training :
         {&program.training, &program.resized[0].training, &program.resized[1].training}) {
      for (const Instruction& i : *training) {
        pairs += i.op == Op::kOverlapped;
        passes += i.op == Op::kForward || i.op == Op::kBackward || i.op == Op::kBackwardInput ||
                  i.op == Op::kBackwardWeight;
        transfers += i.peer >= 0;
      }
    }
    std::map<std::string, int64_t> counts;
    int64_t instructions = 0, started = 0, exchanged = 0, moved = 0, steps = 0;
    for (const TraceRecord& record : all) {
      ASSERT_GE(record.step, 1);
      ASSERT_LE(record.step, kSteps);
      EXPECT_LE(record.begin_ns,
                record.kind == TraceKind::kExchange ? record.wait_end_ns : record.end_ns);
      if (is_communication(record.kind)) {
        EXPECT_LE(record.begin_ns, record.wait_end_ns);
        if (record.kind == TraceKind::kCollective) {  // all of the call, its sums included
          EXPECT_LE(record.wait_end_ns, record.end_ns);
        } else {
          EXPECT_LE(record.end_ns, record.wait_end_ns + 1);
        }
        EXPECT_GT(record.wait_end_ns, record.wait_begin_ns);
      }
      const auto op = static_cast<Op>(record.what);
      instructions += record.kind == TraceKind::kInstruction && op != Op::kReduceGradients &&
                      op != Op::kOptimizerStep;
      started += record.kind == TraceKind::kSubOp && record.layer > 0 &&  // layer 0 is dense
                 is_exchange(static_cast<SubOp>(record.what));
      exchanged += record.kind == TraceKind::kExchange;
      moved += record.kind == TraceKind::kSend || record.kind == TraceKind::kReceive;
      steps += record.kind == TraceKind::kStep;
    }
    EXPECT_EQ(steps, kSteps);
    EXPECT_EQ(instructions, passes + pairs) << "rank " << rank;
    EXPECT_EQ(exchanged, started) << "rank " << rank;
    EXPECT_GT(exchanged, 0);
    EXPECT_EQ(moved, transfers) << "rank " << rank;
  }
}

// Weight gradients, which end such a pass, are computed beside the send of its result.
TEST_P(EngineRecordsTest, AResultIsSentBeforeTheBackwardOrPairThatMadeItEnds) {
  int64_t checked = 0;
  for (const auto& [rank, all] : records({2, 2, 1, GetParam()})) {
    for (const TraceRecord& pass : all) {
      if (pass.kind != TraceKind::kInstruction) continue;
      const auto op = static_cast<Op>(pass.what);
      if (op != Op::kBackward && op != Op::kOverlapped) continue;
      const Transfer made = op == Op::kBackward ? Transfer::kGradients : Transfer::kActivations;
      for (const TraceRecord& send : all) {
        if (send.kind != TraceKind::kSend || static_cast<Transfer>(send.what) != made ||
            send.step != pass.step || send.direction != pass.direction ||
            send.microbatch != pass.microbatch) {
          continue;
        }
        EXPECT_LT(send.begin_ns, pass.end_ns) << "rank " << rank << " step " << pass.step;
        ++checked;
      }
    }
  }
  // ZB1P has no such pass: it sends first and computes all weight gradients later.
  EXPECT_EQ(checked > 0, GetParam() != Schedule::kZeroBubble);
}

TEST_P(EngineRecordsTest, TheSummaryOfEveryRankAddsUpAndNamesItsCommunication) {
  for (const auto& [rank, all] : records({2, 2, 1, GetParam()})) {
    const std::vector<StepSummary> summaries = summarize(rank, all);
    ASSERT_EQ(summaries.size(), static_cast<size_t>(kSteps));
    for (const StepSummary& s : summaries) {
      EXPECT_GE(s.other_seconds, -1e-9) << "rank " << rank << " step " << s.step;
      EXPECT_GT(s.forward_seconds + s.pair_seconds, 0.0);
      EXPECT_GT(s.reduce_seconds, 0.0);
      EXPECT_GT(s.bubble_seconds, 0.0);
      for (const CommunicationSummary& c : s.communications) {
        EXPECT_NEAR(c.hidden_seconds + c.exposed_seconds, c.flight_seconds, 1e-9) << c.name;
      }
      EXPECT_GE(s.communications.size(), 8u);
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Schedules, EngineRecordsTest, ::testing::ValuesIn(kSchedules),
                         [](const auto& schedule) {
                           return "Schedule_" + std::string(to_string(schedule.param));
                         });

TEST_F(EngineRecordsTest, AStepNeverAddsMoreThanItsShareOfTheRing) {
  for (const auto& [rank, all] : records({2, 2, 1, Schedule::kDualPipe})) {
    std::map<int32_t, size_t> by_step;
    for (const TraceRecord& record : all) ++by_step[record.step];
    for (const auto& [step, count] : by_step) {
      EXPECT_LE(count, records_per_step(programs_[static_cast<size_t>(rank / 2)], 3));
    }
  }
}

TEST(RecorderTest, ARampNeedsTheRingOfItsLargestStep) {
  const auto records = [](int64_t microbatches, std::vector<StepLevel<int64_t>> ramp) {
    const ParallelismSpec layout{
        .pipeline = 2, .microbatches = microbatches, .microbatch_levels = std::move(ramp)};
    return records_per_step(*make_program(layout, 0), 3);
  };
  EXPECT_LT(records(4, {}), records(20, {}));
  EXPECT_EQ(records(4, {{2, 20}, {3, 8}}), records(20, {}));
  EXPECT_EQ(records(20, {{2, 4}}), records(20, {}));
}

}  // namespace
}  // namespace penstock
