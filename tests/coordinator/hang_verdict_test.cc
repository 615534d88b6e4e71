// Which rank a verdict names, by what the daemons say.
#include "coordinator/core/hang_verdict.h"

#include <gtest/gtest.h>

namespace penstock {
namespace {

using std::chrono::seconds;

constexpr HangLimits kLimits{.stopped = seconds(60), .training = seconds(60), .slow = seconds(600)};

class HangVerdictTest : public ::testing::Test {
 protected:
  // Every rank waits in step 41 for the next one, for 100 s; the last for nobody.
  explicit HangVerdictTest(int ranks = 4) : said(ranks), known(ranks, true) {
    for (int rank = 0; rank < ranks; ++rank) {
      RankActivity& activity = said[rank];
      activity.rank = Rank{rank};
      activity.process = ProcessState::kSleeping;
      activity.recorded = true;
      activity.state = {.phase = FlightPhase::kTraining,
                        .step = 41,
                        .kind = TraceKind::kReceive,
                        .what = static_cast<uint8_t>(Transfer::kGradients),
                        .microbatch = 2,
                        .peer = rank + 1 < ranks ? rank + 1 : -1};
      activity.quiet_ms = 100'000;
      activity.log_tail = "lines of rank " + std::to_string(rank) + "\n";
    }
  }
  std::vector<const RankActivity*> answers() const {
    std::vector<const RankActivity*> ranks;
    for (size_t rank = 0; rank < said.size(); ++rank) {
      ranks.push_back(known[rank] ? &said[rank] : nullptr);
    }
    return ranks;
  }
  std::vector<std::string> hosts() const {
    std::vector<std::string> names;
    for (size_t rank = 0; rank < said.size(); ++rank) names.push_back("w" + std::to_string(rank));
    return names;
  }
  std::optional<HangVerdict> verdict() const { return find_hung(answers(), hosts(), kLimits); }
  std::optional<HangVerdict> unreachable(const std::vector<bool>& unheard,
                                         Duration patience) const {
    return find_unreachable(answers(), hosts(), unheard, patience);
  }
  void expect_named(int rank) const {
    const auto found = verdict();
    ASSERT_TRUE(found);
    EXPECT_EQ(found->rank, Rank{rank}) << found->message;
  }

