#include "checkpoint/removal.h"

#include "checkpoint/marks.h"
#include "checkpoint/store.h"
#include "tests/checkpoint/simulated_disk.h"
#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

class RemovalTest : public ModelStoreTest {
 protected:
  size_t segment_count() const {
    size_t count = 0;
    const std::vector<std::string> names = file_names(path()).value();
    for (const std::string& name : names) count += name.ends_with(".segment");
    return count;
  }
};

TEST_F(RemovalTest, TheNewestAreKeptAndTheSpaceOfOthersReturns) {
  for (int64_t step = 1; step <= 4; ++step) commit(step);
  const auto report = store_->retain({2});
  ASSERT_TRUE(report.ok()) << report.status().to_string();
  EXPECT_EQ(report->commit_seqs, (std::vector<uint64_t>{1, 2}));
  EXPECT_EQ(report->files.size(), 4u);
  EXPECT_EQ(steps(), (std::vector<int64_t>{3, 4}));
  EXPECT_EQ(segment_count(), 4u);
  EXPECT_TRUE(load_model(path(), manifest_file_name(3), 3).ok());
  EXPECT_TRUE(load_model(path(), manifest_file_name(4), 4).ok());
  EXPECT_TRUE(store_->retain({2})->commit_seqs.empty()) << "a second time there is nothing to do";
  EXPECT_FALSE(std::filesystem::exists(path() / "GC"));
}

TEST_F(RemovalTest, ASegmentThatAKeptManifestNamesStays) {
  const auto request = save_model(path(), kJob, Epoch{1}, 10, 10);
  ASSERT_TRUE(request.ok());
  ASSERT_TRUE(store_->commit(*request).ok());
  ASSERT_TRUE(store_->commit(*request).ok());
  const auto report = store_->retain({1});
  ASSERT_TRUE(report.ok());
  EXPECT_EQ(report->commit_seqs, std::vector<uint64_t>{1});
  EXPECT_TRUE(report->files.empty());
  EXPECT_TRUE(load_model(path(), manifest_file_name(2), 10).ok());
}

TEST_F(RemovalTest, AStrangersCheckpointThatStrayedInStays) {
  const CheckpointInfo first = commit(1);
  commit(2);
  commit(3);
  Manifest foreign = manifest_of(first);
  foreign.job = JobId{8};
  replace_file(path() / first.manifest_file, *encode_manifest(foreign));
  EXPECT_EQ(store_->retain({1})->commit_seqs, std::vector<uint64_t>{2});
  EXPECT_TRUE(std::filesystem::exists(path() / first.manifest_file));
  EXPECT_EQ(segment_count(), 4u) << "its own and the newest's";
}

TEST_F(RemovalTest, TheOnlyGoodCheckpointIsNeverRemoved) {
  const CheckpointInfo good = commit(1);
  const CheckpointInfo bad = commit(2);
  // Damage in the data: only reading everything finds it.
  flip_byte(segment_of(bad, 0), 5000);
  ASSERT_TRUE(newest_whole(path(), kJob).checkpoint->step == 2);
  const auto report = store_->retain({1});
  ASSERT_TRUE(report.ok());
  EXPECT_TRUE(report->commit_seqs.empty());
  EXPECT_TRUE(load_model(path(), good.manifest_file, 1).ok());
}

TEST_F(RemovalTest, NothingIsRemovedWhenNothingVerifies) {
  for (int64_t step = 1; step <= 3; ++step) {
    flip_byte(segment_of(commit(step), 1), 5000);
  }
  EXPECT_TRUE(store_->retain({1})->commit_seqs.empty());
  EXPECT_EQ(steps().size(), 3u);
}

TEST_F(RemovalTest, DamagedOnesGoOnceANewerWholeOneIsKept) {
  commit(1);
  const CheckpointInfo bad = commit(2);
  std::filesystem::remove(segment_of(bad, 0));
  commit(3);
  EXPECT_EQ(store_->retain({1})->commit_seqs, (std::vector<uint64_t>{1, 2}));
  EXPECT_EQ(steps(), (std::vector<int64_t>{3}));
  EXPECT_EQ(segment_count(), 2u);
}

