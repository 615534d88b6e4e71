#include "checkpoint/scrub.h"

#include <sys/stat.h>
#include <unistd.h>

#include <thread>

#include "checkpoint/marks.h"
#include "checkpoint/pace.h"
#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

class ScrubTest : public ModelStoreTest {
 protected:
  void SetUp() override {
    ModelStoreTest::SetUp();
    for (const int64_t step : {10, 20, 30}) rows_.push_back(commit(step));
  }
  Path segment(size_t row, size_t index) const { return segment_of(rows_[row], index); }
  std::vector<CheckedCheckpoint> check(const CheckpointSelection& selection = {},
                                       const ReadPace& pace = {}) const {
    std::vector<CheckedCheckpoint> all;
    EXPECT_TRUE(check_checkpoints(path(), kJob, selection, pace, [&](CheckedCheckpoint checked) {
                  all.push_back(std::move(checked));
                }).ok());
    return all;
  }
  static std::vector<uint64_t> numbers(const std::vector<CheckedCheckpoint>& all) {
    std::vector<uint64_t> numbers;
    for (const CheckedCheckpoint& checked : all) numbers.push_back(checked.commit_seq);
    return numbers;
  }

  std::vector<CheckpointInfo> rows_;
};

TEST_F(ScrubTest, EveryCheckpointIsVisitedInTheOrderOfCommits) {
  const auto all = check();
  EXPECT_EQ(numbers(all), (std::vector<uint64_t>{1, 2, 3}));
  for (const CheckedCheckpoint& checked : all) {
    EXPECT_FALSE(checked.damaged());
    EXPECT_GT(checked.bytes, 0u);
  }
  EXPECT_EQ(all[2].step, 30);
}

// As another user where this one may read everything.
class OtherUser {
 public:
  OtherUser() {
    if (geteuid() == 0) {
      EXPECT_EQ(seteuid(65534), 0);
    }
  }
  ~OtherUser() { EXPECT_EQ(seteuid(getuid()), 0); }
};

TEST_F(ScrubTest, WhatOnlyWeMayNotReadIsUnreadableNotDamagedAndIsNotSetAside) {
  ASSERT_EQ(chmod(path().c_str(), 0777), 0);
  ASSERT_EQ(chmod((path() / "LOCK").c_str(), 0666), 0);
  ASSERT_EQ(chmod(segment(1, 0).c_str(), 0), 0);
  ASSERT_EQ(chmod((path() / rows_[2].manifest_file).c_str(), 0), 0);
  const OtherUser other;
  const auto all = check();
  ASSERT_EQ(all.size(), 3u);
  for (const size_t row : {1, 2}) {
    EXPECT_TRUE(all[row].unreadable()) << row;
    EXPECT_FALSE(all[row].damaged()) << row;
    EXPECT_EQ(all[row].report.damages[0].status.code(), Code::kPermissionDenied);
    EXPECT_EQ(all[row].report.damages[0].what, "Permission denied");
    const Status aside = store_->set_aside(rows_[row].commit_seq);
    EXPECT_EQ(aside.code(), Code::kFailedPrecondition) << aside.to_string();
  }
  EXPECT_EQ(all[0].report.damage_count, 0u);
}

TEST(WithoutFileTest, WhatIsLeftSaysWhatIsWrong) {
  const std::pair<const char*, const char*> cases[] = {
      {"rank 0: segment d/x.segment (rank 0, step 40): it is cut", "it is cut"},
      {"segment d/x.segment (rank 1) is another", "is another"},
      {"manifest d/x.segment: d/x.segment is a link", "is a link"},
      {"open d/x.segment: No such file", "No such file"},
      {"the sum is wrong", "the sum is wrong"},
      {"no x.segment", "no x.segment"}};
  for (const auto& [message, left] : cases) EXPECT_EQ(without_file(message, "x.segment"), left);
}

TEST_F(ScrubTest, OneCommitOrOneStepMayBeSelected) {
  EXPECT_EQ(numbers(check({.commit_seq = 2, .step = {}})), std::vector<uint64_t>{2});
  EXPECT_EQ(numbers(check({.commit_seq = {}, .step = 30})), std::vector<uint64_t>{3});
  EXPECT_TRUE(check({.commit_seq = {}, .step = 31}).empty());
}

