// Checks of the host that the coordinator asks a daemon for.
#include "tests/worker/agent_harness.h"

namespace penstock {
namespace {

using AgentHealthTest = AgentTest;

TEST_F(AgentHealthTest, ACheckIsBegunOnceAndAnsweredAsOftenAsItIsAsked) {
  register_agent();
  for (int i = 0; i < 3; ++i) coordinator(CheckHost{7});
  EXPECT_EQ(checks_begun, 1);
  EXPECT_TRUE(sent_of<HostChecked>().empty());
  agent->on_host_checked(false, "memory: a word changed");
  ASSERT_EQ(sent_of<HostChecked>().size(), 1u);
  EXPECT_EQ(sent_of<HostChecked>()[0], (HostChecked{7, false, "memory: a word changed"}));
  coordinator(CheckHost{7});  // the answer was lost
  EXPECT_EQ(sent_of<HostChecked>().size(), 2u);
  EXPECT_EQ(checks_begun, 1);
  coordinator(CheckHost{8});
  EXPECT_EQ(checks_begun, 2);
}

TEST_F(AgentHealthTest, WhatIsAskedDuringACheckIsAnsweredByAnother) {
  register_agent();
  coordinator(CheckHost{7});
  coordinator(CheckHost{8});
  EXPECT_EQ(checks_begun, 1);
  agent->on_host_checked(true, "fine");
  EXPECT_EQ(sent_of<HostChecked>().back().request, 7u);
  EXPECT_EQ(checks_begun, 2);
  agent->on_host_checked(true, "fine");
  EXPECT_EQ(sent_of<HostChecked>().back().request, 8u);
}

TEST_F(AgentHealthTest, ACheckThatCannotBeStartedHasFailed) {
  register_agent();
  check_result = not_found("no penstock-rank");
  coordinator(CheckHost{7});
  ASSERT_EQ(sent_of<HostChecked>().size(), 1u);
  EXPECT_FALSE(sent_of<HostChecked>()[0].passed);
  EXPECT_NE(sent_of<HostChecked>()[0].report.find("no penstock-rank"), std::string::npos);
}

TEST_F(AgentHealthTest, AHeartbeatSaysWhatTimeItIsHere) {
  register_agent();
  now += 1000 * kMs;
  agent->on_tick(now);
  ASSERT_FALSE(sent_of<Heartbeat>().empty());
  EXPECT_EQ(sent_of<Heartbeat>().back().sent_at_ns, wall.nanoseconds);
}

TEST_F(AgentHealthTest, AHeartbeatAddsUpWhatRanksComputedAndWaitedFor) {
  register_agent();
  run_rank(key(1, 0));
  for (int64_t step = 1; step <= 3; ++step) {
    rank_says(key(1, 0), RankProgress{.job = kJob,
                                      .epoch = {1},
                                      .rank = {0},
                                      .step = step,
                                      .compute_seconds = 0.25,
                                      .expert_wait_seconds = 0.5,
                                      .pipeline_wait_seconds = 1.0,
                                      .reduce_seconds = 2.0,
                                      .optimizer_seconds = 0.125,
                                      .checkpoint_seconds = 64.0});
  }
  now += 1000 * kMs;
  agent->on_tick(now);
  const std::vector<RankStatus> ranks = sent_of<Heartbeat>().back().ranks;
  ASSERT_EQ(ranks.size(), 1u);
  EXPECT_EQ(ranks[0].pace, (RankPace{3, 3 * 0.375, 3 * 3.5}));
}

}  // namespace
}  // namespace penstock
