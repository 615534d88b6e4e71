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

}  // namespace
}  // namespace penstock
