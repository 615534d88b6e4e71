#include "checkpoint/store.h"

#include <sys/stat.h>

#include "tests/checkpoint/support.h"
#include "tests/support/real_files.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

class StoreTest : public ::testing::Test {
 protected:
  void SetUp() override { reopen(); }
  void reopen() {
    store_.reset();
    auto store = CheckpointStore::open(path(), kJob, nullptr);
    ASSERT_TRUE(store.ok()) << store.status().to_string();
    store_.emplace(*std::move(store));
  }
  Path path() const { return directory_.path() / "job-7"; }
  CheckpointInfo commit(int64_t step, uint64_t version, Epoch epoch = Epoch{1}) {
    return commit_model(*store_, kJob, epoch, step, version);
  }

  TempDirectory directory_;
  std::optional<CheckpointStore> store_;
};

TEST_F(StoreTest, AnEmptyDirectoryHasNothingToResumeFrom) {
  EXPECT_TRUE(list_checkpoints(path(), kJob).checkpoints.empty());
  EXPECT_FALSE(newest_whole(path(), kJob).checkpoint);
  EXPECT_FALSE(newest_whole(directory_.path() / "never-made", kJob).checkpoint);
}

TEST_F(StoreTest, ADirectoryThatCannotBeReadIsAnErrorAndNotAnEmptyOne) {
  const Path file = directory_.path() / "file";
  replace_file(file, "no directory");
  EXPECT_FALSE(list_checkpoints(file, kJob).directory.ok());
  const NewestWhole newest = newest_whole(file, kJob);
  EXPECT_FALSE(newest.directory.ok());
  EXPECT_NE(newest.directory.message().find(file.string()), std::string::npos);
}

TEST_F(StoreTest, PipesAndLinksInPlaceOfItsFilesAreRefusedAndNeverWaitedFor) {
  commit(10, 1);
  store_.reset();
  const Path pipe = path() / manifest_file_name(2);
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  const NewestWhole newest = newest_whole(path(), kJob);
  EXPECT_EQ(newest.checkpoint->step, 10);
  ASSERT_EQ(newest.refused.size(), 1u);
  EXPECT_NE(newest.refused[0].reason.message().find("not a regular file"), std::string::npos);
  std::filesystem::remove(pipe);
  for (const char* name : {"GC", "STORE"}) {
    const Path control = path() / name;
    const Path aside = directory_.path() / name;
    if (std::filesystem::exists(control)) std::filesystem::rename(control, aside);
    ASSERT_EQ(::mkfifo(control.c_str(), 0600), 0);
    EXPECT_FALSE(CheckpointStore::open(path(), kJob, nullptr).ok()) << name;
    std::filesystem::remove(control);
    std::filesystem::create_symlink("/etc/hostname", control);
    EXPECT_FALSE(CheckpointStore::open(path(), kJob, nullptr).ok()) << name;
    std::filesystem::remove(control);
    if (std::filesystem::exists(aside)) std::filesystem::rename(aside, control);
  }
  reopen();
  EXPECT_EQ(newest_whole(path(), kJob).checkpoint->step, 10);
}

TEST_F(StoreTest, CommitsAreNumberedListedAndLoad) {
  const CheckpointInfo first = commit(10, 1);
  const CheckpointInfo second = commit(20, 2);
  EXPECT_EQ(first.commit_seq, 1u);
  EXPECT_EQ(second.commit_seq, 2u);
  const StoreListing listing = list_checkpoints(path(), kJob);
  EXPECT_EQ(listing.checkpoints, (std::vector{first, second}));
  EXPECT_TRUE(listing.refused.empty());
  const NewestWhole newest = newest_whole(path(), kJob);
  EXPECT_EQ(newest.checkpoint, second);
  EXPECT_TRUE(load_model(path(), first.manifest_file, 1).ok());
  EXPECT_TRUE(load_model(path(), second.manifest_file, 2).ok());
  const auto stored = read_manifest(path() / second.manifest_file);
  ASSERT_TRUE(stored.ok());
  EXPECT_EQ(stored->manifest.previous_digest, first.manifest_digest);
  EXPECT_TRUE(verify_checkpoint(path(), stored->manifest).ok());
}

