// Crashes and power losses at every single change the store makes to the disk, while it saves,
// commits and removes. The oracle is CrashScenario::broken_promise(); with the index beside the
// store: index_crash_test.cc.
#include <fmt/format.h>

#include "checkpoint/marks.h"
#include "checkpoint/removal.h"
#include "tests/checkpoint/crash_scenario.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

int64_t calls_of_an_undisturbed_run() {
  CrashScenario scenario;
  EXPECT_TRUE(scenario.run().finished);
  return scenario.disk().call_count();
}

TEST(CrashTest, AKilledProcessLeavesTheOldOrTheNewCheckpointWhole) {
  const int64_t calls = calls_of_an_undisturbed_run();
  ASSERT_GT(calls, 35);
  for (int64_t call = 1; call <= calls; ++call) {
    CrashScenario scenario;
    scenario.disk().crash_at(call);
    const Attempt attempt = scenario.run();
    ASSERT_FALSE(attempt.finished);
    ASSERT_EQ(scenario.broken_promise(attempt), "") << "killed at call " << call;
  }
}

TEST(CrashTest, APowerLossLeavesTheOldOrTheNewCheckpointWhole) {
  const int64_t calls = calls_of_an_undisturbed_run();
  for (int64_t call = 1; call <= calls + 1; ++call) {
    for (uint64_t seed = 0; seed < 8; ++seed) {
      CrashScenario scenario;
      scenario.disk().crash_at(call);
      const Attempt attempt = scenario.run();
      scenario.disk().lose_power(seed);
      ASSERT_EQ(scenario.broken_promise(attempt), "")
          << "power lost at call " << call << ", seed " << seed;
    }
  }
}

TEST(CrashTest, ASecondCrashDuringRecoveryChangesNothing) {
  const int64_t calls = calls_of_an_undisturbed_run();
  for (int64_t call = 1; call <= calls; ++call) {
    CrashScenario scenario;
    scenario.disk().crash_at(call);
    const Attempt attempt = scenario.run();
    scenario.disk().lose_power(7);
    for (int64_t again = 1; again <= 8; ++again) {
      scenario.crash_again(again, static_cast<uint64_t>(again));
    }
    ASSERT_EQ(scenario.broken_promise(attempt), "") << "killed at call " << call;
  }
}

TEST(CrashTest, AnErrorAtAnyCallKeepsTheOldCheckpointOrGivesTheNew) {
  const int64_t calls = calls_of_an_undisturbed_run();
  for (const Code code : {Code::kResourceExhausted, Code::kInternal}) {
    for (int64_t call = 1; call <= calls; ++call) {
      CrashScenario scenario;
      scenario.disk().fail_call(call, code);
      const Attempt attempt = scenario.run();
      ASSERT_EQ(scenario.broken_promise(attempt), "") << "error at call " << call;
    }
  }
}

TEST(CrashTest, APowerLossAfterAFailedSyncNeverShowsACommitThatWasNotDurable) {
  const int64_t calls = calls_of_an_undisturbed_run();
  for (int64_t call = 1; call <= calls; ++call) {
    for (uint64_t seed = 0; seed < 4; ++seed) {
      CrashScenario scenario;
      scenario.disk().fail_call(call, Code::kInternal);
      const Attempt attempt = scenario.run();
      scenario.disk().lose_power(seed);
      ASSERT_EQ(scenario.broken_promise(attempt), "")
          << "error at call " << call << ", seed " << seed;
    }
  }
}

// Two checkpoints, then `change(store, disk)` on a disk that dies at each of its calls in turn and
// loses power, `seeds` times each.
template <typename Change, typename Check>
void crash_everywhere(int seeds, const Change& change, const Check& check) {
  bool crashed = true;
  for (int64_t call = 1; crashed; ++call) {
    for (int seed = 0; seed < seeds; ++seed) {
      TempDirectory directory(memory_directory());
      TempDirectory graves(memory_directory());
      {
        auto store = CheckpointStore::open(directory.path(), kJob, nullptr);
        ASSERT_TRUE(store.ok());
        commit_model(*store, kJob, Epoch{1}, kOldStep, version_of(kOldStep));
        commit_model(*store, kJob, Epoch{1}, kNewStep, version_of(kNewStep));
      }
      SimulatedDisk disk(graves.path());
      disk.crash_at(call);
      bool acknowledged = false;
      {
        auto store = CheckpointStore::open(directory.path(), kJob, nullptr, disk);
        ASSERT_TRUE(store.ok());
        acknowledged = change(*store, disk);
      }
      crashed = disk.call_count() >= call;
      disk.lose_power(static_cast<uint64_t>(call * seeds + seed));
      check(directory.path(), acknowledged,
            fmt::format("power lost at call {}, seed {}", call, seed));
      if (::testing::Test::HasFailure()) return;
    }
  }
}

