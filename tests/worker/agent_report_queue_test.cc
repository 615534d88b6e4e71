#include "worker/agent/report_queue.h"

#include <gtest/gtest.h>

#include <vector>

namespace penstock {
namespace {

constexpr int64_t kSecond = 1'000'000'000;

StepReport step(int64_t number) {
  return {.job = {1}, .epoch = {1}, .step = number, .loss = 1.0, .grad_norm = 1.0};
}

SegmentSaved segment(int64_t step_number) {
  SegmentSaved saved;
  saved.job = {1};
  saved.epoch = {1};
  saved.step = step_number;
  return saved;
}

// Sends everything unsent and says which steps that were.
std::vector<int64_t> send_all(ReportQueue& queue, int64_t now_ns = 0) {
  std::vector<int64_t> steps;
  while (const ControlMessage* next = queue.next_unsent()) {
    if (const auto* report = std::get_if<StepReport>(next)) steps.push_back(report->step);
    if (const auto* saved = std::get_if<SegmentSaved>(next)) steps.push_back(saved->step);
    queue.mark_sent(now_ns);
  }
  return steps;
}

TEST(ReportQueueTest, ReportsComeOutInOrderOnce) {
  ReportQueue queue({});
  for (int64_t i = 1; i <= 3; ++i) queue.push(step(i));
  EXPECT_EQ(send_all(queue), (std::vector<int64_t>{1, 2, 3}));
  EXPECT_EQ(queue.next_unsent(), nullptr);
  queue.push(step(4));
  EXPECT_EQ(send_all(queue), (std::vector<int64_t>{4}));
}

TEST(ReportQueueTest, SentReportsAreSentAgainOnRequest) {
  ReportQueue queue({});
  for (int64_t i = 1; i <= 3; ++i) queue.push(step(i));
  send_all(queue);
  queue.push(step(4));
  queue.mark_all_unsent();
  EXPECT_EQ(send_all(queue), (std::vector<int64_t>{1, 2, 3, 4}));
}

TEST(ReportQueueTest, StepReportsAreForgottenOnceTheyAreStored) {
  ReportQueue queue({});
  queue.push(step(1));
  send_all(queue, 0);
  queue.push(step(2));
  send_all(queue, 20 * kSecond);
  queue.forget_stored(29 * kSecond);
  EXPECT_EQ(queue.size(), 2U);
  queue.forget_stored(31 * kSecond);
  EXPECT_EQ(queue.size(), 1U);
  queue.mark_all_unsent();
  EXPECT_EQ(send_all(queue), (std::vector<int64_t>{2}));
}

TEST(ReportQueueTest, ExpertLoadsCountByTheirSizeAndAreForgottenOnceTheyAreStored) {
  ReportQueue queue({.bytes_max = 10'000});
  ExpertLoadReport loads;
  loads.layers[1].assign(1000, 1.0);
  queue.push(loads);
  EXPECT_GE(queue.byte_count(), 1000 * sizeof(double));
  queue.push(loads);
  EXPECT_EQ(queue.size(), 1U);
  EXPECT_EQ(queue.dropped(), 1U);
  send_all(queue, 0);
  queue.forget_stored(31 * kSecond);
  EXPECT_EQ(queue.size(), 0U);
}

TEST(ReportQueueTest, UnsentReportsAreNeverOldEnough) {
  ReportQueue queue({});
  queue.push(step(1));
  queue.forget_stored(1000 * kSecond);
  EXPECT_EQ(send_all(queue), (std::vector<int64_t>{1}));
}

TEST(ReportQueueTest, AnswerableReportsStayUntilAnswered) {
  ReportQueue queue({});
  queue.push(segment(10));
  queue.push(step(10));
  send_all(queue, 0);
  queue.forget_stored(1000 * kSecond);
  EXPECT_EQ(queue.size(), 1U);
  queue.mark_all_unsent();
  EXPECT_EQ(send_all(queue), (std::vector<int64_t>{10}));
  queue.forget_if(
      [](const ControlMessage& message) { return std::holds_alternative<SegmentSaved>(message); });
  EXPECT_EQ(queue.size(), 0U);
  EXPECT_EQ(queue.byte_count(), 0U);
}

TEST(ReportQueueTest, AStepThatAsksForARollbackStaysUntilItIsAnswered) {
  ReportQueue queue({.count_max = 2});
  StepReport bad = step(1);
  bad.guard.action = GuardPolicy::kRollback;
  queue.push(bad);
  send_all(queue, 0);
  queue.forget_stored(60 * kSecond);
  queue.mark_all_unsent();
  for (int64_t i = 2; i <= 3; ++i) queue.push(step(i));
  EXPECT_EQ(send_all(queue), (std::vector<int64_t>{1, 3}));
  queue.forget_if([](const ControlMessage&) { return true; });
  EXPECT_EQ(queue.size(), 0U);
}

TEST(ReportQueueTest, ForgettingKeepsWhatIsUnsentUnsent) {
  ReportQueue queue({});
  queue.push(step(1));
  send_all(queue);
  queue.push(segment(2));
  queue.push(step(3));
  queue.forget_if(
      [](const ControlMessage& message) { return std::holds_alternative<SegmentSaved>(message); });
  EXPECT_EQ(send_all(queue), (std::vector<int64_t>{3}));
}

TEST(ReportQueueTest, BeyondTheCountTheOldestGo) {
  ReportQueueLimits limits;
  limits.count_max = 3;
  ReportQueue queue(limits);
  for (int64_t i = 1; i <= 5; ++i) queue.push(step(i));
  EXPECT_EQ(queue.dropped(), 2U);
  EXPECT_EQ(send_all(queue), (std::vector<int64_t>{3, 4, 5}));
}

TEST(ReportQueueTest, WhatARankWaitsForAnAnswerToOutlivesItsSteps) {
  ReportQueueLimits limits;
  limits.count_max = 3;
  ReportQueue queue(limits);
  queue.push(segment(1));
  queue.push(step(2));
  EXPECT_EQ(send_all(queue), (std::vector<int64_t>{1, 2}));
  for (int64_t i = 3; i <= 6; ++i) queue.push(step(i));
  EXPECT_EQ(queue.dropped(), 2U) << "3 and 4; 2 was sent";
  queue.mark_all_unsent();
  EXPECT_EQ(send_all(queue), (std::vector<int64_t>{1, 5, 6}));
}

TEST(ReportQueueTest, DroppingWhatWasSentIsNoLoss) {
  ReportQueueLimits limits;
  limits.count_max = 3;
  ReportQueue queue(limits);
  for (int64_t i = 1; i <= 3; ++i) queue.push(step(i));
  send_all(queue);
  queue.push(step(4));
  EXPECT_EQ(queue.dropped(), 0U);
  EXPECT_EQ(send_all(queue), (std::vector<int64_t>{4}));
}

TEST(ReportQueueTest, BytesAreBoundedToo) {
  ReportQueueLimits limits;
  limits.bytes_max = 100'000;
  ReportQueue queue(limits);
  for (int i = 0; i < 100; ++i) {
    SegmentSaved saved = segment(i);
    saved.slices.resize(100);
    queue.push(saved);
  }
  EXPECT_LE(queue.byte_count(), limits.bytes_max);
  EXPECT_GT(queue.dropped(), 0U);
  EXPECT_GT(queue.size(), 0U);
}

}  // namespace
}  // namespace penstock
