#include "coordinator/store/log_files.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

class LogFilesTest : public ::testing::Test {
 protected:
  Status add(uint32_t epoch, uint64_t offset, const std::string& text, int32_t rank = 0) {
    return logs.append({JobId{1}, Epoch{epoch}, Rank{rank}, offset, text});
  }
  std::string all(uint64_t from = 0) {
    return logs.read(JobId{1}, Rank{0}, from, 1 << 20).value().text;
  }
  ScratchFolder scratch;
  LogFiles logs{scratch.path() / "logs"};
};

TEST_F(LogFilesTest, ChunksReadBackInOrder) {
  ASSERT_TRUE(add(1, 0, "one\n").ok());
  ASSERT_TRUE(add(1, 4, "two\n").ok());
  EXPECT_EQ(all(), "one\ntwo\n");
  EXPECT_EQ(all(4), "two\n");
}

TEST_F(LogFilesTest, ARepeatedChunkChangesNothing) {
  ASSERT_TRUE(add(1, 0, "one\n").ok());
  ASSERT_TRUE(add(1, 4, "two\n").ok());
  ASSERT_TRUE(add(1, 0, "one\n").ok());
  EXPECT_EQ(all(), "one\ntwo\n");
}

TEST_F(LogFilesTest, EpochsFollowEachOther) {
  ASSERT_TRUE(add(1, 0, "first\n").ok());
  ASSERT_TRUE(add(2, 0, "second\n").ok());
  ASSERT_TRUE(add(10, 0, "tenth\n").ok());
  EXPECT_EQ(all(), "first\nsecond\ntenth\n");
  EXPECT_EQ(all(8), "cond\ntenth\n");
}

TEST_F(LogFilesTest, LateOutputOfAnEarlierEpochIsRefusedSoThatOffsetsStay) {
  ASSERT_TRUE(add(1, 0, "first\n").ok());
  ASSERT_TRUE(add(2, 0, "second\n").ok());
  EXPECT_EQ(add(1, 6, "late\n").code(), Code::kAborted);
  LogFiles reopened(scratch.path() / "logs");
  EXPECT_EQ(reopened.append({JobId{1}, Epoch{1}, Rank{0}, 6, "late\n"}).code(), Code::kAborted);
}

TEST_F(LogFilesTest, AnUnknownLogIsEmpty) {
  const auto log = logs.read(JobId{9}, Rank{0}, 0, 100);
  ASSERT_TRUE(log.ok());
  EXPECT_EQ(log->text, "");
  EXPECT_EQ(log->next_offset, 0u);
}

TEST_F(LogFilesTest, ReadingBeyondTheEndGivesNothingAndStays) {
  ASSERT_TRUE(add(1, 0, "one\n").ok());
  const auto log = logs.read(JobId{1}, Rank{0}, 100, 100);
  EXPECT_EQ(log->text, "");
  EXPECT_EQ(log->next_offset, 100u);
}

TEST_F(LogFilesTest, PiecesJoinedEqualTheWholeWithCharactersKeptTogether) {
  const std::string text = "h\xC3\xA4tte \xE2\x82\xAC\xF0\x9F\x98\x80 \xE2\x82\xAC\n";
  ASSERT_TRUE(add(1, 0, text).ok());
  for (uint64_t limit = 4; limit < 12; ++limit) {
    std::string joined;
    uint64_t offset = 0;
    while (true) {
      const auto log = logs.read(JobId{1}, Rank{0}, offset, limit);
      ASSERT_TRUE(log.ok());
      if (log->next_offset == offset) break;
      EXPECT_LE(log->text.size(), limit);
      EXPECT_NE(static_cast<unsigned char>(log->text[0]) & 0xC0, 0x80) << "cut inside a character";
      joined += log->text;
      offset = log->next_offset;
    }
    EXPECT_EQ(joined, text) << limit;
  }
}

TEST_F(LogFilesTest, BytesThatNeverArrivedAreSkippedAndCounted) {
  ASSERT_TRUE(add(1, 10, "later\n").ok());
  const auto log = logs.read(JobId{1}, Rank{0}, 0, 100);
  EXPECT_EQ(log->text, "later\n");
  EXPECT_EQ(log->next_offset, 16u);
}

TEST_F(LogFilesTest, ALogEndsAtItsBound) {
  EXPECT_EQ(add(1, kLogOffsetMax, "x").code(), Code::kResourceExhausted);
  EXPECT_EQ(add(1, UINT64_MAX, "x").code(), Code::kResourceExhausted);
}

TEST_F(LogFilesTest, OldTextGivesWayAndWhatStaysIsReadAtItsPosition) {
  LogFiles small(scratch.path() / "small", {.file_bytes_max = 64 << 10});
  uint64_t offset = 0;
  for (int i = 0; i < 4096; ++i) {  // 256 KiB
    ASSERT_TRUE(
        small.append({JobId{1}, Epoch{1}, Rank{0}, offset, fmt::format("{:<63}\n", i)}).ok());
    offset += 64;
  }
  const Path file = scratch.path() / "small" / "1" / "rank-0.epoch-1.log";
  struct stat info = {};
  ASSERT_EQ(::stat(file.c_str(), &info), 0);
  EXPECT_LE(info.st_blocks * 512, (64 + 64) << 10);
  const LogText first = *small.read(JobId{1}, Rank{0}, 0, 64);
  EXPECT_GE(first.next_offset, uint64_t{128} << 10);  // over the hole at once
  EXPECT_EQ(first.text, fmt::format("{:<63}\n", first.next_offset / 64 - 1));
  const LogText last = *small.read(JobId{1}, Rank{0}, offset - 64, 64);
  EXPECT_EQ(last.text, fmt::format("{:<63}\n", 4095));
}

TEST_F(LogFilesTest, RanksHaveTheirOwnLogs) {
  ASSERT_TRUE(add(1, 0, "zero\n", 0).ok());
  ASSERT_TRUE(add(1, 0, "ten\n", 10).ok());
  EXPECT_EQ(all(), "zero\n");
  EXPECT_EQ(logs.read(JobId{1}, Rank{10}, 0, 100)->text, "ten\n");
  EXPECT_EQ(logs.read(JobId{1}, Rank{1}, 0, 100)->text, "");
}

}  // namespace
}  // namespace penstock