TEST_F(StoreTest, ASecondWriterIsRefusedUntilTheFirstIsGone) {
  const auto second = CheckpointStore::open(path(), kJob, nullptr);
  EXPECT_EQ(second.status().code(), Code::kFailedPrecondition);
  EXPECT_NE(second.status().message().find("another writer"), std::string::npos);
  int waits = 0;
  const auto never =
      CheckpointStore::open_when_free(path(), kJob, nullptr, [&] { return ++waits < 3; });
  EXPECT_EQ(never.status().code(), Code::kFailedPrecondition);
  EXPECT_EQ(waits, 3);
  const auto third = CheckpointStore::open_when_free(path(), kJob, nullptr, [&] {
    store_.reset();
    return true;
  });
  EXPECT_TRUE(third.ok()) << third.status().to_string();
}

TEST_F(StoreTest, AStaleEpochCannotCommit) {
  commit(10, 1, Epoch{5});
  const auto request = save_model(path(), kJob, Epoch{4}, 20, 2);
  ASSERT_TRUE(request.ok());
  EXPECT_EQ(store_->commit(*request).status().code(), Code::kAborted);
  EXPECT_EQ(newest_whole(path(), kJob).checkpoint->step, 10);
}

TEST_F(StoreTest, ASegmentThatIsNotTheOneDescribedIsRefused) {
  const auto request = save_model(path(), kJob, Epoch{1}, 10, 1);
  ASSERT_TRUE(request.ok());
  const auto refused = [&](auto change, Code code) {
    CommitRequest changed = *request;
    change(changed);
    const auto report = store_->commit(changed);
    EXPECT_EQ(report.status().code(), code) << report.status().to_string();
  };
  refused([](CommitRequest& r) { r.segments.clear(); }, Code::kInvalidArgument);
  refused([](CommitRequest& r) { r.segments.push_back(r.segments[0]); }, Code::kInvalidArgument);
  refused([](CommitRequest& r) { r.segments[0].file = "../x"; }, Code::kInvalidArgument);
  refused([](CommitRequest& r) { r.segments[0].rank = Rank{1}; }, Code::kInvalidArgument);
  refused([](CommitRequest& r) { r.epoch = Epoch{2}; }, Code::kInvalidArgument);
  refused([](CommitRequest& r) { r.step = 11; }, Code::kDataLoss);
  refused([](CommitRequest& r) { r.segments[0].byte_count += 1; }, Code::kDataLoss);
  refused([](CommitRequest& r) { r.segments[1].footer_digest.low ^= 1; }, Code::kDataLoss);
  EXPECT_TRUE(list_checkpoints(path(), kJob).checkpoints.empty());
  EXPECT_TRUE(store_->commit(*request).ok());
}

TEST_F(StoreTest, AMissingRankIsNamedByTheGapItLeaves) {
  auto request = save_model(path(), kJob, Epoch{1}, 10, 1);
  ASSERT_TRUE(request.ok());
  request->segments.pop_back();
  const auto report = store_->commit(*request);
  EXPECT_EQ(report.status().code(), Code::kDataLoss);
  EXPECT_NE(report.status().message().find("tensor embed: no slice holds [200:300, 0:64]"),
            std::string::npos)
      << report.status().message();
}

TEST_F(StoreTest, RanksThatDisagreeAboutATensorAreNamed) {
  const auto one = save_segment(path(), {kJob, Epoch{1}, Rank{0}, 5},
                                {known_slice("w", DType::kF32, {4}, {{0}, {2}})});
  const auto other = save_segment(path(), {kJob, Epoch{1}, Rank{1}, 5},
                                  {known_slice("w", DType::kF32, {6}, {{2}, {4}})});
  CommitRequest request;
  request.epoch = Epoch{1};
  request.step = 5;
  request.spec_json = "{}";
  request.segments = {commit_segment(one), commit_segment(other)};
  const auto report = store_->commit(request);
  EXPECT_EQ(report.status().code(), Code::kDataLoss);
  EXPECT_NE(report.status().message().find("tensor w: rank 1"), std::string::npos)
      << report.status().message();
}

TEST_F(StoreTest, ANumberIsNeverUsedTwiceThoughItsManifestIsUnreadable) {
  const CheckpointInfo first = commit(10, 1);
  const CheckpointInfo second = commit(20, 2);
  replace_file(path() / second.manifest_file, "torn");
  const CheckpointInfo third = commit(30, 3);
  EXPECT_EQ(third.commit_seq, 3u);
  const auto stored = read_manifest(path() / third.manifest_file);
  EXPECT_EQ(stored->manifest.previous_commit_seq, first.commit_seq);
}

