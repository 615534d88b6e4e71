#include "coordinator/driver/checkpoint_threads.h"

#include "checkpoint/store.h"
#include "tests/checkpoint/support.h"
#include "tests/support/hung_file_system.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

constexpr JobId kJob{7};
constexpr JobId kStuck{8};

class CheckpointThreadsTest : public ::testing::Test {
 protected:
  CheckpointThreadsTest() {
    auto store = CheckpointStore::open(path(), kJob, nullptr);
    EXPECT_TRUE(store.ok()) << store.status().to_string();
    for (const int64_t step : {10, 20}) {
      rows_.push_back(commit_model(*store, kJob, Epoch{1}, step, static_cast<uint64_t>(step)));
    }
  }
  Path path() const { return directory_.path() / "job"; }
  Path hung_path() const { return directory_.path() / "nfs"; }
  Path index_path() const { return directory_.path() / "index"; }
  std::unique_ptr<CheckpointThreads> start(EventLoop& loop) const {
    auto threads = CheckpointThreads::start(loop, index_path());
    PENSTOCK_CHECK(threads.ok(), threads.status().message());
    return std::move(threads).value();
  }
  CheckpointFound find(bool read_everything) const {
    return ask({kJob, path().string(), read_everything});
  }
  CheckpointFound ask(const FindCheckpoint& request) const {
    EventLoop loop;
    const auto threads = start(loop);
    CheckpointFound answer;
    threads->find(request, [&](const CheckpointFound& found) {
      answer = found;
      loop.stop();
    });
    loop.run();
    return answer;
  }

  // Segments of step 20 with contents `version`, and what commits them.
  CommitCheckpoint saved_again(uint64_t version) const {
    CommitCheckpoint commit;
    commit.job = kJob;
    commit.epoch = Epoch{3};
    commit.step = 20;
    commit.directory = path().string();
    commit.keep_last = 10;
    const auto saved = save_model(path(), kJob, commit.epoch, commit.step, version);
    EXPECT_TRUE(saved.ok()) << saved.status().to_string();
    commit.spec_json = saved->spec_json;
    for (const CommitSegment& segment : saved->segments) {
      commit.segments.push_back({.job = kJob,
                                 .epoch = commit.epoch,
                                 .rank = segment.rank,
                                 .step = commit.step,
                                 .file = segment.file,
                                 .byte_count = segment.byte_count,
                                 .footer_digest = segment.footer_digest,
                                 .slices = {}});
    }
    return commit;
  }

  TempDirectory directory_;
  std::vector<CheckpointInfo> rows_;
};

TEST_F(CheckpointThreadsTest, TheNewestWholeCheckpointIsFoundAndTheIndexMadeToAgree) {
  const CheckpointFound found = find(false);
  EXPECT_TRUE(found.status.ok());
  EXPECT_EQ(found.step, 20);
  EXPECT_EQ(found.manifest, (path() / rows_[1].manifest_file).string());
  auto index = CheckpointIndex::open(index_path());
  ASSERT_TRUE(index.ok());
  EXPECT_EQ(*(*index)->list(kJob), rows_);
}

TEST_F(CheckpointThreadsTest, DamagedDataIsFoundOnlyByReadingEverything) {
  const auto stored = read_manifest(path() / rows_[1].manifest_file);
  ASSERT_TRUE(stored.ok());
  flip_byte(path() / stored->manifest.segments[0].file, kSegmentHeaderBytes + 3);
  EXPECT_EQ(find(false).step, 20);
  const CheckpointFound found = find(true);
  EXPECT_EQ(found.step, 10);
  ASSERT_EQ(found.refused.size(), 1u);
  EXPECT_NE(found.refused[0].find(rows_[1].manifest_file), std::string::npos);
}

TEST_F(CheckpointThreadsTest, OfCheckpointsWithinARangeOfStepsTheLatestStepIsFound) {
  auto store = CheckpointStore::open(path(), kJob, nullptr);
  ASSERT_TRUE(store.ok());
  commit_model(*store, kJob, Epoch{2}, 5, 5);  // the newest commit
  const auto within = [&](int64_t least, int64_t most) {
    return ask({kJob, path().string(), false, std::pair{least, most}});
  };
  EXPECT_EQ(within(0, 19).step, 10);
  EXPECT_EQ(within(0, 9).step, 5);
  EXPECT_EQ(within(0, 100).step, 20);
  const CheckpointFound none = within(11, 19);
  EXPECT_TRUE(none.status.ok());
  EXPECT_TRUE(none.manifest.empty());
  EXPECT_EQ(none.steps, (std::vector<int64_t>{10, 20, 5}));
}