// Five buffers full of data, of which four are on their way at a time: any of them may be done when
// the process dies, and any not.
TEST(CrashTest, C4ACrashWithSeveralWritesUnderWayLeavesTheOldOrTheNewCheckpointWhole) {
  constexpr int64_t kBytes = 5 * kDiskBufferBytes - 4096;
  const std::vector<OwnedSlice> slices = {known_slice("w", DType::kU8, {kBytes}, {{0}, {kBytes}})};
  size_t most_under_way = 0;
  const auto change = [&](CheckpointStore& store, SimulatedDisk& disk) {
    const auto summary =
        write_segment(store.directory(), {kJob, Epoch{2}, Rank{0}, 30}, sources_of(slices), disk);
    most_under_way = std::max(most_under_way, disk.most_under_way());
    if (!summary.ok()) return false;
    CommitRequest request;
    request.epoch = Epoch{2};
    request.step = 30;
    request.created_at = {1'790'000'000'000'000'000};
    request.spec_json = "{}";
    request.segments.push_back(commit_segment(*summary));
    return store.commit(request).ok();
  };
  crash_everywhere(
      1, change, [](const Path& directory, bool acknowledged, const std::string& when) {
        const NewestWhole newest = newest_whole(directory, kJob);
        ASSERT_TRUE(newest.checkpoint) << when;
        EXPECT_TRUE(newest.checkpoint->step == 30 ||
                    (!acknowledged && newest.checkpoint->step == 20))
            << newest.checkpoint->step << " is newest, " << when;
        const auto stored = read_manifest(directory / newest.checkpoint->manifest_file);
        ASSERT_TRUE(stored.ok()) << when;
        const Status whole = verify_checkpoint(directory, stored->manifest);
        EXPECT_TRUE(whole.ok()) << when << ": " << whole.to_string();
      });
  EXPECT_EQ(most_under_way, kWriteBudgetBytes / kDiskBufferBytes);
}

TEST(CrashTest, AnAcknowledgedPinHoldsThroughAPowerLossDuringRetention) {
  const auto change = [](CheckpointStore& store, FileSystem&) {
    const bool pinned = store.pin(1).ok();
    store.retain({.keep_last = 1}).status();
    return pinned;
  };
  crash_everywhere(4, change, [](const Path& directory, bool pinned, const std::string& when) {
    EXPECT_TRUE(load_model(directory, manifest_file_name(2), version_of(kNewStep)).ok()) << when;
    const Status old = load_model(directory, manifest_file_name(1), version_of(kOldStep));
    EXPECT_TRUE(old.ok() || (!pinned && old.code() == Code::kNotFound)) << when << old.to_string();
    EXPECT_TRUE(!pinned || pinned_checkpoints(directory)->contains(1)) << when;
    EXPECT_TRUE(CheckpointStore::open(directory, kJob, nullptr).ok()) << when;
  });
}

TEST(CrashTest, ARemovalWithoutTheIndexIsNeverTakenForALoss) {
  std::vector<CheckpointInfo> rows;
  const auto change = [&](CheckpointStore& store, FileSystem&) {
    rows = list_checkpoints(store.directory(), kJob).checkpoints;
    return store.retain({1}).ok();
  };
  crash_everywhere(4, change, [&](const Path& directory, bool, const std::string& when) {
    ASSERT_EQ(rows.size(), 2u);
    TempDirectory beside(memory_directory());
    const auto index = CheckpointIndex::open(beside.path() / "index").value();
    for (const CheckpointInfo& row : rows) ASSERT_TRUE(index->record_commit(row).ok());
    const auto report = index->reconcile(kJob, directory);
    ASSERT_TRUE(report.ok());
    EXPECT_TRUE(report->lost.empty()) << when;
    ASSERT_TRUE(CheckpointStore::open(directory, kJob, index.get()).ok());
    EXPECT_EQ(*index->list(kJob), list_checkpoints(directory, kJob).checkpoints) << when;
    std::filesystem::remove(directory / rows[1].manifest_file);
    EXPECT_EQ(index->reconcile(kJob, directory)->lost.back(), rows[1]) << when;
  });
}

