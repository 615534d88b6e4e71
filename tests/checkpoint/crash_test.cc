// Crashes and power losses at every single change the store makes to the disk, while it saves,
// commits and removes. Oracle: afterwards the newest whole checkpoint is the acknowledged one or,
// when none was acknowledged, the old or the new one; it loads byte for byte; the store works on;
// space returns.
#include <fmt/format.h>

#include "checkpoint/marks.h"
#include "checkpoint/removal.h"
#include "checkpoint/store.h"
#include "tests/checkpoint/simulated_disk.h"
#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

constexpr int64_t kOldStep = 10;
constexpr int64_t kNewStep = 20;

uint64_t version_of(int64_t step) {
  return static_cast<uint64_t>(step) / 10;
}

struct Attempt {
  bool acknowledged = false;  // commit() of kNewStep said ok
  bool finished = false;      // everything did
};

// Saves and commits kNewStep, then keeps only it.
Attempt save_commit_retain(const Path& directory, SimulatedDisk& disk) {
  Attempt attempt;
  auto store = CheckpointStore::open(directory, kJob, nullptr, disk);
  if (!store.ok()) return attempt;
  const auto request = save_model(directory, kJob, Epoch{2}, kNewStep, version_of(kNewStep), disk);
  if (!request.ok()) return attempt;
  if (!store->commit(*request).ok()) return attempt;
  attempt.acknowledged = true;
  attempt.finished = store->retain({1}).ok();
  return attempt;
}

// What is wrong after the restart; empty: nothing.
std::string broken_promise(const Path& directory, const Attempt& attempt) {
  const NewestWhole newest = newest_whole(directory, kJob);
  if (!newest.checkpoint) return "no checkpoint is left";
  const int64_t step = newest.checkpoint->step;
  if (step != kNewStep && (attempt.acknowledged || step != kOldStep)) {
    return fmt::format("step {} is newest", step);
  }
  const Status loaded = load_model(directory, newest.checkpoint->manifest_file, version_of(step));
  if (!loaded.ok()) return "the newest does not load: " + loaded.message();

  auto store = CheckpointStore::open(directory, kJob, nullptr);
  if (!store.ok()) return "it does not open again: " + store.status().message();
  const auto swept = store->sweep_orphans(Epoch{3});
  if (!swept.ok()) return "orphans cannot be swept: " + swept.status().message();
  if (newest_whole(directory, kJob).checkpoint != newest.checkpoint) {
    return "recovery changed the newest checkpoint";
  }
  const auto request = save_model(directory, kJob, Epoch{3}, 30, version_of(30));
  if (!request.ok()) return "the next save fails: " + request.status().message();
  const auto report = store->commit(*request);
  if (!report.ok()) return "the next commit fails: " + report.status().message();
  if (const auto kept = store->retain({1}); !kept.ok()) {
    return "the next removal fails: " + kept.status().message();
  }
  size_t files = 0;
  const std::vector<std::string> names = file_names(directory).value();
  for (const std::string& name : names) files += name != "LOCK" && name != "STORE";
  if (files != kModelRanks + 1) return fmt::format("{} files are left, space is lost", files);
  return load_model(directory, report->info.manifest_file, version_of(30)).message();
}

class Scenario {
 public:
  Scenario() : disk_(graves_.path()) {
    auto store = CheckpointStore::open(job(), kJob, nullptr);
    EXPECT_TRUE(store.ok()) << store.status().to_string();
    commit_model(*store, kJob, Epoch{1}, kOldStep, version_of(kOldStep));
  }
  Path job() const { return directory_.path() / "job"; }
  SimulatedDisk& disk() { return disk_; }
  Attempt run() { return save_commit_retain(job(), disk_); }

 private:
  TempDirectory directory_{memory_directory()};
  TempDirectory graves_{memory_directory()};
  SimulatedDisk disk_;
};

int64_t calls_of_an_undisturbed_run() {
  Scenario scenario;
  EXPECT_TRUE(scenario.run().finished);
  return scenario.disk().call_count();
}

TEST(CrashTest, AKilledProcessLeavesTheOldOrTheNewCheckpointWhole) {
  const int64_t calls = calls_of_an_undisturbed_run();
  ASSERT_GT(calls, 35);
  for (int64_t call = 1; call <= calls; ++call) {
    Scenario scenario;
    scenario.disk().crash_at(call);
    const Attempt attempt = scenario.run();
    ASSERT_FALSE(attempt.finished);
    EXPECT_EQ(broken_promise(scenario.job(), attempt), "") << "killed at call " << call;
  }
}

TEST(CrashTest, APowerLossLeavesTheOldOrTheNewCheckpointWhole) {
  const int64_t calls = calls_of_an_undisturbed_run();
  for (int64_t call = 1; call <= calls + 1; ++call) {
    for (uint64_t seed = 0; seed < 8; ++seed) {
      Scenario scenario;
      scenario.disk().crash_at(call);
      const Attempt attempt = scenario.run();
      scenario.disk().lose_power(seed);
      EXPECT_EQ(broken_promise(scenario.job(), attempt), "")
          << "power lost at call " << call << ", seed " << seed;
    }
  }
}

