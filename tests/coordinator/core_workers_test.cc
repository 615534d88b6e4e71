// Registration of worker daemons.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

Register registration(const std::string& name, uint64_t incarnation, int32_t devices,
                      uint64_t sequence = 1) {
  Register message;
  message.sequence = sequence;
  message.name = name;
  message.incarnation = incarnation;
  message.host = "h";
  message.device_count = devices;
  message.device_kind = "cpu";
  return message;
}

TEST(CoreWorkersTest, ARegistrationIsAnsweredWithIdAndInterval) {
  CoreHarness h;
  h.add_worker("w0", 2);
  ASSERT_EQ(h.sent<Registered>().size(), 1u);
  EXPECT_EQ(h.sent<Registered>()[0].worker, WorkerId{1});
  EXPECT_EQ(h.sent<Registered>()[0].heartbeat_interval_ms, 1000);
  EXPECT_TRUE(h.sent<Registered>()[0].refusal.empty());
  EXPECT_TRUE(h.has_event("worker_up"));
}

TEST(CoreWorkersTest, ARepeatedRegistrationChangesNothing) {
  CoreHarness h;
  h.add_worker("w0", 2);
  const size_t events = h.events.size();
  h.register_worker("w0");
  EXPECT_EQ(h.core().workers().size(), 1u);
  EXPECT_EQ(h.events.size(), events);
  EXPECT_EQ(h.sent<Registered>().back().worker, WorkerId{1});
}

TEST(CoreWorkersTest, AnotherProtocolVersionIsRefused) {
  CoreHarness h;
  Register message = registration("w0", 1, 1);
  message.protocol_version = kProtocolVersion + 1;
  h.say("w0", message);
  EXPECT_NE(h.sent<Registered>().at(0).refusal.find("protocol"), std::string::npos);
  EXPECT_TRUE(h.core().workers().empty());
}

TEST(CoreWorkersTest, AWorkerWithoutDevicesOrNameIsRefused) {
  CoreHarness h;
  h.say("w0", registration("w0", 1, 0));
  h.say("w1", registration("", 1, 1));
  EXPECT_FALSE(h.sent<Registered>().at(0).refusal.empty());
  EXPECT_FALSE(h.sent<Registered>().at(1).refusal.empty());
  EXPECT_TRUE(h.core().workers().empty());
}

// Registers a daemon of a name that another one had, and repeats what it is asked.
void replace_daemon(CoreHarness& h, const std::string& peer, Register message) {
  h.say(peer, message);
  message.challenge = h.sent<Registered>().back().challenge;
  ++message.sequence;
  h.say(peer, message);
}

TEST(CoreWorkersTest, TheOlderOfTwoDaemonsWithOneNameIsTurnedAway) {
  CoreHarness h;
  h.say("first", registration("same", 1, 2));
  h.clear();
  replace_daemon(h, "second", registration("same", 2, 2));
  ASSERT_EQ(h.messages.size(), 3u);
  EXPECT_EQ(h.messages[0].peer, "peer-second") << "what it is asked";
  EXPECT_EQ(h.messages[1].peer, "peer-first");
  EXPECT_FALSE(std::get<Registered>(h.messages[1].message).refusal.empty());
  EXPECT_EQ(h.messages[2].peer, "peer-second");
  EXPECT_EQ(h.core().workers().size(), 1u);
}

TEST(CoreWorkersTest, WhatADeadDaemonSaidLateDoesNotTurnItsSuccessorAway) {
  CoreHarness h;
  h.say("first", registration("same", 1, 2));
  replace_daemon(h, "second", registration("same", 2, 2));
  h.clear();
  h.say("first", registration("same", 1, 2));
  ASSERT_EQ(h.messages.size(), 1u);
  EXPECT_EQ(h.messages[0].peer, "peer-first");
  EXPECT_FALSE(std::get<Registered>(h.messages[0].message).refusal.empty());
  EXPECT_EQ(h.core().workers().begin()->second.record.incarnation, 2u);
}