  std::vector<RankActivity> said;
  std::vector<bool> known;
};

TEST_F(HangVerdictTest, TheEdgesLeadToTheRankThatWaitsForNobody) {
  said[3].process = ProcessState::kRunning;
  said[3].state = {.phase = FlightPhase::kTraining,
                   .step = 41,
                   .kind = TraceKind::kSubOp,
                   .what = static_cast<uint8_t>(SubOp::kMlp),
                   .microbatch = 3,
                   .layer = 7};
  const auto found = verdict();
  ASSERT_TRUE(found);
  EXPECT_EQ(found->rank, Rank{3});
  EXPECT_EQ(found->message,
            "rank 3 on w3 has not moved for 100.0 s, in mlp(F) of layer 7, micro-batch 3, step 41: "
            "its process computes; rank 2 on w2 waits for it in receive(B), micro-batch 2, step "
            "41; 2 ranks wait for those");
  EXPECT_EQ(found->log_tail, "lines of rank 3\n");
}

TEST_F(HangVerdictTest, AStoppedRankIsNamedEvenWhereItWaitedWhenItWasStopped) {
  said[1].process = ProcessState::kStopped;
  const auto found = verdict();
  ASSERT_TRUE(found);
  EXPECT_EQ(found->rank, Rank{1});
  EXPECT_NE(found->message.find("waiting for a message of rank 2: its process is stopped"),
            std::string::npos)
      << found->message;
  EXPECT_NE(found->message.find("rank 0 on w0 waits for it"), std::string::npos);
}

TEST_F(HangVerdictTest, NothingIsNamedWhileAnyRankMoves) {
  said[3].quiet_ms = 59'999;
  EXPECT_FALSE(verdict());
  said[3].quiet_ms = 60'000;
  expect_named(3);
  said[0].quiet_ms = 10;
  EXPECT_FALSE(verdict()) << "a rank that waits, but has only begun to";
}

TEST_F(HangVerdictTest, SlowPhasesMayTakeLonger) {
  for (const FlightPhase phase :
       {FlightPhase::kStarting, FlightPhase::kLoading, FlightPhase::kConnecting,
        FlightPhase::kEvaluating, FlightPhase::kSaving, FlightPhase::kFinishing}) {
    said[3].state.phase = phase;
    said[3].quiet_ms = 599'999;
    EXPECT_FALSE(verdict()) << to_sentence(said[3].state);
    said[3].quiet_ms = 600'000;
    expect_named(3);
  }
  said[3].quiet_ms = 60'000;
  said[3].process = ProcessState::kStopped;
  expect_named(3);
}

TEST_F(HangVerdictTest, WhoWaitsForTheCoordinatorDoesNotHang) {
  for (const FlightPhase phase : {FlightPhase::kReady, FlightPhase::kCommitting}) {
    for (RankActivity& activity : said) {
      activity.state = {.phase = phase};
      activity.quiet_ms = 10'000'000;
    }
    EXPECT_FALSE(verdict());
    said[2].state = {.phase = FlightPhase::kLoading};
    expect_named(2);
    said[2].quiet_ms = 1000;
    EXPECT_FALSE(verdict());
  }
}

TEST_F(HangVerdictTest, ARankWithoutARecordIsStuckBeforeItLoaded) {
  for (RankActivity& activity : said) activity.state = {.phase = FlightPhase::kReady};
  said[1].recorded = false;
  said[1].quiet_ms = 600'000;
  const auto found = verdict();
  ASSERT_TRUE(found);
  EXPECT_EQ(found->rank, Rank{1});
  EXPECT_NE(found->message.find("before it loaded"), std::string::npos) << found->message;
}

TEST_F(HangVerdictTest, RanksThatWaitForEachOtherAreNamedTogether) {
  said[3].state.peer = 2;
  const auto found = verdict();
  ASSERT_TRUE(found);
  EXPECT_TRUE(found->rank == Rank{2} || found->rank == Rank{3});
  EXPECT_NE(found->message.find("ranks have waited for each other for 100.0 s"), std::string::npos);
  EXPECT_NE(found->message.find("rank 2 on w2 is in receive(B)"), std::string::npos);
  EXPECT_NE(found->message.find("rank 3 on w3 is in receive(B)"), std::string::npos);
  EXPECT_EQ(found->message.find("rank 0"), std::string::npos) << "it is not of the circle";
}

TEST_F(HangVerdictTest, EdgesThatLeadToAnUnknownRankGiveNoVerdict) {
  known[3] = false;
  EXPECT_FALSE(verdict());
  known[3] = true;
  known[1] = false;
  expect_named(3);
}

TEST_F(HangVerdictTest, OfSeveralThatAreStuckTheOneThatMostWaitForIsNamed) {
  said[0].state.peer = -1;  // 1 and 2 wait for 3
  said[0].quiet_ms = 200'000;
  expect_named(3);
}

TEST_F(HangVerdictTest, ARankThatEndedIsNotForTheVerdict) {
  said[3].process = ProcessState::kEnded;
  EXPECT_FALSE(verdict()) << "its exit is on its way";
}

TEST_F(HangVerdictTest, APeerThatTheJobDoesNotHaveIsNoEdge) {
  said[3].state.peer = 4000;
  expect_named(3);
}

TEST_F(HangVerdictTest, ARankThatIsWaitedForOnAHostThatCannotBeHeardIsNamed) {
  known[3] = false;
  EXPECT_FALSE(verdict()) << "it may only be slow";
  const auto found = unreachable({false, false, false, true}, seconds(90));
  ASSERT_TRUE(found);
  EXPECT_EQ(found->rank, Rank{3});
  EXPECT_EQ(found->message,
            "rank 3 on w3 cannot be heard; rank 2 on w2 waits for it in receive(B), micro-batch 2, "
            "step 41; 2 ranks wait for those");
}

TEST_F(HangVerdictTest, NobodyIsUnreachableWhileSomebodyMovesOrIsHeard) {
  known[3] = false;
  EXPECT_FALSE(unreachable({false, false, false, false}, seconds(90))) << "its host is heard";
  EXPECT_FALSE(unreachable({false, false, false, true}, seconds(101)));
  said[1].quiet_ms = 10;
  EXPECT_FALSE(unreachable({false, false, false, true}, seconds(90)));
  known[1] = false;
  EXPECT_FALSE(unreachable({false, false, false, true}, seconds(90))) << "its answer came too late";
  EXPECT_TRUE(unreachable({false, true, false, true}, seconds(90)));
}

TEST_F(HangVerdictTest, AHostThatNobodyWaitsForIsNotGivenUp) {
  known[3] = false;
  for (RankActivity& activity : said) activity.state.peer = -1;
  EXPECT_FALSE(unreachable({false, false, false, true}, seconds(90)));
  known = {false, false, false, false};
  EXPECT_FALSE(unreachable({true, true, true, true}, seconds(90))) << "nobody says that it hangs";
}

}  // namespace
}  // namespace penstock
