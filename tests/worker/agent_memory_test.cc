// What the daemon holds in memory for ranks that ended, and when it lets go of it.
#include <signal.h>

#include "tests/worker/held_memory.h"
#include "worker/agent/state_holders.h"

namespace penstock {
namespace {

class AgentMemoryTest : public AgentTest {
 protected:
  // What is said of it on a new connection.
  std::vector<RanksStopped> reconnect() {
    sent.clear();
    agent->on_disconnected();
    agent->on_connected(now);
    coordinator(Registered{{3}, 1000, ""});
    return sent_of<RanksStopped>();
  }
};

TEST_F(AgentMemoryTest, AStopThatKeepsTheStateIsAnsweredWithWhatIsHeld) {
  register_agent();
  run_rank(key(1, 0));
  held = {{Rank{0}, {8, 9}}};
  coordinator(StopRanks{kJob, {1}, 0, "recovers", true});
  EXPECT_TRUE(sent_of<RanksStopped>().empty()) << "the rank still runs";
  agent->on_rank_exit(now, key(1, 0), {-1, SIGKILL}, "");
  ASSERT_EQ(sent_of<RanksStopped>().size(), 1u);
  EXPECT_EQ(sent_of<RanksStopped>()[0], (RanksStopped{kJob, {1}, held}));
  EXPECT_TRUE(dropped.empty());
}

TEST_F(AgentMemoryTest, WhatIsHeldIsSaidAgainOnEveryConnectionUntilItIsLetGo) {
  register_agent();
  run_rank(key(1, 0));
  held = {{Rank{0}, {8, 9}}};
  coordinator(StopRanks{kJob, {1}, 0, "recovers", true});
  agent->on_rank_exit(now, key(1, 0), {-1, SIGKILL}, "");
  EXPECT_EQ(reconnect(), (std::vector<RanksStopped>{{kJob, {1}, held}}));
  coordinator(StopRanks{kJob, {1}, 0, "its state is not needed"});
  EXPECT_TRUE(reconnect().empty());
}

// It keeps them for others, and no rank of the job ran here.
TEST_F(AgentMemoryTest, CopiesAloneAreSaidAgainToo) {
  register_agent();
  copies[{1}] = {{Rank{5}, {8, 9}}};
  coordinator(StopRanks{kJob, {1}, 0, "recovers", true});
  EXPECT_EQ(reconnect(), (std::vector<RanksStopped>{{kJob, {1}, {}, copies[{1}]}}));
  coordinator(StopRanks{kJob, {1}, 0, "its state is not needed"});
  EXPECT_TRUE(reconnect().empty());
}

TEST_F(AgentMemoryTest, AnyOtherStopLetsGoOfIt) {
  register_agent();
  held = {{Rank{0}, {8, 9}}};
  coordinator(StopRanks{kJob, {3}, 0, "cancelled"});
  EXPECT_EQ(sent_of<RanksStopped>()[0], (RanksStopped{kJob, {3}, {}}));
  EXPECT_EQ(dropped, (std::vector<std::pair<JobId, Epoch>>{{kJob, Epoch{4}}}));
}

TEST_F(AgentMemoryTest, TheNewestStopDecides) {
  register_agent();
  run_rank(key(1, 0));
  held = {{Rank{0}, {8, 9}}};
  coordinator(StopRanks{kJob, {1}, 0, "recovers", true});
  coordinator(StopRanks{kJob, {1}, 0, "cancelled"});
  agent->on_rank_exit(now, key(1, 0), {-1, SIGKILL}, "");
  EXPECT_EQ(sent_of<RanksStopped>()[0], (RanksStopped{kJob, {1}, {}}));
}

TEST_F(AgentMemoryTest, WhatANewerAttemptUsesIsNotOffered) {
  register_agent();
  run_rank(key(2, 0));
  held = {{Rank{0}, {8, 9}}};
  coordinator(StopRanks{kJob, {1}, 0, "late", true});
  EXPECT_EQ(sent_of<RanksStopped>()[0], (RanksStopped{kJob, {1}, {}}));
}

TEST_F(AgentMemoryTest, OnceTrainingBeginsOlderAttemptsAreLetGo) {
  register_agent();
  run_rank(key(2, 0));
  coordinator(BeginTraining{kJob, {2}, {"address"}});
  EXPECT_EQ(dropped, (std::vector<std::pair<JobId, Epoch>>{{kJob, Epoch{2}}}));
}

constexpr uint64_t kBytes = 4096;

// What a rank does with its memory: trains through `step`, and leaves `value` in it.
void train(const Path& file, int32_t rank, int64_t step, int value) {
  Result<StateMemory> memory = StateMemory::make(identity(rank), kBytes, file);
  ASSERT_TRUE(memory.ok()) << memory.status().to_string();
  write_step(*memory, kBytes, step, std::byte(value));
}

TEST(StateHoldersTest, WhatARankLeavesIsThereForTheNextOne) {
  StateHolders holders;
  const Result<Path> first = holders.hold(kJob, {1}, Rank{2}, false);
  ASSERT_TRUE(first.ok()) << first.status().to_string();
  EXPECT_TRUE(holders.held(kJob).empty()) << "nothing is there before the rank has taken it";
  train(*first, 2, 7, 70);
  train(*first, 2, 8, 80);
  EXPECT_EQ(holders.held(kJob), (std::vector<HeldRank>{{Rank{2}, {7, 8}}}));
  EXPECT_TRUE(holders.held(JobId{99}).empty());
  const Result<Path> second = holders.hold(kJob, {2}, Rank{2}, true);
  ASSERT_TRUE(second.ok());
  const Result<StateMemory> memory = StateMemory::make(identity(2), kBytes, *second);
  ASSERT_TRUE(memory.ok());
  ASSERT_TRUE(memory->find(8));
  EXPECT_EQ(memory->generation(*memory->find(8))[kBytes - 1], std::byte{80});
}

TEST(StateHoldersTest, AGenerationThatWasBeingWrittenIsNotHeld) {
  StateHolders holders;
  const Path file = *holders.hold(kJob, {1}, Rank{0}, false);
  train(file, 0, 7, 70);
  train(file, 0, 8, 80);
  StateMemory::make(identity(0), kBytes, file)->begin_writing(8 % kStateGenerations);
  EXPECT_EQ(holders.held(kJob), (std::vector<HeldRank>{{Rank{0}, {7}}}));
}

TEST(StateHoldersTest, AStartFromElsewhereBeginsWithNothing) {
  StateHolders holders;
  train(*holders.hold(kJob, {1}, Rank{0}, false), 0, 7, 70);
  const Path file = *holders.hold(kJob, {2}, Rank{0}, false);
  EXPECT_TRUE(holders.held(kJob).empty());
  EXPECT_FALSE(StateMemory::make(identity(0), kBytes, file)->find(7));
}

TEST(StateHoldersTest, MemoryOfAnotherContentIsNotUsed) {
  StateHolders holders;
  const Path file = *holders.hold(kJob, {1}, Rank{0}, false);
  train(file, 0, 7, 70);
  HeldStateIdentity other = identity(0);
  other.contents.low ^= 1;
  const Result<StateMemory> memory = StateMemory::make(other, kBytes, file);
  ASSERT_TRUE(memory.ok());
  EXPECT_FALSE(memory->find(7));
  EXPECT_EQ(memory->generation(7 % kStateGenerations)[0], std::byte{0});
}

TEST(StateHoldersTest, WhatIsNotTrustedOrOlderIsGone) {
  StateHolders holders;
  train(*holders.hold(kJob, {1}, Rank{0}, false), 0, 7, 70);
  train(*holders.hold(kJob, {2}, Rank{1}, false), 1, 7, 70);
  train(*holders.hold(kJob, {2}, Rank{2}, false), 2, 7, 70);
  holders.drop_before(JobId{99}, Epoch{9});
  EXPECT_EQ(holders.held(kJob).size(), 3u);
  holders.drop_before(kJob, Epoch{2});
  holders.distrust(kJob, Rank{1});
  EXPECT_EQ(holders.held(kJob), (std::vector<HeldRank>{{Rank{2}, {7}}}));
  holders.drop_before(kJob, Epoch{3});
  EXPECT_EQ(holders.size(), 0u);
}

TEST(HeldStateHeadTest, WhatIsNoHeadOrHoldsLessThanItSaysIsRefused) {
  HeldStateHead head;
  head.job = 7;
  head.rank = 3;
  head.generation_bytes = 64;
  const uint64_t size = held_state_bytes(64);
  EXPECT_EQ(read_held_state(head, size).status().code(), Code::kDataLoss) << "in the making";
  head.magic = kHeldStateMagic;
  ASSERT_TRUE(read_held_state(head, size).ok());
  EXPECT_TRUE(read_held_state(head, size)->steps.empty());
  head.steps[1] = 5;
  EXPECT_EQ(read_held_state(head, size)->steps, (std::vector<int64_t>{5}));
  EXPECT_EQ(read_held_state(head, size - 1).status().code(), Code::kDataLoss);
  head.generation_bytes = ~uint64_t{0};
  EXPECT_EQ(read_held_state(head, size).status().code(), Code::kDataLoss);
  head.generation_bytes = 64;
  head.rank = -1;
  EXPECT_EQ(read_held_state(head, size).status().code(), Code::kDataLoss);
  head.rank = 3;
  head.magic ^= 1;
  EXPECT_EQ(read_held_state(head, size).status().code(), Code::kDataLoss);
}

}  // namespace
}  // namespace penstock