TEST_F(RemovalTest, AnInterruptedRemovalIsFinishedAtTheNextOpen) {
  const CheckpointInfo first = commit(1);
  commit(2);
  Removal removal{{first.manifest_file}, {}};
  const auto stored = read_manifest(path() / first.manifest_file);
  for (const auto& segment : stored->manifest.segments) {
    removal.segments.push_back(segment.file);
  }
  ASSERT_TRUE(begin_removal(path(), removal, real_file_system()).ok());
  EXPECT_EQ(segment_count(), 4u) << "the crash comes here";
  store_.reset();
  SetUp();
  EXPECT_EQ(segment_count(), 2u);
  EXPECT_EQ(steps(), (std::vector<int64_t>{2}));
  EXPECT_FALSE(std::filesystem::exists(path() / "GC"));
}

TEST_F(RemovalTest, ADamagedRemovalFileRemovesNothing) {
  commit(1);
  replace_file(path() / "GC", "000000000001.manifest\n");
  store_.reset();
  SetUp();
  EXPECT_EQ(steps(), (std::vector<int64_t>{1}));
  EXPECT_FALSE(std::filesystem::exists(path() / "GC"));
}

TEST_F(RemovalTest, RemovalFilesRoundTripAndRefusePaths) {
  const Removal removal{{manifest_file_name(3)}, {segment_file_name(Epoch{1}, Rank{0}, {1, 2})}};
  const std::string text = encode_removal(removal);
  ASSERT_TRUE(decode_removal(text).ok());
  EXPECT_EQ(decode_removal(text)->manifests, removal.manifests);
  EXPECT_EQ(decode_removal(text)->segments, removal.segments);
  for (size_t size = 0; size < text.size(); ++size) {
    EXPECT_FALSE(decode_removal(text.substr(0, size)).ok()) << size;
  }
  EXPECT_FALSE(decode_removal(encode_removal({{"../../etc/passwd"}, {}})).ok());
}

TEST_F(RemovalTest, OrphansOfOlderEpochsAreSweptAndNothingElse) {
  commit(1);
  ASSERT_TRUE(save_model(path(), kJob, Epoch{1}, 2, 2).ok());  // saved, never committed
  ASSERT_TRUE(save_model(path(), kJob, Epoch{2}, 2, 2).ok());  // the running epoch's
  replace_file(path() / "000000000009.manifest.tmp", "torn");
  replace_file(path() / "notes.txt", "the user's");
  replace_file(path() / "notes.tmp", "the user's");
  const auto report = store_->sweep_orphans(Epoch{2});
  ASSERT_TRUE(report.ok());
  EXPECT_EQ(report->files.size(), 3u);
  EXPECT_EQ(segment_count(), 4u);
  EXPECT_TRUE(std::filesystem::exists(path() / "notes.txt"));
  EXPECT_TRUE(std::filesystem::exists(path() / "notes.tmp"));
  EXPECT_TRUE(load_model(path(), manifest_file_name(1), 1).ok());
}

TEST_F(RemovalTest, NothingIsSweptWhileAManifestIsUnreadable) {
  const CheckpointInfo info = commit(1);
  replace_file(path() / info.manifest_file, "torn");
  EXPECT_EQ(store_->sweep_orphans(Epoch{9}).status().code(), Code::kDataLoss);
  EXPECT_EQ(segment_count(), 2u);
}

TEST_F(RemovalTest, AStoreIsRemovedWithEveryFileItIsMadeOf) {
  commit(1);
  const CheckpointInfo second = commit(2);
  commit(3);
  ASSERT_TRUE(store_->pin(1).ok());
  flip_byte(segment_of(second, 0), kSegmentHeaderBytes + 3);
  ASSERT_TRUE(store_->set_aside(2).ok());
  replace_file(path() / "STORE.damaged", "x");
  replace_file(path() / removed_file_name(5), "");
  replace_file(path() / "000000000009.manifest.tmp", "x");
  store_.reset();
  const Status removed = remove_store(path(), kJob);
  EXPECT_TRUE(removed.ok()) << removed.to_string();
  EXPECT_FALSE(std::filesystem::exists(path()));
  EXPECT_TRUE(remove_store(path(), kJob).ok()) << "there is nothing left to do";
}

