#include "ops/cli/trace_document.h"

#include <gtest/gtest.h>
#include <isa-l/igzip_lib.h>

#include <map>
#include <nlohmann/json.hpp>

namespace penstock {
namespace {

TraceRecord exchange(SubOp op, int64_t begin_ns, int64_t end_ns) {
  return {.begin_ns = begin_ns,
          .end_ns = end_ns,
          .wait_begin_ns = end_ns,
          .wait_end_ns = end_ns + 1000,
          .bytes = 64,
          .step = 1,
          .microbatch = 2,
          .layer = 3,
          .kind = TraceKind::kExchange,
          .what = static_cast<uint8_t>(op)};
}

Trace trace_of(int32_t rank, int64_t offset_ns) {
  Trace trace{.rank = Rank{rank}, .clock_offset_ns = offset_ns, .steps = {1, 1}};
  trace.records = {
      {.begin_ns = 5000,
       .end_ns = 9000,
       .step = 1,
       .microbatch = 2,
       .layer = 3,
       .kind = TraceKind::kSubOp,
       .what = static_cast<uint8_t>(SubOp::kMlp)},
      exchange(SubOp::kDispatch, 4000, 6000),
      exchange(SubOp::kCombineBackward, 3000, 7000),
      {.begin_ns = 1000,
       .end_ns = 8000,
       .bytes = 9,
       .step = 1,
       .peer = 1,
       .kind = TraceKind::kSend},
      {.begin_ns = 2000,
       .end_ns = 8500,
       .bytes = 9,
       .step = 1,
       .peer = 1,
       .kind = TraceKind::kSend},
      {.begin_ns = 1000, .end_ns = 10000, .step = 1, .kind = TraceKind::kStep},
  };
  return trace;
}

TEST(TraceDocumentTest, EveryRankIsAProcessAndEveryQueueATrackOnRankZerosClock) {
  const std::vector<Trace> traces = {trace_of(0, 0), trace_of(1, 500)};
  const nlohmann::json document = nlohmann::json::parse(chrome_trace(traces));
  std::map<std::pair<int, int>, std::string> tracks;
  std::map<std::string, nlohmann::json> first_of;
  for (const nlohmann::json& event : document["traceEvents"]) {
    const std::pair track(event["pid"].get<int>(), event["tid"].get<int>());
    if (event["ph"] == "M" && event["name"] == "thread_name") tracks[track] = event["args"]["name"];
    if (event["ph"] != "X") continue;
    ASSERT_TRUE(tracks.contains(track)) << event.dump();
    first_of.emplace(event["name"].get<std::string>() + "@" + std::to_string(track.first), event);
  }
  EXPECT_EQ(first_of.at("step@0")["ts"], 0.0);
  EXPECT_EQ(first_of.at("step@1")["ts"], 0.5);  // its clock is 500 ns behind
  EXPECT_EQ(first_of.at("step@0")["dur"], 9.0);
  const auto track_of = [&](const std::string& name) {
    const nlohmann::json& event = first_of.at(name);
    return tracks.at({event["pid"], event["tid"]});
  };
  EXPECT_EQ(track_of("mlp(F)@0"), "compute");
  EXPECT_EQ(track_of("wait dispatch(F)@0"), "compute");
  EXPECT_EQ(track_of("dispatch(F)@1"), "exchanges (F)");
  EXPECT_EQ(track_of("combine(B)@0"), "exchanges (B)");
  EXPECT_EQ(track_of("send(F)@0"), "sends");
  EXPECT_EQ(first_of.at("dispatch(F)@0")["args"]["layer"], 3);
  EXPECT_EQ(first_of.at("dispatch(F)@0")["args"]["bytes"], 64);
}

// Perfetto leaves out what overlaps on one track without nesting.
TEST(TraceDocumentTest, OverlappingSendsAreOnDifferentTracksAndComputeNests) {
  const std::vector<Trace> traces = {trace_of(0, 0)};
  const nlohmann::json document = nlohmann::json::parse(chrome_trace(traces));
  std::map<int, std::vector<std::pair<double, double>>> by_track;
  for (const nlohmann::json& event : document["traceEvents"]) {
    if (event["ph"] != "X") continue;
    const double begin = event["ts"];
    by_track[event["tid"]].emplace_back(begin, begin + event["dur"].get<double>());
  }
  for (const auto& [track, spans] : by_track) {
    for (size_t i = 0; i < spans.size(); ++i) {
      for (size_t j = i + 1; j < spans.size(); ++j) {
        const auto [a, b] = std::minmax(spans[i], spans[j]);
        const bool apart = a.second <= b.first + 1e-9;
        const bool nested = b.second <= a.second + 1e-9 || a.first == b.first;
        EXPECT_TRUE(apart || nested) << "track " << track;
      }
    }
  }
}

TEST(TraceDocumentTest, GzipGivesBackWhatWentIn) {
  const std::vector<Trace> traces = {trace_of(0, 0)};
  for (const std::string& text : {chrome_trace(traces), std::string(), std::string(100000, 'x')}) {
    const Result<std::string> packed = gzip(text);
    ASSERT_TRUE(packed.ok()) << packed.status().to_string();
    std::string out(text.size() + 1, '\0');
    inflate_state state;
    isal_inflate_init(&state);
    state.crc_flag = ISAL_GZIP;
    state.next_in = reinterpret_cast<uint8_t*>(const_cast<char*>(packed->data()));
    state.avail_in = static_cast<uint32_t>(packed->size());
    state.next_out = reinterpret_cast<uint8_t*>(out.data());
    state.avail_out = static_cast<uint32_t>(out.size());
    EXPECT_EQ(isal_inflate(&state), ISAL_DECOMP_OK);
    out.resize(state.total_out);
    EXPECT_EQ(out, text);
  }
}

TEST(TraceDocumentTest, TheSummaryIsPerRankAndStep) {
  std::vector<StepSummary> summaries;
  for (int32_t rank : {0, 1}) {
    for (const StepSummary& summary : summarize(rank, trace_of(rank, 0).records)) {
      summaries.push_back(summary);
    }
  }
  const nlohmann::json document = summary_document(summaries);
  EXPECT_EQ(document["ranks"], 2);
  EXPECT_EQ(document["first_step"], 1);
  EXPECT_NEAR(document["seconds"]["step"].get<double>(), 9e-6, 1e-12);
  double parts = 0.0;
  for (const auto& [name, seconds] : document["seconds"].items()) {
    if (name != "step") parts += seconds.get<double>();
  }
  EXPECT_NEAR(parts, 9e-6, 1e-12);
  EXPECT_EQ(document["communications"].size(), 3u);
  EXPECT_EQ(seconds_rows(total(summaries), 2).back()[1], "0.009");
}

}  // namespace
}  // namespace penstock
