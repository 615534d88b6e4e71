#include "comm/run/trace_summary.h"

#include <gtest/gtest.h>

namespace penstock {
namespace {

constexpr int64_t kSecond = 1'000'000'000;

TraceRecord span(TraceKind kind, int what, int64_t begin, int64_t end) {
  return {.begin_ns = begin * kSecond,
          .end_ns = end * kSecond,
          .step = 3,
          .kind = kind,
          .what = static_cast<uint8_t>(what)};
}
TraceRecord instruction(Op op, int64_t begin, int64_t end) {
  return span(TraceKind::kInstruction, static_cast<int>(op), begin, end);
}
TraceRecord sub_op(SubOp op, int64_t begin, int64_t end) {
  return span(TraceKind::kSubOp, static_cast<int>(op), begin, end);
}
TraceRecord waited(TraceRecord record, int64_t begin, int64_t end) {
  record.wait_begin_ns = begin * kSecond;
  record.wait_end_ns = end * kSecond;
  return record;
}

const CommunicationSummary& find(const StepSummary& summary, const std::string& name) {
  for (const CommunicationSummary& communication : summary.communications) {
    if (communication.name == name) return communication;
  }
  ADD_FAILURE() << "no " << name;
  static const CommunicationSummary none;
  return none;
}

TEST(TraceSummaryTest, ThePartsOfAStepAddUpToIt) {
  const std::vector<TraceRecord> records = {
      instruction(Op::kForward, 0, 2),          waited(span(TraceKind::kReceive, 1, 0, 4), 3, 5),
      instruction(Op::kOverlapped, 5, 10),      waited(span(TraceKind::kSend, 0, 2, 3), 10, 11),
      instruction(Op::kBackward, 11, 13),       instruction(Op::kBackwardInput, 13, 14),
      instruction(Op::kBackwardWeight, 14, 15), instruction(Op::kReduceGradients, 15, 18),
      instruction(Op::kOptimizerStep, 18, 19),  instruction(Op::kReduceGradients, 19, 20),
      span(TraceKind::kStep, 0, 0, 21),
  };
  const std::vector<StepSummary> summaries = summarize(7, records);
  ASSERT_EQ(summaries.size(), 1u);
  const StepSummary& s = summaries[0];
  EXPECT_EQ(s.rank, 7);
  EXPECT_EQ(s.step, 3);
  EXPECT_EQ(s.total_seconds, 21.0);
  EXPECT_EQ(s.forward_seconds, 2.0);
  EXPECT_EQ(s.pair_seconds, 5.0);
  EXPECT_EQ(s.backward_seconds, 2.0);
  EXPECT_EQ(s.backward_input_seconds, 1.0);
  EXPECT_EQ(s.weight_seconds, 1.0);
  EXPECT_EQ(s.reduce_seconds, 4.0);
  EXPECT_EQ(s.optimizer_seconds, 1.0);
  EXPECT_EQ(s.bubble_seconds, 3.0);
  EXPECT_EQ(s.other_seconds, 2.0);
}

TEST(TraceSummaryTest, WhatTravelsWhileTheThreadComputesIsHiddenAndTheRestExposed) {
  const std::vector<TraceRecord> records = {
      sub_op(SubOp::kDispatch, 0, 1),   // packing
      sub_op(SubOp::kMlpWeight, 1, 4),  // hides
      sub_op(SubOp::kMlp, 5, 9),        // waits from 6 to 8; the data is there at 7
      waited(span(TraceKind::kExchange, static_cast<int>(SubOp::kDispatch), 1, 7), 6, 8),
      span(TraceKind::kStep, 0, 0, 10),
  };
  const std::vector<StepSummary> summaries = summarize(0, records);
  ASSERT_EQ(summaries.size(), 1u);
  const CommunicationSummary& dispatch = find(summaries[0], "dispatch(F)");
  EXPECT_EQ(dispatch.count, 1);
  EXPECT_EQ(dispatch.issue_seconds, 1.0);
  EXPECT_EQ(dispatch.flight_seconds, 6.0);
  EXPECT_EQ(dispatch.hidden_seconds, 4.0);   // 1 to 4 and 5 to 6
  EXPECT_EQ(dispatch.exposed_seconds, 2.0);  // 4 to 5, when nothing ran, and 6 to 7
  EXPECT_EQ(dispatch.waited_seconds, 2.0);
}

TEST(TraceSummaryTest, AReceiveIsUnderWayOnlyWhileItIsWaitedForBecauseItIsPostedLongBefore) {
  const std::vector<TraceRecord> records = {
      sub_op(SubOp::kMlp, 0, 5),
      waited(span(TraceKind::kReceive, 0, 0, 6), 5, 7),
      span(TraceKind::kStep, 0, 0, 8),
  };
  const StepSummary summary = summarize(0, records).at(0);
  EXPECT_EQ(find(summary, "receive(F)").flight_seconds, 2.0);
  EXPECT_EQ(find(summary, "receive(F)").exposed_seconds, 2.0);
}

TEST(TraceSummaryTest, StepsWithoutTheirEndAreLeftOutAndTotalsAdd) {
  std::vector<TraceRecord> records = {instruction(Op::kForward, 0, 2),
                                      span(TraceKind::kStep, 0, 0, 3)};
  for (TraceRecord record : std::vector(records)) {
    record.step = 4;
    records.push_back(record);
  }
  TraceRecord unfinished = instruction(Op::kForward, 10, 20);
  unfinished.step = 5;
  records.push_back(unfinished);
  const std::vector<StepSummary> summaries = summarize(0, records);
  ASSERT_EQ(summaries.size(), 2u);
  EXPECT_EQ(total(summaries).forward_seconds, 4.0);
  EXPECT_EQ(total(summaries).total_seconds, 6.0);
}

TEST(TraceRecordTest, NamesAreThoseOfThePublishedTrace) {
  EXPECT_EQ(trace_name(sub_op(SubOp::kAttention, 0, 1)), "attn(F)");
  EXPECT_EQ(trace_name(sub_op(SubOp::kMlpWeight, 0, 1)), "mlp(W)");
  EXPECT_EQ(
      trace_name(span(TraceKind::kExchange, static_cast<int>(SubOp::kDispatchBackward), 0, 1)),
      "dispatch(B)");
  EXPECT_EQ(trace_name(instruction(Op::kOverlapped, 0, 1)), "F&B");
  EXPECT_EQ(trace_name(span(TraceKind::kCollective, 5, 0, 1)), "gather dense");
  EXPECT_EQ(trace_name(span(TraceKind::kCollective, 99, 0, 1)), "?");
  EXPECT_EQ(trace_name(span(TraceKind::kSubOp, 99, 0, 1)), "?");
}

}  // namespace
}  // namespace penstock