TEST_F(RemovalTest, AStoreIsRemovedThoughItsStoreFileIsDamaged) {
  commit(1);
  store_.reset();
  replace_file(path() / "STORE", "garbled");
  const Status removed = remove_store(path(), kJob);
  EXPECT_TRUE(removed.ok()) << removed.to_string();
  EXPECT_FALSE(std::filesystem::exists(path()));
}

TEST_F(RemovalTest, WhatIsNotTheStoresStaysWithItsDirectory) {
  commit(1);
  store_.reset();
  const std::vector<std::string> mine = {"000000000001.tmp", "LOCK", "STORE.tmp", "notes.txt"};
  for (const std::string& name : mine) replace_file(path() / name, "mine");
  EXPECT_TRUE(remove_store(path(), kJob).ok());
  EXPECT_EQ(file_names(path()).value(), mine);
}

TEST_F(RemovalTest, ADirectoryThatHoldsNoStoreIsLeftAsItIs) {
  store_.reset();
  ASSERT_TRUE(remove_store(path(), kJob).ok());
  std::filesystem::create_directories(path());
  replace_file(path() / "LOCK", "");
  EXPECT_TRUE(remove_store(path(), kJob).ok());
  EXPECT_EQ(file_names(path()).value(), std::vector<std::string>{"LOCK"});
  std::filesystem::remove(path() / "LOCK");
  EXPECT_TRUE(remove_store(path(), kJob).ok());
  EXPECT_FALSE(std::filesystem::exists(path())) << "a job's empty directory goes with it";
}

TEST_F(RemovalTest, OnlyWhatWeCallSoIsATemporaryFile) {
  for (const char* ours :
       {"GC.tmp", "000000000012.manifest.tmp", "STORE.00112233445566778899aabbccddeeff.tmp"}) {
    EXPECT_TRUE(is_temporary_file_name(ours)) << ours;
  }
  for (const char* other : {".tmp", "GC", "GC.tmp.tmp", "model.tmp", "STORE.tmp", "STORE..tmp",
                            "12.manifest.tmp", "000000000012.manifest"}) {
    EXPECT_FALSE(is_temporary_file_name(other)) << other;
  }
}

TEST_F(RemovalTest, AStoreWithACheckpointOfAnotherJobIsLeftAlone) {
  commit(1);
  store_.reset();
  const size_t count = file_names(path())->size();
  EXPECT_EQ(remove_store(path(), JobId{8}).code(), Code::kFailedPrecondition);
  EXPECT_EQ(file_names(path())->size(), count);
}

TEST_F(RemovalTest, AStoreThatSomebodyWritesIsLeftAlone) {
  commit(1);
  EXPECT_EQ(remove_store(path(), kJob).code(), Code::kFailedPrecondition);
  EXPECT_EQ(steps(), std::vector<int64_t>{1});
}

TEST_F(RemovalTest, ARemovalOfAStoreMayBeKilledAnywhere) {
  commit(1);
  ASSERT_TRUE(store_->pin(1).ok());
  store_.reset();
  bool killed = true;
  for (int64_t call = 1; killed; ++call) {
    TempDirectory copy;
    TempDirectory graves;
    const Path job = copy.path() / "job";
    std::filesystem::copy(path(), job);
    SimulatedDisk disk(graves.path());
    disk.crash_at(call);
    remove_store(job, kJob, disk).ok();
    killed = disk.crashed();
    for (const CheckpointInfo& info : list_checkpoints(job, kJob).checkpoints) {
      EXPECT_TRUE(load_model(job, info.manifest_file, 1).ok()) << "killed at call " << call;
    }
    EXPECT_TRUE(remove_store(job, kJob).ok()) << "killed at call " << call;
    EXPECT_FALSE(std::filesystem::exists(job)) << "killed at call " << call;
  }
}

TEST_F(RemovalTest, ARemovalOfAStoreThatWasCutShortIsFinishedByTheNext) {
  const CheckpointInfo first = commit(1);
  commit(2);
  store_.reset();
  replace_file(path() / "GC", encode_removal({.manifests = {first.manifest_file}, .segments = {}}));
  EXPECT_TRUE(remove_store(path(), kJob).ok());
  EXPECT_FALSE(std::filesystem::exists(path()));
}

}  // namespace
}  // namespace penstock
