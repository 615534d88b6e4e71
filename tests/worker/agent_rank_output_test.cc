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

TEST(RankOutputTest, LastWordsAreTheLastLinesOfStderr) {
  RankOutput output;
  output.add(RankOutput::kStderr, "one\ntwo\n\nthree\nfour\n");
  output.add(RankOutput::kStdout, "not this\n");
  EXPECT_EQ(output.last_words(), "two | three | four");
}

TEST(RankOutputTest, LastWordsIncludeAnUnfinishedLine) {
  RankOutput output;
  output.add(RankOutput::kStderr, "terminate called");
  output.finish();
  EXPECT_EQ(output.last_words(), "terminate called");
}

TEST(RankOutputTest, LastWordsAreBounded) {
  RankOutput output;
  for (int i = 0; i < 3; ++i) output.add(RankOutput::kStderr, std::string(2000, 'z') + "\n");
  EXPECT_EQ(output.last_words(), std::string(kLastWordsBytesMax, 'z'));
}

TEST(RankOutputTest, ASilentRankHasNoLastWords) {
  EXPECT_EQ(RankOutput().last_words(), "");
}

}  // namespace
}  // namespace penstock
