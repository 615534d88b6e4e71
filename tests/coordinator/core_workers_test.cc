// Registration of worker daemons.
#include <gtest/gtest.h>

#include "tests/coordinator/core_harness.h"

namespace penstock {
namespace {

Register registration(const std::string& name, uint64_t incarnation, int32_t devices) {
  Register message;
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

TEST(CoreWorkersTest, TheOlderOfTwoDaemonsWithOneNameIsTurnedAway) {
  CoreHarness h;
  h.say("first", registration("same", 1, 2));
  h.clear();
  h.say("second", registration("same", 2, 2));
  ASSERT_EQ(h.messages.size(), 2u);
  EXPECT_EQ(h.messages[0].peer, "peer-first");
  EXPECT_FALSE(std::get<Registered>(h.messages[0].message).refusal.empty());
  EXPECT_EQ(h.messages[1].peer, "peer-second");
  EXPECT_EQ(h.core().workers().size(), 1u);
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

}  // namespace
}  // namespace penstock
