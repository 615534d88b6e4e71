// Workers whose hosts are not trusted: what puts them in quarantine, what does not, and how they
// come out again.
#include <gtest/gtest.h>

#include <cerrno>

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
  void start(int64_t max_restarts = 5) {
    JobSpec spec = four_rank_spec();
    spec.recovery.max_restarts = max_restarts;
    job = h.submit_ok(spec);
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
  // Rank 3 is found to hang, its process in that state.
  void expect_hang(ProcessState state) {
    const RankActivity hung{.rank = Rank{3}, .process = state, .state = {}, .quiet_ms = 3'600'000};
    h.pass(seconds(h.job(job).spec.recovery.hang_timeout + 1));
    ASSERT_FALSE(h.sent<InspectRanks>().empty());
    const InspectRanks asked = h.sent<InspectRanks>().back();
    const std::string host = h.host_of(job, 3);
    for (const auto& name : {h.host_of(job, 0), host}) {
      RanksInspected answer{job, h.record(job).epoch, asked.request, {}};
      if (name == host) answer.ranks.push_back(hung);
      h.say(name, answer);
    }
    EXPECT_EQ(h.state(job), JobState::kRecovering);
  }
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
  EXPECT_TRUE(quarantined(host)) << "until its host has passed a check";
  h.check_hosts();
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
  start(100);
  const std::string first = h.host_of(job, 0);
  for (int i = 0; i < 3; ++i) crash_on(first);
  ASSERT_TRUE(quarantined(first));
  const std::string second = h.host_of(job, 0);
  ASSERT_NE(first, second);
  crash_on(second);
  EXPECT_FALSE(quarantined(first)) << "it crashes elsewhere in the same way";
  EXPECT_NE(event("worker_released")->reason.message.find("in the same way"), std::string::npos);
  EXPECT_FALSE(quarantined(second));
  for (int i = 0; i < 2; ++i) crash_on(second);
  EXPECT_FALSE(quarantined(second)) << "no more than the first host is it to blame";
}

TEST_F(CoreHealthTest, AQuarantineThatComesAfterAReleaseHolds) {
  ASSERT_TRUE(h.quarantine("w0", "ECC errors").status.ok());
  h.workers.at("w0").answers_checks = false;
  ASSERT_TRUE(h.release("w0").status.ok());
  ASSERT_TRUE(h.quarantine("w0", "ECC errors").status.ok());
  h.workers.at("w0").answers_checks = true;
  h.check_hosts();
  h.pass(seconds(5));
  EXPECT_TRUE(quarantined("w0")) << "what was asked last counts";
  EXPECT_FALSE(worker("w0").quarantine->releasing);
}

// Somebody stopped it, which says as little of its host as that somebody killed it.
TEST_F(CoreHealthTest, AProcessThatIsStoppedIsNoEvidenceAgainstItsHost) {
  start();
  h.train(job, 1, 10);
  expect_hang(ProcessState::kStopped);
  EXPECT_TRUE(worker(h.host_of(job, 3)).evidence.empty());
}

