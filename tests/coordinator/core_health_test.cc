// Workers whose hosts are not trusted: what puts them in quarantine, what does not, and how they
// come out again.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

using std::chrono::minutes;
using std::chrono::seconds;

class CoreHealthTest : public ::testing::Test {
 protected:
  CoreHealthTest() {
    for (const char* name : {"w0", "w1", "w2", "w3"}) h.add_worker(name, 2);
  }
  // On two of the four workers.
  void start() {
    job = h.submit_ok(four_rank_spec());
    h.run(job);
  }
  // A rank on that worker crashes, and the job goes on: there again, as nothing speaks against it.
  void crash_on(const std::string& worker, int32_t signal = 11) {
    crash_rank(rank_on(worker), signal);
  }
  void crash_rank(int32_t rank, int32_t signal = 11) {
    h.crash_rank(job, rank, signal);
    go_on();
  }
  void go_on() {
    h.confirm_stops(job);
    h.pass(seconds(31));  // back-off
    if (!h.finds.empty()) h.answer_find();
    h.pass(seconds(1));
    ASSERT_EQ(h.state(job), JobState::kStarting) << h.record(job).reason.message;
    h.run(job);
    ++step;
    h.train(job, step, step);
  }
  int32_t rank_on(const std::string& worker) {
    for (int32_t rank = 0; rank < 4; ++rank) {
      if (h.host_of(job, rank) == worker) return rank;
    }
    ADD_FAILURE() << "no rank on " << worker;
    return 0;
  }
  const WorkerRecord& worker(const std::string& name) { return h.core().find_worker(name)->record; }
  bool quarantined(const std::string& name) { return worker(name).quarantine.has_value(); }
  const JobEvent* event(const std::string& code) {
    for (const JobEvent& one : h.events) {
      if (one.reason.code == code) return &one;
    }
    return nullptr;
  }

  CoreHarness h;
  JobId job;
  int64_t step = 0;
};

TEST_F(CoreHealthTest, JobsMoveOffAWorkerThatAUserQuarantinesUntilItIsReleased) {
  start();
  h.train(job, 1, 10);
  const std::string host = h.host_of(job, 0);
  ASSERT_TRUE(h.quarantine(host, "ECC errors").status.ok());
  EXPECT_FALSE(h.sent<PauseRanks>().empty());
  EXPECT_NE(h.record(job).reason.message.find("quarantine (ECC errors)"), std::string::npos)
      << h.record(job).reason.message;
  h.pause(job, 10);
  h.confirm_stops(job);
  h.answer_find();
  ASSERT_EQ(h.state(job), JobState::kStarting);
  for (int32_t rank = 0; rank < 4; ++rank) EXPECT_NE(h.host_of(job, rank), host);
  EXPECT_EQ(h.record(job).failures, 0);
  EXPECT_EQ(worker(host).quarantine->reason.code, kQuarantineRequested);
  EXPECT_TRUE(worker(host).quarantine->by_user);

  h.restart_coordinator();
  for (const auto& [name, known] : h.workers) h.register_worker(name);
  h.restart_worker(host);
  EXPECT_TRUE(quarantined(host)) << "whatever restarts";
  EXPECT_FALSE(h.core().find_worker(host)->takes_ranks());
  ASSERT_TRUE(h.undrain(host).status.ok());
  EXPECT_TRUE(quarantined(host)) << "that ends maintenance, and says nothing of its health";
  ASSERT_TRUE(h.release(host).status.ok());
  EXPECT_FALSE(quarantined(host));
  EXPECT_TRUE(h.core().find_worker(host)->takes_ranks());
  EXPECT_EQ(h.quarantine("w9", "x").status.code(), Code::kNotFound);
}

TEST_F(CoreHealthTest, ThreeCrashesWithinTheHourPutTheirHostInQuarantineForAnHour) {
  start();
  const std::string host = h.host_of(job, 0);
  for (const int signal : {11, 7}) crash_on(host, signal);
  EXPECT_FALSE(quarantined(host));
  EXPECT_EQ(worker(host).evidence.size(), 2u);
  h.restart_coordinator();  // which forgets none of it
  for (const auto& [name, known] : h.workers) h.register_worker(name);
  crash_on(host, 4);
  ASSERT_TRUE(quarantined(host));
  const Quarantine& quarantine = *worker(host).quarantine;
  EXPECT_EQ(quarantine.reason.code, kQuarantineFailures);
  for (const char* part : {"3 failures", "signal 11", "signal 7", "signal 4", "job 1", "rank "}) {
    EXPECT_NE(quarantine.reason.message.find(part), std::string::npos)
        << part << ": " << quarantine.reason.message;
  }
  ASSERT_NE(event("worker_quarantined"), nullptr);
  EXPECT_EQ(event("worker_quarantined")->reason.message.find("worker " + host), 0u);
  for (int32_t rank = 0; rank < 4; ++rank) EXPECT_NE(h.host_of(job, rank), host);
  h.jump(minutes(59));
  h.pass(seconds(1));
  EXPECT_TRUE(quarantined(host));
  h.jump(minutes(1));
  h.pass(seconds(1));
  EXPECT_FALSE(quarantined(host)) << "nothing is held against a host for ever";
  EXPECT_TRUE(worker(host).evidence.empty());
}

TEST_F(CoreHealthTest, WhatIsOlderThanAnHourCountsNoMore) {
  start();
  const std::string host = h.host_of(job, 0);
  for (int i = 0; i < 2; ++i) crash_on(host);
  h.jump(minutes(61));
  for (const auto& [name, known] : h.workers) h.register_worker(name);
  h.pass(seconds(1));
  crash_on(host);
  EXPECT_FALSE(quarantined(host));
  EXPECT_EQ(worker(host).evidence.size(), 1u);
}

