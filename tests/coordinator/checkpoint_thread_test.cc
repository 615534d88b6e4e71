#include "coordinator/driver/checkpoint_thread.h"

#include "checkpoint/store.h"
#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

constexpr JobId kJob{7};

class CheckpointThreadTest : public ::testing::Test {
 protected:
  CheckpointThreadTest() {
    auto store = CheckpointStore::open(path(), kJob, nullptr);
    EXPECT_TRUE(store.ok()) << store.status().to_string();
    for (const int64_t step : {10, 20}) {
      rows_.push_back(commit_model(*store, kJob, Epoch{1}, step, static_cast<uint64_t>(step)));
    }
  }
  Path path() const { return directory_.path() / "job"; }
  Path index_path() const { return directory_.path() / "index"; }
  CheckpointFound find(bool read_everything) {
    EventLoop loop;
    auto thread = CheckpointThread::start(loop, index_path());
    EXPECT_TRUE(thread.ok()) << thread.status().to_string();
    CheckpointFound answer;
    (*thread)->find({kJob, path().string(), read_everything}, [&](const CheckpointFound& found) {
      answer = found;
      loop.stop();
    });
    loop.run();
    return answer;
  }

  TempDirectory directory_;
  std::vector<CheckpointInfo> rows_;
};

TEST_F(CheckpointThreadTest, TheNewestWholeCheckpointIsFoundAndTheIndexMadeToAgree) {
  const CheckpointFound found = find(false);
  EXPECT_TRUE(found.status.ok());
  EXPECT_EQ(found.step, 20);
  EXPECT_EQ(found.manifest, (path() / rows_[1].manifest_file).string());
  auto index = CheckpointIndex::open(index_path());
  ASSERT_TRUE(index.ok());
  EXPECT_EQ(*(*index)->list(kJob), rows_);
}

TEST_F(CheckpointThreadTest, DamagedDataIsFoundOnlyByReadingEverything) {
  const auto stored = read_manifest(path() / rows_[1].manifest_file);
  ASSERT_TRUE(stored.ok());
  flip_byte(path() / stored->manifest.segments[0].file, kSegmentHeaderBytes + 3);
  EXPECT_EQ(find(false).step, 20);
  const CheckpointFound found = find(true);
  EXPECT_EQ(found.step, 10);
  ASSERT_EQ(found.refused.size(), 1u);
  EXPECT_NE(found.refused[0].find(rows_[1].manifest_file), std::string::npos);
}

TEST_F(CheckpointThreadTest, ADirectoryThatCannotBeReadIsAnErrorAndNotNothing) {
  std::filesystem::remove_all(path());
  replace_file(path(), "no directory");
  EXPECT_FALSE(find(false).status.ok());
  EXPECT_FALSE(find(true).status.ok());
}

TEST_F(CheckpointThreadTest, ListingsBeyondTheBoundAreRefusedAtOnce) {
  EventLoop loop;
  auto thread = CheckpointThread::start(loop, index_path());
  ASSERT_TRUE(thread.ok());
  int listed = 0;
  int refused = 0;
  for (int i = 0; i < CheckpointThread::kListsMax + 5; ++i) {
    (*thread)->list(kJob, path(), [&](const Result<std::vector<ListedCheckpoint>>& answer) {
      answer.ok() ? ++listed : ++refused;
      EXPECT_EQ(answer.status().code(), answer.ok() ? Code::kOk : Code::kResourceExhausted);
      if (listed == CheckpointThread::kListsMax) loop.stop();
    });
  }
  EXPECT_EQ(refused, 5);
  loop.run();
  EXPECT_EQ(listed, CheckpointThread::kListsMax);
}

TEST_F(CheckpointThreadTest, AJobThatNeverSavedHasNothing) {
  std::filesystem::remove_all(path());
  const CheckpointFound found = find(false);
  EXPECT_TRUE(found.status.ok());
  EXPECT_TRUE(found.manifest.empty());
}

}  // namespace
}  // namespace penstock
