#include "coordinator/driver/checkpoint_scrubber.h"

#include <map>

#include "checkpoint/store.h"
#include "coordinator/driver/loop_tally.h"
#include "tests/checkpoint/support.h"
#include "tests/support/hung_file_system.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

constexpr JobId kJob{7};
constexpr JobId kStuck{8};
constexpr JobId kOther{9};

class CheckpointScrubberTest : public ::testing::Test {
 protected:
  CheckpointScrubberTest() {
    auto store = CheckpointStore::open(path(), kJob, nullptr);
    EXPECT_TRUE(store.ok()) << store.status().to_string();
    for (const int64_t step : {10, 20}) {
      rows_.push_back(commit_model(*store, kJob, Epoch{1}, step, static_cast<uint64_t>(step)));
    }
  }
  Path path() const { return directory_.path() / "job"; }
  Path segment(size_t row) const {
    const auto stored = read_manifest(path() / rows_[row].manifest_file);
    return path() / stored->manifest.segments[0].file;
  }
  // Counts what it hears; stops the loop after so many passes.
  ScrubHandlers until(int64_t passes) {
    return {.on_read = [this](JobId, uint64_t bytes) { read_ += bytes; },
            .on_damage = [this](JobId, const std::string& text) { damages_.push_back(text); },
            .on_pass =
                [this, passes](JobId job) {
                  EXPECT_EQ(job, kJob);
                  if (++passes_ == passes) loop_.stop();
                },
            .on_ended_pass =
                [this, passes] {
                  if (++passes_ == passes) loop_.stop();
                }};
  }
  // A second job with checkpoints, and its directory.
  Path other() {
    const Path directory = directory_.path() / "other";
    auto store = CheckpointStore::open(directory, kOther, nullptr);
    EXPECT_TRUE(store.ok()) << store.status().to_string();
    rows_.push_back(commit_model(*store, kOther, Epoch{1}, 30, 30));
    return directory;
  }
  static ScrubOptions without_pause() {
    return {.bytes_per_second = uint64_t{1} << 40, .pause = Duration::zero()};
  }
  // A job whose directory hangs holds up no running one, and is named at the end.
  void read_beside_a_stuck_job(void (CheckpointScrubber::*watch)(JobId, const Path&)) {
    const auto hung = HungFileSystem::mount_at(directory_.path() / "nfs");
    CheckpointScrubber scrubber(loop_, without_pause(), until(2));
    (scrubber.*watch)(kStuck, directory_.path() / "nfs" / "run");
    hung->await_caller();
    scrubber.watch_running(kJob, path());
    loop_.run();
    const std::vector<JobId> hanging = scrubber.finish(std::chrono::seconds(1));
    ASSERT_FALSE(hanging.empty());
    EXPECT_EQ(hanging.front(), kStuck);
    hung->release();
    EXPECT_TRUE(scrubber.finish(std::chrono::minutes(4)).empty());
  }

  TempDirectory directory_;
  EventLoop loop_;
  std::vector<CheckpointInfo> rows_;
  uint64_t read_ = 0;
  int64_t passes_ = 0;
  std::vector<std::string> damages_;
};

TEST_F(CheckpointScrubberTest, APassReadsEveryCheckpointAndFindsNothingInWholeOnes) {
  CheckpointScrubber scrubber(loop_, without_pause(), until(1));
  scrubber.watch_running(kJob, path());
  loop_.run();
  uint64_t data = 0;
  for (const CheckpointInfo& row : rows_) data += row.payload_bytes;
  EXPECT_GE(read_, data);
  EXPECT_TRUE(damages_.empty());
}

TEST_F(CheckpointScrubberTest, ADamagedCheckpointIsReportedOnceThoughEveryPassSeesIt) {
  flip_byte(segment(1), kSegmentHeaderBytes + 3);
  CheckpointScrubber scrubber(loop_, without_pause(), until(3));
  scrubber.watch_running(kJob, path());
  scrubber.watch_running(kJob, path());
  loop_.run();
  ASSERT_EQ(damages_.size(), 1u);
  EXPECT_EQ(damages_[0].find("the checkpoint of step 20 is damaged: "), 0u) << damages_[0];
  for (const char* part : {"(rank 0)", "bytes 4096:20480", "embed [0:200, 0:64]", "checksum"}) {
    EXPECT_NE(damages_[0].find(part), std::string::npos) << part << " in " << damages_[0];
  }
  EXPECT_NE(damages_[0].find(segment(1).filename().string()), std::string::npos);
}