TEST(CrashTest, ASecondCrashDuringRecoveryChangesNothing) {
  const int64_t calls = calls_of_an_undisturbed_run();
  for (int64_t call = 1; call <= calls; ++call) {
    Scenario scenario;
    scenario.disk().crash_at(call);
    const Attempt attempt = scenario.run();
    scenario.disk().lose_power(7);
    for (int64_t again = 1; again <= 8; ++again) {
      TempDirectory graves(memory_directory());
      SimulatedDisk disk(graves.path());
      disk.crash_at(again);
      auto store = CheckpointStore::open(scenario.job(), kJob, nullptr, disk);
      if (store.ok() && !store->sweep_orphans(Epoch{3}).ok()) store->retain({1}).status();
      disk.lose_power(static_cast<uint64_t>(again));
    }
    EXPECT_EQ(broken_promise(scenario.job(), attempt), "") << "killed at call " << call;
  }
}

TEST(CrashTest, AnErrorAtAnyCallKeepsTheOldCheckpointOrGivesTheNew) {
  const int64_t calls = calls_of_an_undisturbed_run();
  for (const Code code : {Code::kResourceExhausted, Code::kInternal}) {
    for (int64_t call = 1; call <= calls; ++call) {
      Scenario scenario;
      scenario.disk().fail_call(call, code);
      const Attempt attempt = scenario.run();
      EXPECT_EQ(broken_promise(scenario.job(), attempt), "") << "error at call " << call;
    }
  }
}

TEST(CrashTest, APowerLossAfterAFailedSyncNeverShowsACommitThatWasNotDurable) {
  const int64_t calls = calls_of_an_undisturbed_run();
  for (int64_t call = 1; call <= calls; ++call) {
    for (uint64_t seed = 0; seed < 4; ++seed) {
      Scenario scenario;
      scenario.disk().fail_call(call, Code::kInternal);
      const Attempt attempt = scenario.run();
      scenario.disk().lose_power(seed);
      EXPECT_EQ(broken_promise(scenario.job(), attempt), "")
          << "error at call " << call << ", seed " << seed;
    }
  }
}

// Two checkpoints, then `change` on a disk that dies at each of its calls in turn.
template <typename Change, typename Check>
void crash_everywhere(const Change& change, const Check& check) {
  for (int64_t call = 1;; ++call) {
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
      acknowledged = change(*store);
    }
    const bool crashed = disk.call_count() >= call;
    disk.lose_power(static_cast<uint64_t>(call));
    check(directory.path(), acknowledged, fmt::format("power lost at call {}", call));
    if (!crashed) return;
  }
}

TEST(CrashTest, AnAcknowledgedPinHoldsThroughAPowerLossDuringRetention) {
  const auto change = [](CheckpointStore& store) {
    const bool pinned = store.pin(1).ok();
    store.retain({.keep_last = 1}).status();
    return pinned;
  };
  crash_everywhere(change, [](const Path& directory, bool pinned, const std::string& when) {
    EXPECT_TRUE(load_model(directory, manifest_file_name(2), version_of(kNewStep)).ok()) << when;
    const Status old = load_model(directory, manifest_file_name(1), version_of(kOldStep));
    EXPECT_TRUE(old.ok() || (!pinned && old.code() == Code::kNotFound)) << when << old.to_string();
    EXPECT_TRUE(CheckpointStore::open(directory, kJob, nullptr).ok()) << when;
  });
}

TEST(CrashTest, SettingADamagedCheckpointAsideIsAllOrNothing) {
  const auto change = [](CheckpointStore& store) {
    const auto stored = read_manifest(store.directory() / manifest_file_name(2));
    flip_byte(store.directory() / stored->manifest.segments[0].file, 5000);
    return store.set_aside(2).ok();
  };
  crash_everywhere(change, [](const Path& directory, bool acknowledged, const std::string& when) {
    EXPECT_TRUE(load_model(directory, manifest_file_name(1), version_of(kOldStep)).ok()) << when;
    const bool aside = std::filesystem::exists(directory / set_aside_file_name(2));
    EXPECT_NE(aside, std::filesystem::exists(directory / manifest_file_name(2))) << when;
    EXPECT_TRUE(aside || !acknowledged) << when;
  });
}

// The two tests below show that the ones above would notice a store that forgets to sync.
TEST(CrashTest, WithoutFileSyncsAPowerLossLosesTheCheckpoint) {
  int broken = 0;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    Scenario scenario;
    scenario.disk().ignore_file_syncs();
    const Attempt attempt = scenario.run();
    scenario.disk().lose_power(seed);
    broken += !broken_promise(scenario.job(), attempt).empty();
  }
  EXPECT_GT(broken, 5);
}

TEST(CrashTest, WithoutDirectorySyncsAPowerLossLosesTheCheckpoint) {
  int broken = 0;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    Scenario scenario;
    scenario.disk().ignore_directory_syncs();
    const Attempt attempt = scenario.run();
    scenario.disk().lose_power(seed);
    broken += !broken_promise(scenario.job(), attempt).empty();
  }
  EXPECT_GT(broken, 5);
}

}  // namespace
}  // namespace penstock
