#include "worker/agent/rank_output.h"

#include <gtest/gtest.h>

namespace penstock {
namespace {

TEST(RankOutputTest, OnlyWholeLinesComeOut) {
  RankOutput output;
  EXPECT_EQ(output.add(RankOutput::kStdout, "step 1\nste"), "step 1\n");
  EXPECT_EQ(output.add(RankOutput::kStdout, "p 2"), "");
  EXPECT_EQ(output.add(RankOutput::kStdout, "\n"), "step 2\n");
}

TEST(RankOutputTest, TheStreamsNeverMixWithinALine) {
  RankOutput output;
  EXPECT_EQ(output.add(RankOutput::kStdout, "out "), "");
  EXPECT_EQ(output.add(RankOutput::kStderr, "error\n"), "error\n");
  EXPECT_EQ(output.add(RankOutput::kStdout, "put\n"), "out put\n");
}

TEST(RankOutputTest, TheOffsetIsThePositionInTheLog) {
  RankOutput output;
  EXPECT_EQ(output.offset(), 0U);
  output.add(RankOutput::kStdout, "12345\n");
  EXPECT_EQ(output.offset(), 6U);
  output.add(RankOutput::kStderr, "123");
  EXPECT_EQ(output.offset(), 6U);
  EXPECT_EQ(output.finish(), "123\n");
  EXPECT_EQ(output.offset(), 10U);
}

TEST(RankOutputTest, AnEndWithoutNewlineIsCompleted) {
  RankOutput output;
  output.add(RankOutput::kStdout, "half");
  EXPECT_EQ(output.finish(), "half\n");
  EXPECT_EQ(output.finish(), "");
}

TEST(RankOutputTest, AnEndlessLineIsCut) {
  RankOutput output;
  const std::string text = output.add(RankOutput::kStdout, std::string(3 * kLineBytesMax + 5, 'x'));
  EXPECT_EQ(text.size(), 3 * (kLineBytesMax + 1));
  EXPECT_EQ(text[kLineBytesMax], '\n');
  EXPECT_EQ(output.finish(), "xxxxx\n");
}

TEST(RankOutputTest, ALineOfExactlyTheLimitIsOneLine) {
  RankOutput output;
  const std::string line = std::string(kLineBytesMax, 'y') + "\n";
  EXPECT_EQ(output.add(RankOutput::kStdout, line), line);
  EXPECT_EQ(output.finish(), "");
}

TEST(RankOutputTest, TheLogTailIsTheLastLinesOfStderr) {
  RankOutput output;
  std::string expected;
  for (int i = 0; i < 15; ++i) {
    const std::string line = "line " + std::to_string(i) + "\n";
    output.add(RankOutput::kStderr, line + "\n");
    if (i >= 5) expected += line;
  }
  output.add(RankOutput::kStdout, "not this\n");
  EXPECT_EQ(output.log_tail(), expected);
  EXPECT_EQ(output.last_words(), "") << "none of these lines says why the rank ended";
}

TEST(RankOutputTest, LastWordsAreTheRanksOwnLineAboutItsEnd) {
  RankOutput output;
  output.add(RankOutput::kStderr, "penstock-rank: first\n2026-11-22 info: step 3\n");
  output.add(RankOutput::kStderr, "penstock-rank: no space on /c\nsome library was torn down\n");
  EXPECT_EQ(output.last_words(), "no space on /c");
}

TEST(RankOutputTest, TheLogTailIncludesAnUnfinishedLine) {
  RankOutput output;
  output.add(RankOutput::kStderr, "terminate called");
  output.finish();
  EXPECT_EQ(output.log_tail(), "terminate called\n");
}

TEST(RankOutputTest, LastWordsAndLogTailAreBounded) {
  RankOutput output;
  const std::string line = std::string(kLastWordsPrefix) + std::string(5000, 'z') + "\n";
  for (int i = 0; i < 3; ++i) output.add(RankOutput::kStderr, line);
  EXPECT_EQ(output.last_words(), std::string(kLastWordsBytesMax, 'z'));
  EXPECT_EQ(output.log_tail(), line.substr(0, kLastWordsBytesMax) + "\n");
}

TEST(RankOutputTest, ASilentRankHasNeitherLastWordsNorALogTail) {
  EXPECT_EQ(RankOutput().last_words(), "");
  EXPECT_EQ(RankOutput().log_tail(), "");
}

}  // namespace
}  // namespace penstock