// The words of a daemon that ended before it was ever heard come after its successor's.
TEST(CoreWorkersTest, ADaemonThatDoesNotProveThatItLivesTakesNobodysPlace) {
  CoreHarness h;
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.clear();
  for (const uint64_t sequence : {1, 2}) h.say("dead", registration("w0", 77, 4, sequence));
  ASSERT_EQ(h.messages.size(), 2u);
  const uint64_t challenge = h.sent<Registered>()[0].challenge;
  EXPECT_NE(challenge, 0u);
  EXPECT_EQ(h.sent<Registered>()[1].challenge, challenge);
  EXPECT_EQ(h.sent<Registered>()[0].worker, WorkerId{});
  EXPECT_EQ(h.state(job), JobState::kRunning);
  EXPECT_EQ(h.core().find_worker("w0")->peer, "peer-w0");
  EXPECT_EQ(h.core().find_worker("w0")->record.incarnation, 1u);
  // What one daemon was asked is no proof of another.
  Register other = registration("w0", 78, 4);
  other.challenge = challenge;
  h.jump(seconds(1));
  h.say("other", other);
  EXPECT_EQ(h.state(job), JobState::kRunning);
  EXPECT_NE(h.sent<Registered>().back().challenge, challenge);
  other.challenge = h.sent<Registered>().back().challenge;
  h.say("other", other);
  EXPECT_EQ(h.state(job), JobState::kRecovering);
}

// The same after a restart of the coordinator, which has heard nobody yet.
TEST(CoreWorkersTest, AfterARestartADeadDaemonsWordsEndNoRanks) {
  CoreHarness h;
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.restart_coordinator();
  h.say("dead", registration("w0", 77, 4));
  EXPECT_EQ(h.state(job), JobState::kRunning);
  EXPECT_EQ(h.core().find_worker("w0")->state, WorkerState::kExpected);
  h.register_worker("w0");
  h.pass(seconds(5));
  EXPECT_EQ(h.state(job), JobState::kRunning);
}

// What an older connection carried may come after the newer one's first words.
TEST(CoreWorkersTest, ALateRegistrationOfTheSameDaemonIsDropped) {
  CoreHarness h;
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.clear();
  for (const uint64_t sequence : {1, 2}) {
    h.say("older", registration("w0", 1, 4, sequence));  // from before it had ranks
  }
  EXPECT_TRUE(h.messages.empty());
  EXPECT_EQ(h.core().find_worker("w0")->peer, "peer-w0");
  for (const RankView& rank : h.job(job).ranks) EXPECT_FALSE(rank.missing_since.has_value());
  h.say("newer", registration("w0", 1, 4, 100));
  EXPECT_EQ(h.core().find_worker("w0")->peer, "peer-newer");
}

TEST(CoreWorkersTest, ALateOrRepeatedHeartbeatIsDropped) {
  CoreHarness h;
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  Heartbeat old;  // from before the ranks existed
  old.incarnation = 1;
  old.sequence = 1;
  h.say("w0", old);
  for (const RankView& rank : h.job(job).ranks) EXPECT_FALSE(rank.missing_since.has_value());
  h.heartbeat("w0");
  h.register_worker("w0");  // a new connection of the same daemon: what the old one carried is late
  h.say("w0", old);
  for (const RankView& rank : h.job(job).ranks) EXPECT_FALSE(rank.missing_since.has_value());
}

TEST(CoreWorkersTest, ARankThatOneHeartbeatDoesNotListIsNotMissingBeforeAnotherDoesNotEither) {
  CoreHarness h;
  h.add_worker("w0", 2);
  h.add_worker("w1", 2);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.workers.at("w1").ranks.clear();
  h.heartbeat("w1");
  h.workers.at("w1").alive = false;
  h.pass(std::chrono::milliseconds(2500));
  EXPECT_EQ(h.state(job), JobState::kRunning);
  h.heartbeat("w1");
  h.feed(Tick{});
  ASSERT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_EQ(h.record(job).last_failure->reason.code, "rank_missing");
}

TEST(CoreWorkersTest, PulsesKeepAWorkerThatIsUpAndNoOther) {
  CoreHarness h;
  h.add_worker("w0", 2);
  h.workers.at("w0").alive = false;
  for (int i = 0; i < 20; ++i) {
    h.pass(std::chrono::milliseconds(500));
    ASSERT_TRUE(h.core().hears(WorkerId{1}, 1));
    h.feed(WorkerPulse{WorkerId{1}, 1});
  }
  EXPECT_FALSE(h.core().hears(WorkerId{1}, 2)) << "of the process before it";
  EXPECT_FALSE(h.core().hears(WorkerId{2}, 1));
  for (int i = 0; i < 20; ++i) {
    h.pass(std::chrono::milliseconds(500));
    h.feed(WorkerPulse{WorkerId{1}, 2});
  }
  EXPECT_FALSE(h.core().hears(WorkerId{1}, 1)) << "it is lost, and has to register first";
  EXPECT_TRUE(h.has_event("worker_lost"));
}

