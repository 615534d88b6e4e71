#include "checkpoint/index.h"

#include <rocksdb/env.h>

#include "checkpoint/index_row.h"
#include "checkpoint/marks.h"
#include "checkpoint/removal.h"
#include "checkpoint/store.h"
#include "tests/checkpoint/simulated_rocksdb.h"
#include "tests/checkpoint/support.h"
#include "tests/support/real_files.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

CheckpointInfo row(uint64_t job, uint64_t commit_seq) {
  return {JobId{job},
          commit_seq,
          int64_t(commit_seq * 10),
          Epoch{2},
          manifest_file_name(commit_seq),
          {1, 2},
          300,
          4,
          {5}};
}

class IndexTest : public ::testing::Test {
 protected:
  void SetUp() override { open(); }
  void open() {
    auto index = CheckpointIndex::open(index_path());
    ASSERT_TRUE(index.ok()) << index.status().to_string();
    index_ = *std::move(index);
  }
  void open_store() {
    store_.reset();
    auto store = CheckpointStore::open(store_path(), kJob, index_.get());
    ASSERT_TRUE(store.ok()) << store.status().to_string();
    store_.emplace(*std::move(store));
  }
  void close() {
    store_.reset();
    index_.reset();
  }
  CheckpointInfo commit(int64_t step) { return commit_model(*store_, kJob, Epoch{1}, step, step); }
  Path index_path() const { return directory_.path() / "index"; }
  Path store_path() const { return directory_.path() / "job"; }

  TempDirectory directory_;
  std::unique_ptr<CheckpointIndex> index_;
  std::optional<CheckpointStore> store_;
};

TEST(IndexRowTest, NothingIsReadButWhatWasWritten) {
  const auto refused_changed = [](const std::string& text, const auto& decode) {
    EXPECT_TRUE(decode(text).ok());
    for (size_t size = 0; size < text.size(); ++size) {
      EXPECT_EQ(decode(text.substr(0, size)).status().code(), Code::kDataLoss) << size;
    }
    EXPECT_EQ(decode(text + '\0').status().code(), Code::kDataLoss);
  };
  std::string text = encode_row(row(7, 1));
  refused_changed(text, decode_row);
  refused_changed(encode_link({{3, {1, 2}}, {4, 5}}), decode_link);
  text[0] = 2;
  EXPECT_EQ(decode_row(text).status().code(), Code::kDataLoss) << "another format";
}

TEST_F(IndexTest, RowsAreListedInOrderPerJobAndForgotten) {
  for (const uint64_t commit_seq : {300, 2, 1}) {
    ASSERT_TRUE(index_->record_commit(row(7, commit_seq)).ok());
  }
  ASSERT_TRUE(index_->record_commit(row(8, 1)).ok());
  EXPECT_EQ(*index_->list(kJob), (std::vector{row(7, 1), row(7, 2), row(7, 300)}));
  EXPECT_EQ(*index_->highest_commit(kJob), 300u);
  EXPECT_EQ(*index_->highest_commit(JobId{9}), 0u);
  ASSERT_TRUE(index_->forget(kJob, {1, 300, 999}).ok());
  EXPECT_EQ(*index_->list(kJob), std::vector{row(7, 2)});
  EXPECT_EQ(*index_->highest_commit(kJob), 300u) << "the mark stays when rows go";
  ASSERT_TRUE(index_->forget_job(kJob).ok());
  EXPECT_TRUE(index_->list(kJob)->empty());
  EXPECT_EQ(index_->list(JobId{8})->size(), 1u);
}

TEST_F(IndexTest, ACommitIsIndexedAndSurvivesReopening) {
  open_store();
  const CheckpointInfo info = commit(10);
  close();
  open();
  EXPECT_EQ(*index_->list(kJob), std::vector{info});
  const auto report = index_->reconcile(kJob, store_path());
  ASSERT_TRUE(report.ok());
  EXPECT_FALSE(report->rebuilt) << report->reason;
  EXPECT_EQ(report->row_count, 1u);
}