TEST_F(CoreHealthTest, AJobThatCrashesOnAllItsHostsByTurnsPutsNoneInQuarantine) {
  start(100);
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

TEST_F(CoreHealthTest, AHostThatCannotStartRanksOrReadItsDiskIsSuspected) {
  start();
  const std::string host = h.host_of(job, 0);
  const std::string refused = std::string(kCouldNotStart) + "no such file";
  const Status unread = errno_status(EIO, "read /data/train.bin");
  for (const std::string& reason : {refused, "exited with code 1: " + unread.message(), refused}) {
    h.exit_rank(job, rank_on(host), ExitCode::kFailure, reason);
    go_on();
  }
  EXPECT_TRUE(quarantined(host));
}

TEST_F(CoreHealthTest, AHostWithAFailureGetsNoRanksBeforeItHasPassedACheck) {
  start();
  const std::string host = h.host_of(job, 0);
  h.workers.at(host).answers_checks = false;
  h.crash_rank(job, 0);
  ASSERT_EQ(h.sent<CheckHost>().size(), 1u) << "that host alone";
  h.confirm_stops(job);
  h.answer_find();
  ASSERT_EQ(h.state(job), JobState::kStarting) << "others have room, and are not waited for";
  for (int32_t rank = 0; rank < 4; ++rank) EXPECT_NE(h.host_of(job, rank), host);
  h.pass(seconds(3));
  EXPECT_GE(h.sent<CheckHost>().size(), 1u) << "asked until it is answered";
  EXPECT_FALSE(h.core().find_worker(host)->takes_ranks());
  h.restart_coordinator();
  for (const auto& [name, known] : h.workers) h.register_worker(name);
  EXPECT_FALSE(h.core().find_worker(host)->takes_ranks()) << "on record";
  h.clear();
  h.pass(seconds(2));
  ASSERT_FALSE(h.sent<CheckHost>().empty());
  h.say(host, HostChecked{1, false, "of another question"});
  EXPECT_FALSE(h.core().find_worker(host)->takes_ranks());
  EXPECT_FALSE(quarantined(host));
  h.workers.at(host).answers_checks = true;
  h.check_hosts();
  EXPECT_TRUE(h.core().find_worker(host)->takes_ranks());
  EXPECT_TRUE(h.has_event("host_checked"));
}

TEST_F(CoreHealthTest, AHostThatFailsItsCheckIsInQuarantineWithWhatTheCheckSaid) {
  start();
  const std::string host = h.host_of(job, 0);
  h.workers.at(host).sound = false;
  h.crash_rank(job, 0);
  h.check_hosts();
  ASSERT_TRUE(quarantined(host));
  EXPECT_EQ(worker(host).quarantine->reason.code, kQuarantineCheck);
  EXPECT_NE(worker(host).quarantine->reason.message.find("a word changed"), std::string::npos);
  ASSERT_TRUE(h.release(host).status.ok());
  h.check_hosts();
  EXPECT_TRUE(quarantined(host)) << "it fails again";
  h.workers.at(host).sound = true;
  h.pass(minutes(2));
  EXPECT_TRUE(quarantined(host)) << "nobody asked";
  ASSERT_TRUE(h.release(host).status.ok());
  h.check_hosts();
  EXPECT_FALSE(quarantined(host));
}

TEST_F(CoreHealthTest, AFailureWhileItIsToBeReleasedAsksForAnotherCheckFirst) {
  start();
  const std::string host = h.host_of(job, 0);
  h.workers.at(host).answers_checks = false;
  ASSERT_TRUE(h.quarantine(host, "x").status.ok());
  ASSERT_TRUE(h.release(host).status.ok());
  const uint64_t first = h.sent<CheckHost>().back().request;
  h.jump(std::chrono::milliseconds(1));
  h.crash_rank(job, 0);
  ASSERT_NE(h.sent<CheckHost>().back().request, first);
  h.say(host, HostChecked{first, true, "of before"});
  EXPECT_TRUE(quarantined(host));
  h.workers.at(host).answers_checks = true;
  h.check_hosts();
  EXPECT_FALSE(quarantined(host));
}

TEST_F(CoreHealthTest, AnOrdinaryKilledRankWaitsForNoCheck) {
  start();
  h.kill_rank(job, 0);
  EXPECT_TRUE(h.sent<CheckHost>().empty());
  for (const auto& [name, known] : h.workers) {
    EXPECT_TRUE(h.core().find_worker(name)->takes_ranks()) << name;
  }
}

TEST_F(CoreHealthTest, WithoutAnotherHostTheJobWaitsForTheCheckAndNoLonger) {
  for (const char* name : {"w2", "w3"}) ASSERT_TRUE(h.drain(name, "").status.ok());
  start();
  const std::string host = h.host_of(job, 0);
  h.workers.at(host).answers_checks = false;
  h.crash_rank(job, 0);
  h.confirm_stops(job);
  h.answer_find();
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_NE(h.record(job).reason.message.find("being checked"), std::string::npos)
      << h.record(job).reason.message;
  h.pass(seconds(1));
  h.workers.at(host).answers_checks = true;
  h.clear();
  h.pass(seconds(3));
  EXPECT_EQ(h.state(job), JobState::kStarting);
}

TEST_F(CoreHealthTest, StateHeldOnAHostThatIsCheckedIsWaitedFor) {
  start();
  h.train(job, 1, 10);
  const std::string host = h.host_of(job, 3);
  h.workers.at(host).answers_checks = false;
  expect_hang(ProcessState::kDiskSleep);
  ASSERT_EQ(h.record(job).reason.code, "rank_hung");
  ASSERT_EQ(worker(host).evidence.size(), 1u) << "a disk holds it";
  h.confirm_stops(job, {9, 10});
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  h.workers.at(host).answers_checks = true;
  h.clear();
  h.pass(seconds(3));
  ASSERT_EQ(h.state(job), JobState::kStarting);
  EXPECT_TRUE(h.record(job).restored_from_memory);
}

TEST_F(CoreHealthTest, AClockThatIsOffIsAnEventOnceAndAgainWhenItAgrees) {
  h.workers.at("w1").clock_ahead = std::chrono::milliseconds(1500);
  h.workers.at("w2").clock_ahead = -seconds(90);
  h.workers.at("w3").clock_ahead = std::chrono::milliseconds(200);
  h.pass(seconds(40));
  std::vector<std::string> said;
  for (const JobEvent& one : h.events) {
    if (one.reason.code == "clock_offset") said.push_back(one.reason.message);
  }
  ASSERT_EQ(said.size(), 2u);
  EXPECT_NE(said[0].find("worker w1 is 1.500 s ahead of"), std::string::npos) << said[0];
  EXPECT_NE(said[1].find("worker w2 is 90.000 s behind"), std::string::npos) << said[1];
  h.workers.at("w1").clock_ahead = {};
  h.pass(seconds(40));
  EXPECT_TRUE(h.has_event("clock_agrees"));
  EXPECT_EQ(h.core().find_worker("w2")->clock_behind, Duration(seconds(90)));
}

// The time of events does not follow a step of this host's clock; the workers' clocks do.
TEST_F(CoreHealthTest, WorkersAreComparedWithTheClockAsItIsSet) {
  for (int i = 0; i < 30; ++i) {
    h.pass(seconds(1));
    const Instant set = h.now() + seconds(90);
    Heartbeat beat;
    beat.incarnation = 1;
    beat.sequence = ++h.workers.at("w1").sequence;
    beat.sent_at_ns = set.nanoseconds;
    h.workers.at("w1").alive = false;
    h.feed(WorkerMessage{"peer-w1", beat, set});
  }
  EXPECT_FALSE(h.has_event("clock_offset"));
}

// Heartbeats that waited while nobody took them are no evidence of a clock.
TEST_F(CoreHealthTest, HeartbeatsThatComeLateDoNotMakeAClockOff) {
  h.pass(seconds(3));
  const Instant stopped = h.now();
  h.jump(seconds(30));
  for (int i = 0; i < 30; ++i) {
    Heartbeat late;
    late.incarnation = 1;
    late.sequence = ++h.workers.at("w1").sequence;
    late.sent_at_ns = (stopped + seconds(i)).nanoseconds;
    h.say("w1", late);
  }
  h.pass(seconds(30));
  EXPECT_FALSE(h.has_event("clock_offset"));
}

TEST_F(CoreHealthTest, AnOldRecordHasNeitherQuarantineNorEvidence) {
  ASSERT_TRUE(h.quarantine("w0", "x").status.ok());
  ASSERT_TRUE(h.release("w0").status.ok());
  h.check_hosts();
  const std::string& stored = h.store.at(record_of(worker("w0")).key);
  EXPECT_EQ(stored.find("quarantine"), std::string::npos);
  EXPECT_EQ(stored.find("evidence"), std::string::npos);
  EXPECT_TRUE(h.release("w0").status.ok()) << "as it is";
}

}  // namespace
}  // namespace penstock