TEST(CoreWorkersTest, AWorkerThatIsProvenGoneIsLostAtOnceAndNoOther) {
  CoreHarness h;
  h.add_worker("w0", 2);
  h.add_worker("w1", 2);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.feed(WorkerGone{WorkerId{2}, 7});
  EXPECT_EQ(h.state(job), JobState::kRunning) << "of a process before it";
  h.feed(WorkerGone{WorkerId{2}, 1});
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  EXPECT_EQ(h.record(job).reason.code, "worker_lost");
  EXPECT_NE(h.record(job).reason.message.find("w1 has ended"), std::string::npos);
  EXPECT_TRUE(h.core().hears(WorkerId{1}, 1));
  EXPECT_FALSE(h.core().hears(WorkerId{2}, 1));
  h.confirm_stops(job);
  h.answer_find();
  h.add_worker("w2", 2);
  h.run(job);
}

TEST(CoreWorkersTest, AMessageThatIsNotAWorkersToSendIsDropped) {
  CoreHarness h;
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.say("w0", StopRanks{job, Epoch{1}, 0, "forged"});
  h.say("w0", CheckpointOutcome{job, Epoch{1}, 20, true, {}});
  EXPECT_EQ(h.state(job), JobState::kRunning);
}

TEST(CoreWorkersTest, AWorkerCannotSpeakForRanksOfAnother) {
  CoreHarness h;
  h.add_worker("w0", 2);
  h.add_worker("w1", 2);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  const std::string other = h.host_of(job, 3);
  h.say(other, RankExited{job, Epoch{1}, Rank{0}, 1, 0, "forged"});
  h.say(other, RankExited{job, Epoch{1}, Rank{-1}, 1, 0, "forged"});
  h.say(other, RankExited{job, Epoch{1}, Rank{4}, 1, 0, "forged"});
  h.say(other, RankFinished{job, Epoch{1}, Rank{0}, 100});
  EXPECT_EQ(h.state(job), JobState::kRunning);
  EXPECT_FALSE(h.job(job).ranks[0].finished);
}

TEST(CoreWorkersTest, FreeDevicesAreWhatNoPlacementHolds) {
  CoreHarness h;
  h.add_worker("w0", 6);
  h.submit_ok(four_rank_spec());
  EXPECT_EQ(h.core().free_devices(WorkerId{1}), (std::vector<int32_t>{4, 5}));
}

TEST(CoreWorkersTest, DevicesOfAWorkerLongGoneCountNoMore) {
  CoreHarness h;
  h.add_worker("w0", 2);
  h.add_worker("w1", 2);
  h.workers.at("w1").alive = false;
  h.pass(std::chrono::minutes(5));
  EXPECT_TRUE(h.submit(four_rank_spec("a")).status.ok());
  h.pass(std::chrono::minutes(6));
  EXPECT_EQ(h.submit(four_rank_spec("b")).status.code(), Code::kInvalidArgument);
}

// ---- silence is not death

CoreConfig with_lease() {
  CoreConfig config = CoreHarness::test_config();
  config.lease = seconds(15);
  config.lease_margin = seconds(2);
  return config;
}