TEST_F(IndexTest, AWitnessThatCannotBeRemovedDoesNoHarm) {
  class KeepingFiles : public RealFiles {
    Status remove(const Path& path) override { return internal_error("unlink " + path.string()); }
  };
  open_store();
  std::vector<CheckpointInfo> rows = {commit(10)};
  close();
  KeepingFiles files;
  index_ = CheckpointIndex::open(index_path(), files).value();
  open_store();
  for (const int64_t step : {20, 30}) rows.push_back(commit(step));
  close();
  open();
  EXPECT_EQ(index_->opening_report(), "");
  EXPECT_EQ(*index_->list(kJob), rows);
}

TEST_F(IndexTest, TheWitnessBesideABareNameIsRead) {
  const Path before = std::filesystem::current_path();
  std::filesystem::current_path(directory_.path());
  EXPECT_TRUE(CheckpointIndex::open("bare").value()->record_commit(row(kJob.value, 1)).ok());
  std::filesystem::remove_all("bare");
  EXPECT_NE(CheckpointIndex::open("bare").value()->opening_report().find("is gone"),
            std::string::npos);
  std::filesystem::current_path(before);
}

TEST_F(IndexTest, ADeletedIndexIsRebuiltFromTheManifests) {
  open_store();
  const CheckpointInfo first = commit(10);
  const CheckpointInfo second = commit(20);
  close();
  std::filesystem::remove_all(index_path());
  open();
  const auto report = index_->reconcile(kJob, store_path());
  ASSERT_TRUE(report.ok());
  EXPECT_TRUE(report->rebuilt);
  EXPECT_TRUE(report->lost.empty());
  EXPECT_EQ(*index_->list(kJob), (std::vector{first, second}));
  EXPECT_EQ(*index_->highest_commit(kJob), 2u);
}

TEST_F(IndexTest, ARolledBackIndexIsNoticedAndRebuilt) {
  open_store();
  commit(10);
  close();
  std::filesystem::copy(index_path(), directory_.path() / "old",
                        std::filesystem::copy_options::recursive);
  open();
  open_store();
  const CheckpointInfo second = commit(20);
  close();
  std::filesystem::remove_all(index_path());
  std::filesystem::rename(directory_.path() / "old", index_path());
  open();
  EXPECT_NE(index_->opening_report().find("older contents were put back"), std::string::npos)
      << index_->opening_report();
  const auto report = index_->reconcile(kJob, store_path());
  ASSERT_TRUE(report.ok());
  EXPECT_TRUE(report->rebuilt);
  EXPECT_EQ(index_->list(kJob)->back(), second);
}

TEST_F(IndexTest, AVanishedManifestIsReportedAsLostAndItsNumberNotReused) {
  open_store();
  commit(10);
  const CheckpointInfo second = commit(20);
  std::filesystem::remove(store_path() / second.manifest_file);
  const auto report = index_->reconcile(kJob, store_path());
  ASSERT_TRUE(report.ok());
  EXPECT_TRUE(report->rebuilt);
  EXPECT_EQ(report->lost, std::vector{second});
  EXPECT_EQ(commit(30).commit_seq, 3u);
}

TEST_F(IndexTest, ADamagedManifestIsNotCalledLost) {
  open_store();
  const CheckpointInfo first = commit(10);
  replace_file(store_path() / commit(20).manifest_file, "torn");
  const auto report = index_->reconcile(kJob, store_path());
  ASSERT_TRUE(report.ok());
  EXPECT_TRUE(report->rebuilt);
  EXPECT_TRUE(report->lost.empty());
  EXPECT_EQ(*index_->list(kJob), std::vector{first});
}

TEST_F(IndexTest, ADamagedDatabaseIsMovedAsideAndSaidSo) {
  open_store();
  const CheckpointInfo info = commit(10);
  close();
  for (const auto& entry : std::filesystem::directory_iterator(index_path())) {
    if (entry.path().filename().string().starts_with("MANIFEST")) {
      flip_byte(entry.path(), 20);
    }
  }
  open();
  EXPECT_NE(index_->opening_report().find("damaged"), std::string::npos);
  EXPECT_TRUE(index_->list(kJob)->empty());
  ASSERT_TRUE(index_->reconcile(kJob, store_path()).ok());
  EXPECT_EQ(*index_->list(kJob), std::vector{info});
  size_t aside = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory_.path())) {
    aside += entry.path().filename().string().starts_with("index.damaged-");
  }
  EXPECT_EQ(aside, 1u);
}