TEST(CrashTest, ARemovalThatGoesOnTakesTheManifestThenTheSegmentsThenTheGcFile) {
  Manifest victim;
  const auto change = [&](CheckpointStore& store, FileSystem& files) {
    victim = read_manifest(store.directory() / manifest_file_name(1))->manifest;
    Removal removal{.manifests = {manifest_file_name(1)}, .segments = {}};
    for (const ManifestSegment& segment : victim.segments) {
      removal.segments.push_back(segment.file);
    }
    replace_file(store.directory() / "GC", encode_removal(removal));
    return finish_removal(store.directory(), files).ok();
  };
  crash_everywhere(8, change, [&](const Path& directory, bool finished, const std::string& when) {
    const bool listed = std::filesystem::exists(directory / manifest_file_name(1));
    EXPECT_TRUE(!listed || check_segments(directory, victim).ok()) << when;
    const bool going_on = std::filesystem::exists(directory / "GC");
    for (const ManifestSegment& segment : victim.segments) {
      EXPECT_TRUE(going_on || !std::filesystem::exists(directory / segment.file)) << when;
    }
    EXPECT_TRUE(!finished || !listed) << when;
    EXPECT_TRUE(load_model(directory, manifest_file_name(2), version_of(kNewStep)).ok()) << when;
  });
}

TEST(CrashTest, AnAcknowledgedUnpinHoldsThroughAPowerLoss) {
  const auto change = [](CheckpointStore& store, FileSystem&) {
    return store.pin(1).ok() && store.unpin(1).ok();
  };
  crash_everywhere(4, change, [](const Path& directory, bool unpinned, const std::string& when) {
    EXPECT_TRUE(!unpinned || pinned_checkpoints(directory)->empty()) << when;
  });
}

TEST(CrashTest, OrphansThatWereSweptStayAwayThroughAPowerLoss) {
  std::string orphan;
  const auto change = [&](CheckpointStore& store, FileSystem&) {
    orphan =
        save_segment(store.directory(), {kJob, Epoch{1}, Rank{0}, 30}, model_slices(0, 3)).file;
    const auto swept = store.sweep_orphans(Epoch{2});
    return swept.ok() && swept->files == std::vector<std::string>{orphan};
  };
  crash_everywhere(8, change, [&](const Path& directory, bool swept, const std::string& when) {
    EXPECT_TRUE(!swept || !std::filesystem::exists(directory / orphan)) << when;
    EXPECT_TRUE(load_model(directory, manifest_file_name(2), version_of(kNewStep)).ok()) << when;
  });
}

TEST(CrashTest, AStoresUuidOnceToldSurvivesAPowerLoss) {
  for (uint64_t seed = 0; seed < 16; ++seed) {
    TempDirectory directory(memory_directory());
    TempDirectory graves(memory_directory());
    SimulatedDisk disk(graves.path());
    const auto told = store_uuid(directory.path(), disk);
    ASSERT_TRUE(told.ok());
    disk.lose_power(seed);
    EXPECT_EQ(*store_uuid(directory.path()), *told) << "seed " << seed;
  }
}

TEST(CrashTest, SettingADamagedCheckpointAsideIsAllOrNothing) {
  const auto change = [](CheckpointStore& store, FileSystem&) {
    const auto stored = read_manifest(store.directory() / manifest_file_name(2));
    flip_byte(store.directory() / stored->manifest.segments[0].file, 5000);
    return store.set_aside(2).ok();
  };
  crash_everywhere(
      4, change, [](const Path& directory, bool acknowledged, const std::string& when) {
        EXPECT_TRUE(load_model(directory, manifest_file_name(1), version_of(kOldStep)).ok())
            << when;
        const bool aside = std::filesystem::exists(directory / set_aside_file_name(2));
        EXPECT_NE(aside, std::filesystem::exists(directory / manifest_file_name(2))) << when;
        EXPECT_TRUE(aside || !acknowledged) << when;
      });
}

// The two tests below show that the ones above would notice a store that forgets to sync.
TEST(CrashTest, WithoutFileSyncsAPowerLossLosesTheCheckpoint) {
  int broken = 0;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    CrashScenario scenario;
    scenario.disk().ignore_file_syncs();
    const Attempt attempt = scenario.run();
    scenario.disk().lose_power(seed);
    broken += !scenario.broken_promise(attempt).empty();
  }
  EXPECT_GT(broken, 5);
}

TEST(CrashTest, WithoutDirectorySyncsAPowerLossLosesTheCheckpoint) {
  int broken = 0;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    CrashScenario scenario;
    scenario.disk().ignore_directory_syncs();
    const Attempt attempt = scenario.run();
    scenario.disk().lose_power(seed);
    broken += !scenario.broken_promise(attempt).empty();
  }
  EXPECT_GT(broken, 5);
}

}  // namespace
}  // namespace penstock