TEST_F(CheckpointThreadsTest, WhatARollbackTookBackIsNotFoundUntilItIsSavedAgain) {
  FindCheckpoint request{kJob, path().string()};
  request.rolled_back = {{{15, 22}, Epoch{1}}};
  EXPECT_EQ(ask(request).step, 10);
  EXPECT_EQ(ask(request).steps, (std::vector<int64_t>{10, 20}));
  auto store = CheckpointStore::open(path(), kJob, nullptr);
  ASSERT_TRUE(store.ok());
  const CheckpointInfo again = commit_model(*store, kJob, Epoch{2}, 20, 21);
  EXPECT_EQ(ask(request).manifest, (path() / again.manifest_file).string());
}

TEST_F(CheckpointThreadsTest, ForARollbackTheNewestBeforeItsStepsIsFoundOrElseTheOldest) {
  auto store = CheckpointStore::open(path(), kJob, nullptr);
  ASSERT_TRUE(store.ok());
  for (const int64_t step : {25, 30}) {
    commit_model(*store, kJob, Epoch{1}, step, static_cast<uint64_t>(step));
  }
  FindCheckpoint request{kJob, path().string()};
  const auto before = [&](int64_t first, int64_t last) {
    request.before = StepRange{first, last};
    return ask(request).step;
  };
  EXPECT_EQ(before(26, 31), 25);
  EXPECT_EQ(before(25, 31), 20);
  EXPECT_EQ(before(21, 28), 20);
  EXPECT_EQ(before(5, 28), 10) << "none is before step 5: the one furthest back";
  EXPECT_EQ(before(5, 10), 0) << "that of the last step itself is no way back";
}

TEST_F(CheckpointThreadsTest, AStepSavedAgainIsComparedWithTheOneBeforeAndNothingElseChanges) {
  const std::vector<std::string> before = file_names(path()).value();
  for (const uint64_t version : {20u, 21u}) {
    CommitCheckpoint commit = saved_again(version);
    commit.keep_last = 1;
    commit.compare = true;
    EventLoop loop;
    const auto threads = start(loop);
    CheckpointDone done;
    threads->commit(commit, [&](const CheckpointDone& answer, Duration) {
      done = answer;
      loop.stop();
    });
    loop.run();
    ASSERT_TRUE(done.status.ok()) << done.status.to_string();
    EXPECT_EQ(done.difference.empty(), version == 20) << done.difference;
    if (version == 20) {
      EXPECT_EQ(done.tensors_equal, std::ssize(model_tensors()));
    } else {
      EXPECT_NE(done.difference.find("bias"), std::string::npos);
    }
    EXPECT_TRUE(done.compared);
    EXPECT_TRUE(done.checkpoint.manifest.empty());
    const std::vector<std::string> after = file_names(path()).value();
    EXPECT_EQ(std::set(after.begin(), after.end()), std::set(before.begin(), before.end()));
  }
}

TEST_F(CheckpointThreadsTest, ACommitWaitsForAToolThatHoldsTheLock) {
  const CommitCheckpoint commit = saved_again(1);
  auto tool = CheckpointStore::open(path(), kJob, nullptr);
  ASSERT_TRUE(tool.ok()) << tool.status().to_string();
  EventLoop loop;
  const auto threads = start(loop);
  std::optional<Status> committed;
  threads->commit(commit, [&](const CheckpointDone& answer, Duration) {
    committed = answer.status;
    loop.stop();
  });
  loop.call_after(std::chrono::milliseconds(100), [&] {
    EXPECT_FALSE(committed.has_value()) << "the lock is held";
    const CheckpointStore released = *std::move(tool);
  });
  loop.run();
  EXPECT_TRUE(committed->ok()) << committed->to_string();
}

TEST_F(CheckpointThreadsTest, AnEndOfTheCoordinatorDoesNotWaitForTheLock) {
  const CommitCheckpoint commit = saved_again(1);
  const auto tool = CheckpointStore::open(path(), kJob, nullptr);
  ASSERT_TRUE(tool.ok()) << tool.status().to_string();
  EventLoop loop;
  const auto threads = start(loop);
  threads->commit(commit, [](const CheckpointDone&, Duration) {});
  EXPECT_TRUE(threads->finish(std::chrono::minutes(4)).empty());
}

TEST_F(CheckpointThreadsTest, ADirectoryThatCannotBeReadIsAnErrorAndNotNothing) {
  std::filesystem::remove_all(path());
  replace_file(path(), "no directory");
  EXPECT_FALSE(find(false).status.ok());
  EXPECT_FALSE(find(true).status.ok());
}