TEST_F(IndexTest, OfTheDamagedDatabasesTheNewestThreeStayAndThoseSomebodyNamed) {
  std::filesystem::create_directory(directory_.path() / "index.damaged-keep");
  std::vector<Path> aside;
  for (int round = 0; round < 5; ++round) {
    ASSERT_TRUE(index_->record_commit(row(kJob.value, 1)).ok());
    close();
    std::filesystem::remove(index_path() / "CURRENT");
    open();
    const std::string report = index_->opening_report();
    const size_t begin = report.find(directory_.path().string() + "/index.damaged-");
    ASSERT_NE(begin, std::string::npos) << report;
    aside.emplace_back(report.substr(begin, report.find(';', begin) - begin));
    ASSERT_TRUE(std::filesystem::exists(aside.back())) << aside.back();
    // A clock may not tell the rounds apart.
    std::filesystem::last_write_time(aside.back(), std::filesystem::file_time_type::clock::now() -
                                                       std::chrono::hours(9 - round));
  }
  for (size_t i = 0; i < aside.size(); ++i) {
    EXPECT_EQ(std::filesystem::exists(aside[i]), i >= 2) << i;
  }
  EXPECT_TRUE(std::filesystem::exists(directory_.path() / "index.damaged-keep"));
}

TEST_F(IndexTest, ALostCurrentFileIsDamageNotAnEmptyIndex) {
  open_store();
  commit(10);
  close();
  std::filesystem::remove(index_path() / "CURRENT");
  open();
  EXPECT_NE(index_->opening_report().find("damaged"), std::string::npos);
}

TEST_F(IndexTest, AFileInItsPlaceIsMovedAside) {
  open_store();
  const CheckpointInfo info = commit(10);
  close();
  std::filesystem::remove_all(index_path());
  replace_file(index_path(), "somebody's");
  open();
  const std::string report = index_->opening_report();
  EXPECT_NE(report.find("it is no folder"), std::string::npos) << report;
  ASSERT_TRUE(index_->reconcile(kJob, store_path()).ok());
  EXPECT_EQ(*index_->list(kJob), std::vector{info});
  std::string aside;
  for (const auto& entry : std::filesystem::directory_iterator(directory_.path())) {
    if (entry.is_regular_file() && size_of_file(entry.path()) > 0) aside += entry.path().filename();
  }
  EXPECT_TRUE(aside.starts_with("index.damaged-")) << aside;
}

TEST_F(IndexTest, ASecondProcessCannotOpenIt) {
  const auto second = CheckpointIndex::open(index_path());
  EXPECT_EQ(second.status().code(), Code::kFailedPrecondition) << second.status().to_string();
}

// RocksDB's lock is free between the look at what is there and the opening.
TEST_F(IndexTest, NobodyElseHasItInAnyInstantFromTheFirstLookToTheClosing) {
  class IntrudedEnv : public rocksdb::EnvWrapper {
   public:
    explicit IntrudedEnv(Path index) : EnvWrapper(Env::Default()), index_(std::move(index)) {}
    rocksdb::Status UnlockFile(rocksdb::FileLock* lock) override {
      const rocksdb::Status unlocked = EnvWrapper::UnlockFile(lock);
      EXPECT_EQ(CheckpointIndex::open(index_).status().code(), Code::kFailedPrecondition);
      ++intruded;
      return unlocked;
    }
    int intruded = 0;

   private:
    const Path index_;
  };
  ASSERT_TRUE(index_->record_commit(row(kJob.value, 1)).ok());
  close();
  IntrudedEnv env(index_path());
  index_ = CheckpointIndex::open(index_path(), real_file_system(), &env).value();
  EXPECT_EQ(env.intruded, 1);
  close();
  EXPECT_EQ(env.intruded, 2);
}