TEST_F(StoreTest, AManifestThatNoReaderTakesIsNotPublished) {
  auto request = save_model(path(), kJob, Epoch{1}, 10, 1);
  ASSERT_TRUE(request.ok());
  request->layout = std::string(5000, 'x');
  EXPECT_EQ(store_->commit(*request).status().code(), Code::kDataLoss);
  const StoreListing listing = list_checkpoints(path(), kJob);
  EXPECT_TRUE(listing.checkpoints.empty() && listing.refused.empty());
}

TEST_F(StoreTest, AManifestThatAppearsMeanwhileIsNotReplaced) {
  class RacingFiles : public RealFiles {
   public:
    Status rename_no_replace(const Path& from, const Path& to) override {
      replace_file(to, "another writer's");
      return RealFiles::rename_no_replace(from, to);
    }
  };
  static RacingFiles files;
  store_.reset();
  store_.emplace(CheckpointStore::open(path(), kJob, nullptr, files).value());
  const auto request = save_model(path(), kJob, Epoch{1}, 10, 1);
  ASSERT_TRUE(request.ok());
  EXPECT_EQ(store_->commit(*request).status().code(), Code::kAborted);
  EXPECT_EQ(file_text(path() / manifest_file_name(1)), "another writer's");
  EXPECT_FALSE(std::filesystem::exists(path() / (manifest_file_name(1) + ".tmp")));
}

TEST_F(StoreTest, ALeftoverTemporaryDoesNotStopTheNextCommit) {
  replace_file(path() / (manifest_file_name(1) + ".tmp"), "half a manifest");
  EXPECT_EQ(commit(10, 1).commit_seq, 1u);
}

TEST_F(StoreTest, ALostStoreFileIsWrittenAgainFromTheManifests) {
  const CheckpointInfo info = commit(10, 1);
  std::filesystem::remove(path() / "STORE");
  reopen();
  EXPECT_EQ(newest_whole(path(), kJob).checkpoint, info);
  EXPECT_EQ(commit(20, 2).commit_seq, 2u);
}

TEST_F(StoreTest, ACheckpointOfAnotherStoreInThisDirectoryIsRefused) {
  commit(10, 1);
  TempDirectory elsewhere;
  {
    auto other = CheckpointStore::open(elsewhere.path(), kJob, nullptr);
    ASSERT_TRUE(other.ok());
    commit_model(*other, kJob, Epoch{1}, 15, 8);
    commit_model(*other, kJob, Epoch{1}, 20, 9);
  }
  for (const auto& entry : std::filesystem::directory_iterator(elsewhere.path())) {
    std::filesystem::copy(entry.path(), path() / entry.path().filename(),
                          std::filesystem::copy_options::skip_existing);
  }
  const NewestWhole newest = newest_whole(path(), kJob);
  EXPECT_EQ(newest.checkpoint->step, 10);
  ASSERT_EQ(newest.refused.size(), 1u);
  EXPECT_NE(newest.refused[0].reason.message().find("belongs to store"), std::string::npos);
}

TEST_F(StoreTest, ACheckpointOfAnotherJobIsRefused) {
  commit(10, 1);
  EXPECT_FALSE(newest_whole(path(), JobId{8}).checkpoint);
  EXPECT_EQ(newest_whole(path(), JobId{8}).refused.size(), 1u);
}

TEST_F(StoreTest, AForgedPredecessorBreaksTheChain) {
  const CheckpointInfo first = commit(10, 1);
  const CheckpointInfo second = commit(20, 2);
  auto stored = read_manifest(path() / first.manifest_file);
  ASSERT_TRUE(stored.ok());
  stored->manifest.layout = "something else";
  replace_file(path() / first.manifest_file, *encode_manifest(stored->manifest));
  const StoreListing listing = list_checkpoints(path(), kJob);
  EXPECT_EQ(listing.checkpoints, std::vector{second});
  ASSERT_EQ(listing.refused.size(), 1u);
  EXPECT_NE(listing.refused[0].reason.message().find("is not the one commit 2 was made after"),
            std::string::npos);
}

TEST_F(StoreTest, EqualOrBackwardClocksChangeNothing) {
  const auto commit_at = [&](int64_t step, uint64_t version, int64_t clock) {
    auto request = save_model(path(), kJob, Epoch{1}, step, version);
    request->created_at = {clock};
    return store_->commit(*request)->info;
  };
  commit_at(10, 1, 2'000'000'000);
  commit_at(20, 2, 2'000'000'000);
  const CheckpointInfo last = commit_at(30, 3, 5);
  EXPECT_EQ(newest_whole(path(), kJob).checkpoint, last);
}

}  // namespace
}  // namespace penstock