TEST(LoopTallyTest, HoweverMuchIsCountedBeforeTheLoopListensItHearsOfItOnce) {
  EventLoop loop;
  std::vector<uint64_t> heard;
  LoopTally tally(loop, [&](uint64_t count) { heard.push_back(count); });
  const auto listen = [&] {
    loop.post([&] { loop.stop(); });
    loop.run();
  };
  for (uint64_t count = 0; count <= 1000; ++count) tally.add(count);
  listen();
  EXPECT_EQ(heard, std::vector<uint64_t>{500'500});
  tally.add(7);
  listen();
  EXPECT_EQ(heard, (std::vector<uint64_t>{500'500, 7})) << "and of what comes later";
}

TEST_F(CheckpointScrubberTest, AForgottenJobIsNotReadOnAndMayBeWatchedAgain) {
  CheckpointScrubber scrubber(loop_, {.bytes_per_second = 1, .pause = std::chrono::hours(1)},
                              until(1));
  scrubber.watch_running(kJob, path());  // the first read would take half a day
  scrubber.forget(kJob);
  scrubber.forget(kJob);
  EXPECT_TRUE(scrubber.finish(std::chrono::minutes(4)).empty());
  EXPECT_EQ(read_, 0u);
  EXPECT_EQ(passes_, 0);
}

TEST_F(CheckpointScrubberTest, ARateOfZeroReadsNothing) {
  CheckpointScrubber scrubber(loop_, {}, until(1));
  scrubber.watch_running(kJob, path());
  EXPECT_TRUE(scrubber.finish(Duration::zero()).empty());
}

TEST_F(CheckpointScrubberTest, ADirectoryThatHangsHoldsUpNoOtherJobAndIsNamedAtTheEnd) {
  read_beside_a_stuck_job(&CheckpointScrubber::watch_running);
}

TEST_F(CheckpointScrubberTest, JobsThatHaveEndedAreReadInTurnsAndAPassIsOverAfterTheLast) {
  const Path directory = other();
  flip_byte(segment(0), kSegmentHeaderBytes + 3);
  std::map<JobId, uint64_t> read;
  ScrubHandlers handlers = until(3);
  handlers.on_read = [&](JobId job, uint64_t bytes) { read[job] += bytes; };
  CheckpointScrubber scrubber(loop_, without_pause(), handlers);
  scrubber.watch_ended(kJob, path());
  scrubber.watch_ended(kOther, directory);
  scrubber.watch_ended(kOther, directory);
  loop_.run();
  EXPECT_GE(read[kJob], rows_[0].payload_bytes + rows_[1].payload_bytes);
  EXPECT_GE(read[kOther], rows_[2].payload_bytes);
  ASSERT_EQ(damages_.size(), 1u) << "once, though three passes saw it";
  EXPECT_EQ(damages_[0].find("the checkpoint of step 10 is damaged: "), 0u) << damages_[0];
}

TEST_F(CheckpointScrubberTest, DamageThatWasKnownBeforeTheEndIsNotReportedAgain) {
  flip_byte(segment(1), kSegmentHeaderBytes + 3);
  CheckpointScrubber scrubber(loop_, without_pause(), until(1));
  scrubber.watch_running(kJob, path());
  loop_.run();
  EXPECT_EQ(damages_.size(), 1u);
  read_ = 0;
  passes_ = -1;  // what the running job's thread had posted
  scrubber.watch_ended(kJob, path());
  loop_.run();
  EXPECT_GT(read_, 0u);
  EXPECT_EQ(damages_.size(), 1u);
}

TEST_F(CheckpointScrubberTest, AJobThatEndedAndIsForgottenIsNotReadOn) {
  const Path directory = other();
  std::map<JobId, uint64_t> read;  // in this pass
  bool without = false;
  ScrubHandlers handlers;
  handlers.on_read = [&](JobId job, uint64_t bytes) { read[job] += bytes; };
  CheckpointScrubber* scrubbing = nullptr;
  handlers.on_ended_pass = [&] {
    without = read[kJob] == 0 && read[kOther] > 0;
    if (without) loop_.stop();
    read.clear();
    scrubbing->forget(kJob);
  };
  CheckpointScrubber scrubber(loop_, without_pause(), handlers);
  scrubbing = &scrubber;
  scrubber.watch_ended(kJob, path());
  scrubber.watch_ended(kOther, directory);
  loop_.call_after(std::chrono::seconds(240), [&] { loop_.stop(); });
  loop_.run();
  EXPECT_TRUE(without);
}

TEST_F(CheckpointScrubberTest, EndedJobsWithADirectoryThatHangsHoldUpNoRunningOne) {
  read_beside_a_stuck_job(&CheckpointScrubber::watch_ended);
}

}  // namespace
}  // namespace penstock