// The disk of the index is full at the restart after a removal that was cut short.
TEST_F(IndexTest, ARemovalWaitsForTheRowsOfWhatItRemoves) {
  open_store();
  const CheckpointInfo first = commit(10);
  commit(20);
  ASSERT_TRUE(begin_removal(store_path(), {{first.manifest_file}, {}}, real_file_system()).ok());
  close();
  TempDirectory graves;  // on the same file system
  SimulatedDisk disk(graves.path());
  const auto env = simulated_env(disk);
  index_ = CheckpointIndex::open(index_path(), disk, env.get()).value();
  disk.crash_at(disk.call_count() + 1);  // it takes no change
  open_store();
  EXPECT_TRUE(std::filesystem::exists(store_path() / "GC"));
  close();
  open();
  const auto report = index_->reconcile(kJob, store_path());
  ASSERT_TRUE(report.ok());
  EXPECT_TRUE(report->lost.empty()) << "it was removed, not lost";

  // The next one goes on with it, though nothing was opened between.
  index_.reset();
  TempDirectory more_graves;
  SimulatedDisk next_disk(more_graves.path());
  const auto next_env = simulated_env(next_disk);
  index_ = CheckpointIndex::open(index_path(), next_disk, next_env.get()).value();
  EXPECT_TRUE(index_->record_commit(first).ok());
  next_disk.crash_at(next_disk.call_count() + 1);  // it takes no change
  open_store();
  next_disk.crash_at(0);
  const CheckpointInfo third = commit(30);
  const auto removed = store_->retain({1});
  EXPECT_TRUE(removed.ok()) << removed.status().to_string();
  EXPECT_FALSE(std::filesystem::exists(store_path() / "GC"));
  EXPECT_EQ(*index_->list(kJob), std::vector{third});
  close();
}

// Nobody with an index sees a checkpoint go: the next one who has it is told.
TEST_F(IndexTest, WhatWasRemovedWithoutTheIndexIsNotLostAndWhatWasLostIs) {
  open_store();
  const CheckpointInfo first = commit(10);
  commit(20);
  const CheckpointInfo third = commit(30);
  const CheckpointInfo fourth = commit(40);
  const std::string text = file_text(store_path() / first.manifest_file);
  close();
  open_store();  // without an index
  ASSERT_EQ(store_->retain({2})->commit_seqs, (std::vector<uint64_t>{1, 2}));
  store_.reset();
  std::filesystem::remove(store_path() / third.manifest_file);
  open();
  const auto report = index_->reconcile(kJob, store_path());
  ASSERT_TRUE(report.ok());
  EXPECT_EQ(report->lost, std::vector{third}) << "1 and 2 were removed";
  EXPECT_EQ(*index_->list(kJob), std::vector{fourth});
  // Put back, it is a checkpoint like any other, and may be lost.
  replace_file(store_path() / first.manifest_file, text);
  EXPECT_EQ(index_->reconcile(kJob, store_path())->row_count, 2u);
  open_store();
  EXPECT_EQ(*index_->list(kJob), (std::vector{first, fourth}));
  EXPECT_FALSE(std::filesystem::exists(store_path() / removed_file_name(1)));
  EXPECT_FALSE(std::filesystem::exists(store_path() / removed_file_name(2)));
  std::filesystem::remove(store_path() / first.manifest_file);
  EXPECT_EQ(index_->reconcile(kJob, store_path())->lost, std::vector{first});
}

TEST_F(IndexTest, OfWhatWasRemovedWithoutTheIndexTheRowsGoBeforeTheMarksDo) {
  open_store();
  for (const int64_t step : {10, 20}) commit(step);
  close();
  open_store();  // without an index
  ASSERT_TRUE(store_->retain({1}).ok());
  store_.reset();
  TempDirectory graves;  // on the same file system
  SimulatedDisk disk(graves.path());
  const auto env = simulated_env(disk);
  index_ = CheckpointIndex::open(index_path(), disk, env.get()).value();
  disk.crash_at(disk.call_count() + 1);  // it takes no change
  open_store();
  EXPECT_TRUE(std::filesystem::exists(store_path() / removed_file_name(1)));
  close();
  open();
  EXPECT_EQ(index_->list(kJob)->size(), 2u);
  open_store();  // as a running coordinator does for its next commit
  EXPECT_EQ(index_->list(kJob)->size(), 1u);
  EXPECT_FALSE(std::filesystem::exists(store_path() / removed_file_name(1)));
}

TEST_F(IndexTest, RetentionForgetsTheRowsOfWhatItRemoves) {
  open_store();
  for (int64_t step = 1; step <= 3; ++step) commit(step);
  ASSERT_TRUE(store_->retain({1}).ok());
  ASSERT_EQ(index_->list(kJob)->size(), 1u);
  EXPECT_EQ(index_->list(kJob)->front().step, 3);
  EXPECT_FALSE(index_->reconcile(kJob, store_path())->rebuilt);
}

}  // namespace
}  // namespace penstock