TEST(CoreWorkersTest, AHeartbeatIsAnsweredOnceItCounts) {
  CoreHarness h(with_lease());
  h.add_worker("w0", 2);
  EXPECT_EQ(h.sent<Registered>().back().lease_ms, 15'000);
  EXPECT_EQ(h.sent<Registered>().back().heard_sequence, 0U);
  h.clear();
  h.heartbeat("w0");
  h.heartbeat("w0");
  ASSERT_EQ(h.sent<Registered>().size(), 2U);
  EXPECT_EQ(h.sent<Registered>().back().heard_sequence, 3U);  // the first was its Register's
  EXPECT_EQ(h.sent<Registered>().back().lease_ms, 15'000);
  h.clear();
  Heartbeat late;
  late.incarnation = 1;
  late.sequence = 1;
  h.say("w0", late);
  EXPECT_TRUE(h.sent<Registered>().empty());
}

TEST(CoreWorkersTest, ASilentWorkerKeepsItsRanksForAsLongAsItsLease) {
  CoreHarness h(with_lease());
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.workers.at("w0").alive = false;
  h.pass(seconds(16));
  EXPECT_EQ(h.state(job), JobState::kRunning);
  EXPECT_FALSE(h.has_event("worker_lost"));
  h.workers.at("w0").alive = true;
  h.pass(seconds(5));
  EXPECT_EQ(h.state(job), JobState::kRunning);
  EXPECT_EQ(h.record(job).restarts, 0);
  h.workers.at("w0").alive = false;
  h.pass(milliseconds(17'500));
  EXPECT_EQ(h.record(job).reason.code, "worker_lost") << "lease and margin are over";
}

TEST(CoreWorkersTest, ASilentWorkerGetsNothingNew) {
  CoreHarness h(with_lease());
  h.add_worker("w0", 4);
  h.workers.at("w0").alive = false;
  h.pass(seconds(4));
  h.clear();
  const JobId job = h.submit_ok(four_rank_spec());
  EXPECT_TRUE(h.sent<StartRank>().empty());
  h.workers.at("w0").alive = true;
  h.pass(seconds(1));
  h.run(job);
}

// The ranks of the other worker lost a peer, which proves that no step is finished any more.
TEST(CoreWorkersTest, AJobSomeOfWhoseRanksHaveEndedDoesNotWaitForASilentWorker) {
  CoreHarness h(with_lease());
  h.add_worker("w0", 2);
  h.add_worker("w1", 2);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.add_worker("w2", 2);
  h.workers.at("w1").alive = false;
  h.say("w0", RankExited{job, Epoch{1}, Rank{0}, 15, 0, "peer lost"});
  EXPECT_EQ(h.state(job), JobState::kRecovering);
  h.workers.at("w0").ranks.clear();
  h.say("w0", RanksStopped{job, Epoch{1}, {}});
  EXPECT_EQ(h.state(job), JobState::kRecovering) << "w1 has missed nothing yet";
  h.pass(seconds(4));
  EXPECT_EQ(h.record(job).last_failure->reason.code, "worker_lost") << "it is what was lost";
  EXPECT_EQ(h.record(job).last_failure->worker, "w1");
  h.answer_find();
  h.run(job);
  EXPECT_EQ(h.record(job).epoch, Epoch{2});
  EXPECT_TRUE(h.core().hears(WorkerId{2}, 1)) << "it itself is not given up";
  h.clear();
  h.workers.at("w1").alive = true;
  h.pass(seconds(1));
  ASSERT_FALSE(h.sent<StopRanks>().empty()) << "the first thing it hears";
  EXPECT_EQ(h.sent<StopRanks>()[0].epoch, Epoch{1});
}

// Its ranks ended with its lease, and the others are heard first.
TEST(CoreWorkersTest, ASilentWorkerIsTheCauseOfAPeerThatWasLost) {
  CoreHarness h(with_lease());
  h.add_worker("w0", 2);
  h.add_worker("w1", 2);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.workers.at("w1").alive = false;
  h.pass(seconds(15));
  EXPECT_EQ(h.state(job), JobState::kRunning);
  h.say("w0", RankExited{job, Epoch{1}, Rank{0}, 15, 0, "peer lost"});
  EXPECT_EQ(h.record(job).reason.code, "worker_lost");
  EXPECT_NE(h.record(job).reason.message.find("no word from worker w1"), std::string::npos);
}

TEST(CoreWorkersTest, AJobNoneOfWhoseRanksIsKnownToHaveEndedWaitsForTheLease) {
  CoreHarness h(with_lease());
  h.add_worker("w0", 4);
  h.add_worker("w1", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  const std::string host = h.host_of(job, 0);
  h.workers.at(host).alive = false;
  h.pass(seconds(4));
  EXPECT_TRUE(h.cancel(job).status.ok());
  h.pass(seconds(12));
  EXPECT_EQ(h.state(job), JobState::kStopping);
  h.pass(seconds(3));
  EXPECT_EQ(h.state(job), JobState::kCancelled);
}

TEST(CoreWorkersTest, TimeInWhichTheCoordinatorDidNotRunIsNobodysSilence) {
  CoreHarness h(with_lease());
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.workers.at("w0").alive = false;
  h.pass(seconds(10));
  h.jump(seconds(60));
  h.pass(seconds(16));  // workers that saw it stopped count their leases from then
  EXPECT_EQ(h.state(job), JobState::kRunning);
  h.pass(seconds(3));
  EXPECT_EQ(h.record(job).reason.code, "worker_lost");
}

TEST(CoreWorkersTest, ARestartedCoordinatorWaitsForAsLongAsTheLeaseOfTheOneBefore) {
  CoreHarness h(with_lease());
  h.add_worker("w0", 4);
  const JobId job = h.submit_ok(four_rank_spec());
  h.run(job);
  h.workers.at("w0").alive = false;
  h.restart_coordinator();
  h.pass(seconds(16));
  EXPECT_EQ(h.state(job), JobState::kRunning);
  h.pass(seconds(2));
  EXPECT_EQ(h.record(job).reason.code, "worker_lost");
}

}  // namespace
}  // namespace penstock
