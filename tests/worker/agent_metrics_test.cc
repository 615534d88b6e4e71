#include "worker/agent/agent_metrics.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

namespace penstock {
namespace {

StartRank start_of(uint32_t epoch) {
  StartRank start;
  start.job = {7};
  start.epoch = {epoch};
  start.rank = {2};
  start.device = 1;
  start.spec_json = "{}";
  start.restore_step = 40;
  return start;
}

RankProgress progress_of(uint32_t epoch, int64_t step, uint64_t bytes_sent) {
  RankProgress progress = {.job = {7}, .epoch = {epoch}, .rank = {2}, .step = step};
  progress.step_seconds = 0.5;
  progress.pipeline_wait_seconds = 0.25;
  progress.bytes_sent = bytes_sent;
  progress.arena_bytes = 4096;
  return progress;
}

constexpr const char* kLabels = "{rank=\"2\",run=\"7\"}";

class AgentMetricsTest : public ::testing::Test {
 protected:
  void expect_line(const std::string& line) {
    const std::string page = metrics_.render(now_ns_);
    EXPECT_NE(page.find(line + "\n"), std::string::npos) << line << " is not in\n" << page;
  }
  bool shows_run() { return metrics_.render(now_ns_).find("run=\"7\"") != std::string::npos; }

  int64_t now_ns_ = 1'000'000'000;
  AgentMetrics metrics_{"w0"};
};

TEST_F(AgentMetricsTest, CountersExistAtZeroBeforeAnythingHappens) {
  expect_line("penstock_worker_log_lines_dropped_total{node=\"w0\"} 0");
  expect_line("penstock_worker_reports_dropped_total{node=\"w0\"} 0");
  expect_line("penstock_worker_fatal_errors_total{kind=\"peer_lost\",node=\"w0\"} 0");
  EXPECT_FALSE(shows_run());
}

TEST_F(AgentMetricsTest, AStartedRankHasEverySeriesAtItsBeginning) {
  metrics_.rank_started(start_of(1), getpid());
  expect_line(fmt::format("penstock_worker_step{} 40", kLabels));
  expect_line(fmt::format("penstock_worker_steps_total{} 0", kLabels));
  expect_line(fmt::format("penstock_worker_oom_total{} 0", kLabels));
  expect_line("penstock_worker_phase_seconds_total{phase=\"dp_reduce\",rank=\"2\",run=\"7\"} 0");
  expect_line("penstock_worker_rank_info{device=\"1\",node=\"w0\",rank=\"2\",run=\"7\"} 1");
}

TEST_F(AgentMetricsTest, ProgressAddsUp) {
  metrics_.rank_started(start_of(1), getpid());
  metrics_.rank_progressed(progress_of(1, 41, 1000));
  metrics_.rank_progressed(progress_of(1, 42, 2500));
  expect_line(fmt::format("penstock_worker_step{} 42", kLabels));
  expect_line(fmt::format("penstock_worker_steps_total{} 2", kLabels));
  expect_line(fmt::format("penstock_worker_step_seconds_total{} 1", kLabels));
  expect_line(fmt::format("penstock_worker_bytes_sent_total{} 2500", kLabels));
  expect_line(fmt::format("penstock_worker_arena_bytes{} 4096", kLabels));
  expect_line("penstock_worker_phase_seconds_total{phase=\"pp_wait\",rank=\"2\",run=\"7\"} 0.5");
}

TEST_F(AgentMetricsTest, ANewEpochCountsOnFromTheOld) {
  metrics_.rank_started(start_of(1), getpid());
  metrics_.rank_progressed(progress_of(1, 41, 1000));
  metrics_.rank_ended(now_ns_, {{7}, {1}, {2}}, {-1, SIGKILL});
  metrics_.rank_started(start_of(2), getpid());
  metrics_.rank_progressed(progress_of(2, 41, 300));
  expect_line(fmt::format("penstock_worker_bytes_sent_total{} 1300", kLabels));
  expect_line(fmt::format("penstock_worker_steps_total{} 2", kLabels));
}

TEST_F(AgentMetricsTest, AnOldEpochsProgressIsIgnored) {
  metrics_.rank_started(start_of(2), getpid());
  metrics_.rank_progressed(progress_of(1, 99, 1000));
  expect_line(fmt::format("penstock_worker_step{} 40", kLabels));
}

TEST_F(AgentMetricsTest, ResidentMemoryIsOfTheLivingProcess) {
  metrics_.rank_started(start_of(1), getpid());
  const std::string zero = fmt::format("penstock_worker_host_memory_bytes{} 0\n", kLabels);
  EXPECT_EQ(metrics_.render(now_ns_).find(zero), std::string::npos);
  metrics_.rank_ended(now_ns_, {{7}, {1}, {2}}, {0, 0});
  EXPECT_NE(metrics_.render(now_ns_).find(zero), std::string::npos);
}

TEST_F(AgentMetricsTest, EndsAreCountedByKind) {
  metrics_.rank_started(start_of(1), getpid());
  const RankKey key = {{7}, {1}, {2}};
  metrics_.rank_ended(now_ns_, key, {-1, SIGSEGV});
  metrics_.rank_ended(now_ns_, key, {static_cast<int>(ExitCode::kOutOfMemory), 0});
  metrics_.rank_ended(now_ns_, key, {static_cast<int>(ExitCode::kDataCorrupt), 0});
  metrics_.rank_ended(now_ns_, key, {static_cast<int>(ExitCode::kPeerLost), 0});
  metrics_.rank_ended(now_ns_, key, {static_cast<int>(ExitCode::kDiverged), 0});
  metrics_.rank_ended(now_ns_, key, {static_cast<int>(ExitCode::kMiscomputed), 0});
  metrics_.rank_ended(now_ns_, key, {static_cast<int>(ExitCode::kFailure), 0});
  metrics_.rank_ended(now_ns_, key, {static_cast<int>(ExitCode::kOk), 0});
  metrics_.rank_ended(now_ns_, key, {static_cast<int>(ExitCode::kPreempted), 0});
  for (const char* kind : {"signal", "out_of_memory", "data_corrupt", "peer_lost", "diverged",
                           "silent_corruption", "failure"}) {
    expect_line(
        fmt::format("penstock_worker_fatal_errors_total{{kind=\"{}\",node=\"w0\"}} 1", kind));
  }
  expect_line(fmt::format("penstock_worker_oom_total{} 1", kLabels));
}

TEST_F(AgentMetricsTest, AFinishedJobsSeriesGoAfterTheirGrace) {
  metrics_.rank_started(start_of(1), getpid());
  metrics_.rank_ended(now_ns_, {{7}, {1}, {2}}, {0, 0});
  now_ns_ += AgentMetrics::kSeriesGrace.count() - 1;
  EXPECT_TRUE(shows_run());
  now_ns_ += 1;
  EXPECT_FALSE(shows_run());
  metrics_.rank_started(start_of(2), getpid());
  expect_line(fmt::format("penstock_worker_steps_total{} 0", kLabels));
}

TEST_F(AgentMetricsTest, ARunningRankKeepsItsJobsSeries) {
  metrics_.rank_started(start_of(1), getpid());
  StartRank other = start_of(1);
  other.rank = {3};
  metrics_.rank_started(other, getpid());
  metrics_.rank_ended(now_ns_, {{7}, {1}, {2}}, {0, 0});
  now_ns_ += 2 * AgentMetrics::kSeriesGrace.count();
  EXPECT_TRUE(shows_run());
}

TEST_F(AgentMetricsTest, LossesOnlyGrow) {
  metrics_.set_daemon(true, 5, 2);
  metrics_.set_daemon(false, 8, 2);
  expect_line("penstock_worker_log_lines_dropped_total{node=\"w0\"} 8");
  expect_line("penstock_worker_reports_dropped_total{node=\"w0\"} 2");
  expect_line("penstock_worker_registered{node=\"w0\"} 0");
}

TEST_F(AgentMetricsTest, WhatCopiesTakeMayShrinkAndWhatWasSentAndMissedOnlyGrows) {
  metrics_.set_copies(100, 70, 3);
  metrics_.set_copies(40, 60, 2);
  expect_line("penstock_worker_state_copies_bytes{node=\"w0\"} 40");
  expect_line("penstock_worker_state_copies_sent_bytes_total{node=\"w0\"} 70");
  expect_line("penstock_worker_state_copies_missed_total{node=\"w0\"} 3");
  metrics_.set_copies(40, 90, 4);
  expect_line("penstock_worker_state_copies_sent_bytes_total{node=\"w0\"} 90");
  expect_line("penstock_worker_state_copies_missed_total{node=\"w0\"} 4");
}

}  // namespace
}  // namespace penstock