TEST_F(CoreHealthTest, WhatDoesNotPointToTheHostIsNotHeldAgainstIt) {
  start();
  const std::string host = h.host_of(job, 0);
  const int32_t rank = 0;
  h.kill_rank(job, rank);  // somebody's doing
  go_on();
  h.exit_rank(job, rank, ExitCode::kPeerLost);
  go_on();
  h.exit_rank(job, rank, ExitCode::kFailure, "exited with code 1: no space left");
  go_on();
  h.exit_rank(job, rank, ExitCode::kOutOfMemory);
  go_on();
  EXPECT_TRUE(worker(h.host_of(job, rank)).evidence.empty());
  // A crash that only follows from another failure.
  h.kill_rank(job, rank);
  h.crash_rank(job, 3);
  EXPECT_TRUE(worker(h.host_of(job, 3)).evidence.empty());
  h.exit_rank(job, 1, ExitCode::kDiverged);
  for (const auto& [name, known] : h.workers) EXPECT_TRUE(worker(name).evidence.empty()) << name;
}

TEST_F(CoreHealthTest, AHostThatComputesWronglyIsOutAtOnceAndUntilSomebodyReleasesIt) {
  start();
  const std::string host = h.host_of(job, 2);
  h.exit_rank(job, 2, ExitCode::kMiscomputed, "computed twice, its gradients differ");
  ASSERT_TRUE(quarantined(host));
  EXPECT_EQ(worker(host).quarantine->reason.code, kQuarantineMiscomputes);
  EXPECT_NE(worker(host).quarantine->reason.message.find("gradients differ"), std::string::npos);
  go_on();
  for (int32_t rank = 0; rank < 4; ++rank) EXPECT_NE(h.host_of(job, rank), host);
  h.jump(minutes(24 * 60));
  h.pass(seconds(1));
  EXPECT_TRUE(quarantined(host));
}

TEST_F(CoreHealthTest, AJobThatCrashesWhereverItRunsIsNotItsHostsFault) {
  start();
  const std::string first = h.host_of(job, 0);
  for (int i = 0; i < 3; ++i) crash_on(first);
  ASSERT_TRUE(quarantined(first));
  const std::string second = h.host_of(job, 0);
  ASSERT_NE(first, second);
  crash_on(second);
  EXPECT_FALSE(quarantined(first)) << "it crashes elsewhere in the same way";
  EXPECT_NE(event("worker_released")->reason.message.find("in the same way"), std::string::npos);
  EXPECT_FALSE(quarantined(second));
}

TEST_F(CoreHealthTest, AJobThatCrashesOnAllItsHostsByTurnsPutsNoneInQuarantine) {
  JobSpec spec = four_rank_spec();
  spec.recovery.max_restarts = 100;
  job = h.submit_ok(spec);
  h.run(job);
  for (int i = 0; i < 5; ++i) {
    crash_rank(0);
    crash_rank(3);
  }
  for (const auto& [name, known] : h.workers) EXPECT_FALSE(quarantined(name)) << name;
}

TEST_F(CoreHealthTest, AHostThatIsNeededIsNotTakenAway) {
  for (const char* name : {"w2", "w3"}) ASSERT_TRUE(h.drain(name, "").status.ok());
  start();
  const std::string host = h.host_of(job, 0);
  h.exit_rank(job, 0, ExitCode::kMiscomputed, "differs");
  EXPECT_FALSE(quarantined(host)) << "the job could run nowhere then";
  ASSERT_NE(event("quarantine_withheld"), nullptr);
  EXPECT_NE(event("quarantine_withheld")->reason.message.find("could run nowhere without it"),
            std::string::npos);
  go_on();
  EXPECT_EQ(h.state(job), JobState::kRunning);
  ASSERT_TRUE(h.quarantine(host, "all the same").status.ok());
  EXPECT_TRUE(quarantined(host)) << "a user may";
}

TEST_F(CoreHealthTest, WhatBefallsEveryHostDoesNotEmptyTheCluster) {
  start();
  std::set<std::string> struck;
  for (int i = 0; i < 3; ++i) {
    const std::string host = h.host_of(job, 0);
    struck.insert(host);
    h.exit_rank(job, 0, ExitCode::kMiscomputed, "differs");
    go_on();
  }
  int64_t out = 0;
  for (const auto& [name, known] : h.workers) out += quarantined(name);
  EXPECT_EQ(out, 1) << "one of four";
  EXPECT_GE(struck.size(), 2u);
}

TEST_F(CoreHealthTest, AHostThatCannotStartRanksIsSuspected) {
  start();
  const std::string host = h.host_of(job, 0);
  for (int i = 0; i < 3; ++i) {
    h.exit_rank(job, rank_on(host), ExitCode::kFailure,
                std::string(kCouldNotStart) + "no such file");
    go_on();
  }
  EXPECT_TRUE(quarantined(host));
}

TEST_F(CoreHealthTest, AnOldRecordHasNeitherQuarantineNorEvidence) {
  ASSERT_TRUE(h.quarantine("w0", "x").status.ok());
  ASSERT_TRUE(h.release("w0").status.ok());
  const std::string& stored = h.store.at(record_of(worker("w0")).key);
  EXPECT_EQ(stored.find("quarantine"), std::string::npos);
  EXPECT_EQ(stored.find("evidence"), std::string::npos);
  EXPECT_TRUE(h.release("w0").status.ok()) << "as it is";
}

}  // namespace
}  // namespace penstock