TEST_F(ScrubTest, EveryByteOfTheDataIsAnnouncedBeforeItIsRead) {
  uint64_t bytes = 0;
  check({.commit_seq = 1, .step = {}}, [&](uint64_t count) {
    bytes += count;
    return true;
  });
  uint64_t data = 0;
  for (const size_t index : {0, 1}) {
    data += SegmentReader::open(segment(0, index))->data_end() - kSegmentHeaderBytes;
  }
  EXPECT_EQ(bytes, data);
}

TEST_F(ScrubTest, DamageIsFoundWhereItIs) {
  flip_byte(segment(1, 0), kSegmentHeaderBytes + 5);
  const auto all = check();
  ASSERT_EQ(all.size(), 3u);
  EXPECT_FALSE(all[0].damaged());
  ASSERT_TRUE(all[1].damaged());
  EXPECT_EQ(words_of(all[1].report.damages[0]),
            segment(1, 0).filename().string() +
                " (rank 0), bytes 4096:20480, embed [0:200, 0:64]: the checksum does not match");
  EXPECT_FALSE(all[2].damaged());
}

TEST_F(ScrubTest, AManifestThatCannotBeReadIsDamageToo) {
  flip_byte(path() / rows_[0].manifest_file, 30);
  const auto all = check();
  ASSERT_EQ(all.size(), 3u);
  EXPECT_TRUE(all[0].damaged());
  EXPECT_FALSE(all[0].step.has_value());
  EXPECT_NE(words_of(all[0].report.damages[0]).find(rows_[0].manifest_file), std::string::npos);
}

TEST_F(ScrubTest, WhatWasSetAsideIsListedAndNotCalledDamaged) {
  flip_byte(segment(0, 0), kSegmentHeaderBytes + 5);
  ASSERT_TRUE(store_->set_aside(1).ok());
  const auto all = check();
  ASSERT_EQ(all.size(), 3u);
  EXPECT_TRUE(all[0].set_aside);
  EXPECT_FALSE(all[0].damaged());
}

TEST_F(ScrubTest, StoppingLeavesOutWhatWasNotReadToItsEnd) {
  int reads = 0;
  const auto all = check({}, [&](uint64_t) { return ++reads < 4; });  // two segments each
  EXPECT_EQ(numbers(all), std::vector<uint64_t>{1});
  EXPECT_EQ(reads, 4);
}

TEST_F(ScrubTest, ACheckpointThatRetentionRemovesMeanwhileIsLeftOut) {
  bool removed = false;
  const auto all = check({}, [&](uint64_t) {
    if (std::exchange(removed, true)) return true;
    EXPECT_TRUE(store_->retain({.keep_last = 1}).ok());
    return true;
  });
  EXPECT_EQ(numbers(all), std::vector<uint64_t>{3});
}

TEST_F(ScrubTest, ADirectoryThatIsNoneIsAnError) {
  const Path file = path() / rows_[0].manifest_file;
  EXPECT_FALSE(check_checkpoints(file, kJob, {}, {}, [](auto) {}).ok());
}

TEST(PaceTest, ReadingTakesAtLeastAsLongAsTheRateSays) {
  Pace pace(1'000'000);
  const int64_t begin_ns = monotonic_ns();
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(pace.spend(10'000));
  EXPECT_GE(monotonic_ns() - begin_ns, 50'000'000);
}

TEST(PaceTest, WithoutALimitNothingIsWaitedFor) {
  Pace pace(0);
  for (int i = 0; i < 1000; ++i) EXPECT_TRUE(pace.spend(uint64_t{1} << 60));
}

TEST(PaceTest, AStopEndsTheLongestWait) {
  Pace pace(1);
  std::thread other([&] { pace.stop(); });
  EXPECT_FALSE(pace.spend(1 << 30));  // else a wait of 34 years
  other.join();
  EXPECT_FALSE(pace.spend(1));
  EXPECT_FALSE(pace.pause(std::chrono::hours(1)));
}

}  // namespace
}  // namespace penstock
