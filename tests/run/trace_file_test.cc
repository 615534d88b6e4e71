#include "comm/run/trace_file.h"

#include <gtest/gtest.h>

#include <cstring>

namespace penstock {
namespace {

TraceRecord record(int32_t step, TraceKind kind) {
  return {.begin_ns = 10 * step, .end_ns = 10 * step + 5, .step = step, .kind = kind};
}

// Two records a step: one of a sub-operation, then the step's own.
std::vector<TraceRecord> steps(int32_t first, int32_t last) {
  std::vector<TraceRecord> records;
  for (int32_t step = first; step <= last; ++step) {
    records.push_back(record(step, TraceKind::kSubOp));
    records.push_back(record(step, TraceKind::kStep));
  }
  return records;
}

// A file of a ring of `capacity` records to which `added` were written, the last of them `records`.
std::string file_of(const std::vector<TraceRecord>& records, uint64_t capacity, uint64_t added) {
  const TraceFileHeader header{.magic = kTraceMagic,
                               .version = kTraceVersion,
                               .record_bytes = sizeof(TraceRecord),
                               .capacity = capacity,
                               .added = added,
                               .job = 7,
                               .epoch = 3,
                               .rank = 2,
                               .clock_offset_ns = -5,
                               .clock_uncertainty_ns = 4};
  std::string bytes(kTraceRecordsOffset + capacity * sizeof(TraceRecord), '\0');
  std::memcpy(bytes.data(), &header, sizeof(header));
  const uint64_t first = added - records.size();
  for (size_t i = 0; i < records.size(); ++i) {
    std::memcpy(bytes.data() + kTraceRecordsOffset + (first + i) % capacity * sizeof(TraceRecord),
                &records[i], sizeof(TraceRecord));
  }
  return bytes;
}

Result<Trace> decode(const std::string& bytes) {
  return decode_trace(as_bytes(bytes));
}

TEST(TraceFileTest, AYoungRingHasEveryStepThatHasEnded) {
  std::vector<TraceRecord> records = steps(1, 3);
  records.push_back(record(4, TraceKind::kSubOp));  // under way
  const Result<Trace> trace = decode(file_of(records, 16, records.size()));
  ASSERT_TRUE(trace.ok()) << trace.status().to_string();
  EXPECT_EQ(trace->job.value, 7u);
  EXPECT_EQ(trace->epoch.value, 3u);
  EXPECT_EQ(trace->rank.value, 2);
  EXPECT_EQ(trace->clock_offset_ns, -5);
  EXPECT_EQ(trace->steps, (TraceSteps{1, 3}));
  EXPECT_EQ(trace->records, steps(1, 3));
}

TEST(TraceFileTest, AFullRingLeavesOutTheRecordThatMayBeBeingOverwrittenAndBrokenSteps) {
  // Of eight places the one that is next is not to be trusted: step 11 has lost its first record,
  // and no step before it says that step 11 began where it seems to.
  const Result<Trace> trace = decode(file_of(steps(11, 14), 8, 100));
  ASSERT_TRUE(trace.ok());
  EXPECT_EQ(trace->steps, (TraceSteps{12, 14}));
  EXPECT_EQ(trace->records, steps(12, 14));
}

TEST(TraceFileTest, TheNewestRunOfStepsCountsWhenStepsAreMissing) {
  std::vector<TraceRecord> records = steps(1, 2);
  for (const TraceRecord& later : steps(5, 6)) records.push_back(later);
  EXPECT_EQ(whole_steps(records, true), (TraceSteps{5, 6}));
  EXPECT_TRUE(whole_steps({}, true).empty());
  EXPECT_TRUE(whole_steps(steps(5, 5), false).empty());
}

TEST(TraceFileTest, WhatIsServedIsReadBackCutToTheStepsAsked) {
  const Result<Trace> trace = decode(file_of(steps(1, 6), 16, 12));
  ASSERT_TRUE(trace.ok());
  const Result<Trace> got = decode(encode_trace(*trace, {2, 4}));
  ASSERT_TRUE(got.ok()) << got.status().to_string();
  EXPECT_EQ(got->steps, (TraceSteps{2, 4}));
  EXPECT_EQ(got->records, steps(2, 4));
  EXPECT_EQ(got->clock_uncertainty_ns, 4);
  const Result<Trace> none = decode(encode_trace(*trace, {9, 10}));
  ASSERT_TRUE(none.ok());
  EXPECT_TRUE(none->steps.empty());
}

TEST(TraceFileTest, WhatWasWrittenWhileItWasReadIsLeftOut) {
  // Five steps of two records in a ring of ten; two more are written during the reading, so three
  // are not to be trusted. The fourth is the end of step 2 and shows that step 3 is whole.
  const std::string bytes = file_of(steps(1, 5), 10, 10);
  const Result<Trace> trace = decode_trace(as_bytes(bytes), 12);
  ASSERT_TRUE(trace.ok());
  EXPECT_EQ(trace->steps, (TraceSteps{3, 5}));
  EXPECT_EQ(trace->records, steps(3, 5));
  EXPECT_TRUE(decode_trace(as_bytes(bytes), 100)->records.empty());
  EXPECT_EQ(decode_trace(as_bytes(bytes), 9).status().code(), Code::kDataLoss);  // another ring
}

TEST(TraceFileTest, WhatIsNoTraceIsRefused) {
  const std::string good = file_of(steps(1, 2), 8, 4);
  ASSERT_TRUE(decode(good).ok());
  EXPECT_EQ(decode("").status().code(), Code::kDataLoss);
  EXPECT_EQ(decode("x" + good.substr(1)).status().code(), Code::kDataLoss);
  EXPECT_EQ(decode(good + "x").status().code(), Code::kDataLoss);
  std::vector<TraceRecord> broken = steps(1, 2);
  broken[1].kind = static_cast<TraceKind>(200);
  EXPECT_EQ(decode(file_of(broken, 8, 4)).status().code(), Code::kDataLoss);
}

TEST(TraceFileTest, EveryTruncationAndFlippedHeaderByteIsAValueOrAnError) {
  const std::string bytes = file_of(steps(1, 3), 8, 6);
  for (size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_FALSE(decode(bytes.substr(0, size)).ok()) << size;
  }
  for (size_t i = 0; i < kTraceRecordsOffset; ++i) {
    std::string flipped = bytes;
    flipped[i] = static_cast<char>(flipped[i] ^ 0x80);
    const Result<Trace> got = decode(flipped);
    if (!got.ok()) continue;
    EXPECT_LE(got->records.size(), 8u);
  }
}

}  // namespace
}  // namespace penstock