TEST_F(CheckpointThreadsTest, AListingSaysWhatIsPinned) {
  ASSERT_TRUE(CheckpointStore::open(path(), kJob, nullptr)->pin(rows_[0].commit_seq).ok());
  EventLoop loop;
  const auto threads = start(loop);
  std::vector<bool> pinned;
  threads->list(kJob, path(), [&](const Result<std::vector<ListedCheckpoint>>& answer) {
    for (const ListedCheckpoint& listed : answer.value()) pinned.push_back(listed.pinned);
    loop.stop();
  });
  loop.run();
  EXPECT_EQ(pinned, (std::vector<bool>{true, false}));
}

TEST_F(CheckpointThreadsTest, ListingsBeyondTheBoundAreRefusedAtOnce) {
  EventLoop loop;
  const auto threads = start(loop);
  int listed = 0;
  int refused = 0;
  for (int i = 0; i < CheckpointThreads::kListsMax + 5; ++i) {
    threads->list(kJob, path(), [&](const Result<std::vector<ListedCheckpoint>>& answer) {
      answer.ok() ? ++listed : ++refused;
      EXPECT_EQ(answer.status().code(), answer.ok() ? Code::kOk : Code::kResourceExhausted);
      if (listed == CheckpointThreads::kListsMax) loop.stop();
    });
  }
  EXPECT_EQ(refused, 5);
  loop.run();
  EXPECT_EQ(listed, CheckpointThreads::kListsMax);
}

TEST_F(CheckpointThreadsTest, ADirectoryThatHangsHoldsUpNoOtherJob) {
  const auto hung = HungFileSystem::mount_at(hung_path());
  EventLoop loop;
  const auto threads = start(loop);
  int prepared = 0;
  for (int i = 0; i < 3; ++i) {  // orders are repeated while their directory is awaited
    threads->prepare(kStuck, hung_path() / "run", [&](const Status& made) {
      EXPECT_FALSE(made.ok());
      ++prepared;
      loop.stop();
    });
  }
  hung->await_caller();
  CheckpointFound found;
  threads->find({kJob, path().string(), true}, [&](const CheckpointFound& answer) {
    found = answer;
    loop.stop();
  });
  loop.run();
  EXPECT_EQ(found.step, 20);
  EXPECT_EQ(prepared, 0);
  hung->release();
  loop.run();
  EXPECT_EQ(prepared, 1);
}

TEST_F(CheckpointThreadsTest, FinishingNamesTheJobsWhoseDirectoryHangs) {
  const auto hung = HungFileSystem::mount_at(hung_path());
  EventLoop loop;
  const auto threads = start(loop);
  threads->prepare(kStuck, hung_path() / "run", [](const Status&) {});
  hung->await_caller();
  EXPECT_EQ(threads->finish(std::chrono::milliseconds(1)), std::vector<JobId>{kStuck});
  hung->release();
  EXPECT_TRUE(threads->finish(std::chrono::minutes(1)).empty());
}

TEST_F(CheckpointThreadsTest, CheckpointsThatAreNotWhereTheyWereCommittedAreNotSaidToBeRemoved) {
  EventLoop loop;
  const auto threads = start(loop);
  const auto remove = [&](std::optional<int64_t> newest_step) {
    Status status;
    threads->remove({kJob, path().string(), newest_step}, [&](const Status& removed) {
      status = removed;
      loop.stop();
    });
    loop.run();
    return status;
  };
  std::filesystem::rename(path(), directory_.path() / "elsewhere");
  for (const bool mount_point : {false, true}) {
    if (mount_point) std::filesystem::create_directories(path());
    const Status missing = remove(20);
    EXPECT_EQ(missing.code(), Code::kFailedPrecondition);
    EXPECT_NE(missing.message().find("the checkpoint of step 20"), std::string::npos);
    EXPECT_NE(missing.message().find("penstock rm 7"), std::string::npos) << missing.message();
  }
  EXPECT_TRUE(std::filesystem::exists(path())) << "the empty mount point stays";
  EXPECT_TRUE(remove({}).ok()) << "of a job that saved nothing there need not be anything";
  std::filesystem::rename(directory_.path() / "elsewhere", path());
  EXPECT_TRUE(remove(20).ok());
  EXPECT_FALSE(std::filesystem::exists(path()));
}

TEST_F(CheckpointThreadsTest, AJobThatNeverSavedHasNothing) {
  std::filesystem::remove_all(path());
  const CheckpointFound found = find(false);
  EXPECT_TRUE(found.status.ok());
  EXPECT_TRUE(found.manifest.empty());
}

}  // namespace
}  // namespace penstock
