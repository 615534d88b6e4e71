#include "worker/agent/trace_store.h"

#include <gtest/gtest.h>

#include <fstream>

#include "comm/run/trace_file.h"
#include "tests/worker/engine_test_support.h"
#include "worker/engine/recorder.h"

namespace penstock {
namespace {

class TraceStoreTest : public ::testing::Test {
 protected:
  HttpResponse get(const std::string& path,
                   std::vector<std::pair<std::string, std::string>> query) const {
    HttpRequest request;
    request.method = "GET";
    request.path = path;
    request.query = std::move(query);
    return store_.answer(request);
  }
  void add_step(Recorder& recorder, int64_t step) const {
    recorder.begin_step(step);
    recorder.add({.kind = TraceKind::kSubOp});
    recorder.add({.kind = TraceKind::kStep});
  }

  ScratchDirectory directory_;
  const TraceStore store_{directory_.path() / "traces", 4};
};

TEST_F(TraceStoreTest, WhatARankRecordsIsServedWhileItRecordsAndAfterItIsGone) {
  const Result<Path> file = store_.make_room(JobId{3}, Rank{1});
  ASSERT_TRUE(file.ok()) << file.status().to_string();
  {
    Recorder recorder(0);
    ASSERT_TRUE(recorder.keep_in(*file, JobId{3}, Epoch{2}, Rank{1}).ok());
    recorder.set_clock(-7, 1);
    for (int64_t step = 5; step <= 8; ++step) add_step(recorder, step);
    EXPECT_EQ(get("/traces", {{"job", "3"}}).body,
              "{\"items\": [{\"rank\": 1, \"epoch\": 2, \"first_step\": 5, \"last_step\": 8}]}\n");
    EXPECT_EQ(recorder.records().size(), 8u);
    add_step(recorder, 9);
  }
  const HttpResponse response =
      get("/trace", {{"job", "3"}, {"rank", "1"}, {"first", "6"}, {"last", "9"}});
  ASSERT_EQ(response.status, 200) << response.body;
  const Result<Trace> trace = decode_trace(as_bytes(response.body));
  ASSERT_TRUE(trace.ok()) << trace.status().to_string();
  EXPECT_EQ(trace->steps, (TraceSteps{6, 9}));
  EXPECT_EQ(trace->records.size(), 8u);
  EXPECT_EQ(trace->clock_offset_ns, -7);
  EXPECT_EQ(trace->epoch.value, 2u);
}

TEST_F(TraceStoreTest, OtherJobsAreNotListedAndWhatIsNotThereIsNotFound) {
  EXPECT_EQ(get("/traces", {{"job", "3"}}).body, "{\"items\": []}\n");
  const Result<Path> file = store_.make_room(JobId{30}, Rank{0});
  Recorder recorder(0);
  ASSERT_TRUE(recorder.keep_in(*file, JobId{30}, Epoch{1}, Rank{0}).ok());
  EXPECT_EQ(get("/traces", {{"job", "3"}}).body, "{\"items\": []}\n");
  EXPECT_EQ(get("/trace", {{"job", "3"}, {"rank", "0"}}).status, 404);
}

TEST_F(TraceStoreTest, QuestionsThatAreNoNumbersAreRefused) {
  EXPECT_EQ(get("/traces", {}).status, 400);
  EXPECT_EQ(get("/traces", {{"job", "../3"}}).status, 400);
  EXPECT_EQ(get("/trace", {{"job", "3"}}).status, 400);
  EXPECT_EQ(get("/trace", {{"job", "3"}, {"rank", "99999999999"}}).status, 400);
  EXPECT_EQ(get("/trace", {{"job", "3"}, {"rank", "0"}, {"first", "x"}}).status, 400);
}

TEST_F(TraceStoreTest, OnlyTheNewestFilesAreKept) {
  for (int32_t rank = 0; rank < 50; ++rank) {
    const Result<Path> file = store_.make_room(JobId{1}, Rank{rank});
    ASSERT_TRUE(file.ok());
    std::ofstream(*file) << "x";
    std::filesystem::last_write_time(
        *file, std::filesystem::file_time_type::clock::time_point(std::chrono::seconds(rank)));
  }
  size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory_.path() / "traces")) {
    EXPECT_TRUE(entry.is_regular_file());
    ++count;
  }
  EXPECT_EQ(count, TraceStore::kFilesMin);
  EXPECT_TRUE(std::filesystem::exists(directory_.path() / "traces" / "job-1.rank-49.trace"));
  EXPECT_FALSE(std::filesystem::exists(directory_.path() / "traces" / "job-1.rank-0.trace"));
}

TEST_F(TraceStoreTest, ARecorderWithoutAFolderGoesOnInMemory) {
  Recorder recorder(0);
  EXPECT_FALSE(recorder.keep_in("/no/such/folder/x.trace", JobId{1}, Epoch{1}, Rank{0}).ok());
  add_step(recorder, 1);
  EXPECT_EQ(recorder.records().size(), 2u);
}

}  // namespace
}  // namespace penstock
