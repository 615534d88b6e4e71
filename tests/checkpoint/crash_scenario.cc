#include "tests/checkpoint/crash_scenario.h"

#include <fmt/format.h>
#include <rocksdb/env.h>

#include <algorithm>
#include <set>

#include "checkpoint/marks.h"
#include "checkpoint/removal.h"

namespace penstock::checkpoint_test {
namespace {

// An index on a simulated disk, and what it needs.
struct SimulatedIndex {
  std::shared_ptr<rocksdb::Env> env;
  std::unique_ptr<CheckpointIndex> index;

  SimulatedIndex(const Path& path, SimulatedDisk& disk) : env(simulated_env(disk)) {
    auto opened = CheckpointIndex::open(path, disk, env.get());
    if (opened.ok()) index = *std::move(opened);
  }
};

}  // namespace

CrashScenario::CrashScenario(bool with_index) : disk_(graves_.path()), with_index_(with_index) {
  std::unique_ptr<CheckpointIndex> index;
  if (with_index) {
    auto opened = CheckpointIndex::open(this->index());
    EXPECT_TRUE(opened.ok()) << opened.status().to_string();
    index = *std::move(opened);
  }
  auto store = CheckpointStore::open(job(), kJob, index.get());
  EXPECT_TRUE(store.ok()) << store.status().to_string();
  if (with_index) {
    for (const int64_t step : {1, 2}) commit_model(*store, kJob, Epoch{1}, step, 0);
  }
  commit_model(*store, kJob, Epoch{1}, kOldStep, version_of(kOldStep));
}

Attempt CrashScenario::run_on(SimulatedDisk& disk) {
  Attempt attempt;
  std::optional<SimulatedIndex> index;
  if (with_index_) {
    index.emplace(this->index(), disk);
    if (!index->index || !index->index->reconcile(kJob, job()).ok()) return attempt;
  }
  auto store = CheckpointStore::open(job(), kJob, index ? index->index.get() : nullptr, disk);
  if (!store.ok()) return attempt;
  const auto request = save_model(job(), kJob, Epoch{2}, kNewStep, version_of(kNewStep), disk);
  if (!request.ok()) return attempt;
  if (!store->commit(*request).ok()) return attempt;
  attempt.acknowledged = true;
  attempt.finished = store->retain({1}).ok() && !disk.crashed();
  return attempt;
}

bool CrashScenario::rebuild_index() {
  std::filesystem::remove_all(index());
  const SimulatedIndex opened(index(), disk_);
  return opened.index && opened.index->reconcile(kJob, job()).ok();
}

void CrashScenario::crash_again(int64_t call, uint64_t seed) {
  TempDirectory graves(memory_directory());
  SimulatedDisk disk(graves.path());
  disk.crash_at(call);
  {
    std::optional<SimulatedIndex> index;
    if (with_index_) {
      index.emplace(this->index(), disk);
      if (index->index) index->index->reconcile(kJob, job()).status();
    }
    auto store = CheckpointStore::open(job(), kJob, index ? index->index.get() : nullptr, disk);
    if (store.ok() && !store->sweep_orphans(Epoch{3}).ok()) store->retain({1}).status();
  }
  disk.lose_power(seed);
}

// Opened and reconciled twice: the second time there is nothing left to do.
std::string CrashScenario::broken_index() {
  for (const bool first : {true, false}) {
    const auto opened = CheckpointIndex::open(index());
    if (!opened.ok()) return "the index does not open: " + opened.status().message();
    CheckpointIndex& index = **opened;
    if (first) index_report_ = index.opening_report();
    const auto report = index.reconcile(kJob, job());
    if (!report.ok()) return "the index cannot be reconciled: " + report.status().message();
    if (!report->lost.empty()) return "the index knows of a commit that is gone";
    // What an interrupted removal names is as good as gone.
    const std::vector<uint64_t> going = removal_in_progress(job()).value();
    std::vector<CheckpointInfo> wanted = list_checkpoints(job(), kJob).checkpoints;
    std::erase_if(wanted, [&](const CheckpointInfo& info) {
      return std::find(going.begin(), going.end(), info.commit_seq) != going.end();
    });
    const auto rows = index.list(kJob);
    if (!rows.ok() || *rows != wanted) {
      return "index and manifests differ after reconcile()";
    }
    if (!first && (report->rebuilt || !index.opening_report().empty())) {
      return "recovery does not last: " + report->reason + index.opening_report();
    }
  }
  return "";
}

// A checkpoint that readers are shown has all its segments: removing one takes its manifest first.
std::string CrashScenario::half_removed() const {
  const StoreListing listing = list_checkpoints(job(), kJob);
  for (const CheckpointInfo& info : listing.checkpoints) {
    const auto stored = read_manifest(job() / info.manifest_file);
    const Status whole = stored.ok() ? check_segments(job(), stored->manifest) : stored.status();
    if (!whole.ok()) return "a checkpoint is half removed: " + whole.message();
  }
  return "";
}

// All segments of the epoch before were committed once: those that no manifest names any more went
// when the store was opened, before orphans are swept.
std::string CrashScenario::left_over() const {
  std::set<std::string> named;
  const StoreListing listing = list_checkpoints(job(), kJob);
  for (const CheckpointInfo& info : listing.checkpoints) {
    const auto stored = read_manifest(job() / info.manifest_file);
    for (const ManifestSegment& segment : stored->manifest.segments) named.insert(segment.file);
  }
  const std::vector<std::string> names = file_names(job()).value();
  for (const std::string& name : names) {
    const auto segment = parse_segment_file_name(name);
    if (segment.ok() && segment->epoch == Epoch{1} && !named.contains(name)) {
      return "a removed checkpoint's segment is left over: " + name;
    }
  }
  return "";
}

std::string CrashScenario::broken_promise(const Attempt& attempt) {
  const NewestWhole newest = newest_whole(job(), kJob);
  if (!newest.checkpoint) return "no checkpoint is left";
  newest_step_ = newest.checkpoint->step;
  if (newest_step_ != kNewStep && (attempt.acknowledged || newest_step_ != kOldStep)) {
    return fmt::format("step {} is newest", newest_step_);
  }
  const Status loaded =
      load_model(job(), newest.checkpoint->manifest_file, version_of(newest_step_));
  if (!loaded.ok()) return "the newest does not load: " + loaded.message();
  if (const std::string broken = half_removed(); !broken.empty()) return broken;
  if (with_index_) {
    if (const std::string broken = broken_index(); !broken.empty()) return broken;
  }
  std::unique_ptr<CheckpointIndex> index;
  if (with_index_) index = CheckpointIndex::open(this->index()).value();
  auto store = CheckpointStore::open(job(), kJob, index.get());
  if (!store.ok()) return "it does not open again: " + store.status().message();
  if (const std::string broken = left_over(); !broken.empty()) return broken;
  const auto swept = store->sweep_orphans(Epoch{3});
  if (!swept.ok()) return "orphans cannot be swept: " + swept.status().message();
  if (newest_whole(job(), kJob).checkpoint != newest.checkpoint) {
    return "recovery changed the newest checkpoint";
  }
  const auto request = save_model(job(), kJob, Epoch{3}, 30, version_of(30));
  if (!request.ok()) return "the next save fails: " + request.status().message();
  const auto report = store->commit(*request);
  if (!report.ok()) return "the next commit fails: " + report.status().message();
  if (!report->index.ok()) return "the next commit is not indexed: " + report->index.message();
  if (report->info.commit_seq <= newest.checkpoint->commit_seq) return "a number is used again";
  if (const auto kept = store->retain({1}); !kept.ok()) {
    return "the next removal fails: " + kept.status().message();
  }
  size_t files = 0;
  const std::vector<std::string> names = file_names(job()).value();
  for (const std::string& name : names) {
    const bool of_store = name == "LOCK" || name == "STORE";
    const bool mark = !with_index_ && parse_removed_file_name(name).ok();  // for the next index
    files += !of_store && !mark;
  }
  if (files != kModelRanks + 1) return fmt::format("{} files are left, space is lost", files);
  if (index && *index->list(kJob) != std::vector{report->info}) {
    return "the index does not hold just the last commit";
  }
  return load_model(job(), report->info.manifest_file, version_of(30)).message();
}

namespace {

// What a call is about: "fdatasync", "000000000002.manifest.tmp".
struct Call {
  std::string_view verb;
  std::string_view file;
  explicit Call(std::string_view text)
      : verb(text.substr(0, text.find(' '))), file(text.substr(text.rfind('/') + 1)) {}
  bool is(std::string_view wanted, std::string_view ending) const {
    return verb == wanted && file.ends_with(ending);
  }
};

// A segment's calls, in their order: create, reserve, write (the header), any number of starts and
// of writes that finish them (the data), write (the footer), write (the trailer), fdatasync, close.
std::string in_segment(const Call& call, int segments, int starts, int writes) {
  if (call.verb == "create") return segments == 1 ? "C2" : "C9";
  if (call.verb == "reserve") return "C3";
  if (call.verb == "start") return "C4";
  if (call.verb == "write") {
    if (writes == 1) return "C3";
    return writes <= 1 + starts ? "C4" : writes == 2 + starts ? "C5" : "C6";
  }
  return call.verb == "fdatasync" ? "C7" : "C8";
}

std::string in_manifest(const Call& call) {
  if (call.verb == "create") return "C11";
  if (call.verb == "reserve" || call.verb == "write") return "C12";
  return call.verb == "rename" ? "C14" : "C13";
}

}  // namespace

std::string crash_point(const std::vector<std::string>& calls, bool torn) {
  enum class Phase { kBefore, kSegments, kManifest, kIndex, kRemoval } phase = Phase::kBefore;
  int segments = 0;
  int starts = 0;  // of the newest segment
  int writes = 0;
  int tables = 0;    // made since the last batch
  int unlinked = 0;  // segments
  bool batch = false;
  std::string point;
  for (const std::string& text : calls) {
    const Call call(text);
    const bool segment = call.file.ends_with(".segment");
    if (call.is("create", ".segment")) {
      phase = Phase::kSegments;
      ++segments;
      starts = 0;
      writes = 0;
    }
    if (call.is("create", ".manifest.tmp")) phase = Phase::kManifest;
    if (call.is("create", "GC.tmp")) phase = Phase::kRemoval;
    starts += call.is("start", ".segment");
    writes += call.is("write", ".segment");
    if (call.is("write", ".log")) tables = 0;
    tables += call.is("create", ".sst");
    unlinked += segment && call.verb == "unlink";
    const bool of_table = call.file.ends_with(".sst") || call.file.starts_with("MANIFEST");
    const bool compaction = of_table && (tables > 1 || call.verb == "unlink");
    if (phase == Phase::kBefore) {
      point = "C1";
    } else if (phase == Phase::kSegments) {
      point = segment ? in_segment(call, segments, starts, writes) : "C8";
    } else if (phase == Phase::kManifest) {
      point = call.verb == "fsync" ? "C15" : in_manifest(call);
      if (call.verb == "fsync") phase = Phase::kIndex;
    } else if (compaction) {
      point = "C26";
    } else if (phase == Phase::kIndex) {
      const bool write = call.is("write", ".log");
      point = write && !batch && !torn                ? "C16"
              : write || call.is("fdatasync", ".log") ? "C17"
                                                      : "C18";
      batch = batch || write;
    } else {
      point = call.is("create", "GC.tmp") ? "C19" : unlinked > 0 && segment ? "C22" : "C21";
    }
  }
  return point;
}

void FaultTable::add(const std::string& point, int64_t newest_step) {
  Row& row = rows_[point];
  ++row.runs;
  row.old_step += newest_step == kOldStep;
  row.new_step += newest_step == kNewStep;
}

void FaultTable::record() const {
  for (const auto& [point, row] : rows_) {
    ::testing::Test::RecordProperty(
        point, fmt::format("{} runs, {} old, {} new", row.runs, row.old_step, row.new_step));
  }
}

}  // namespace penstock::checkpoint_test
