#include "coordinator/driver/checkpoint_threads.h"

#include <fmt/format.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <set>
#include <thread>

#include "checkpoint/compare.h"
#include "checkpoint/marks.h"
#include "checkpoint/saved_slice.h"
#include "checkpoint/state_files.h"
#include "checkpoint/store.h"
#include "comm/base/log.h"

namespace penstock {
namespace {

constexpr Duration kLockWait = std::chrono::minutes(10);
constexpr Duration kLockRetry = std::chrono::milliseconds(20);

// The newest earlier checkpoint of the step; none, or one without digests of tensors: nothing.
std::optional<Manifest> earlier_of_step(const CheckpointStore& store, JobId job, int64_t step) {
  const StoreListing listing = list_checkpoints(store.directory(), job);
  for (auto at = listing.checkpoints.rbegin(); at != listing.checkpoints.rend(); ++at) {
    if (at->step != step) continue;
    const Result<StoredManifest> stored = read_manifest(store.directory() / at->manifest_file);
    if (stored.ok() && stored->manifest.has_tensor_digests()) return stored->manifest;
  }
  return std::nullopt;
}

Result<CommitRequest> commit_request(const CommitCheckpoint& request) {
  CommitRequest commit;
  commit.epoch = request.epoch;
  commit.step = request.step;
  commit.created_at = request.at;
  commit.spec_json = request.spec_json;
  commit.layout = request.layout;
  for (const SegmentSaved& saved : request.segments) {
    PENSTOCK_TRY_ASSIGN(CommitSegment segment, to_commit_segment(saved));
    commit.segments.push_back(std::move(segment));
  }
  return commit;
}

// What a replay saved: whether all its tensors have the digests of the checkpoint of that step that
// is there. Reads no data, publishes nothing, and removes the segments: many could fill the disk.
Status compare_now(const CheckpointStore& store, const CommitCheckpoint& request,
                   CheckpointDone& done) {
  const Path& directory = store.directory();
  PENSTOCK_TRY_ASSIGN(const CommitRequest saved, commit_request(request));
  PENSTOCK_TRY_ASSIGN(const Manifest again, store.assemble(saved));
  if (const auto earlier = earlier_of_step(store, request.job, request.step)) {
    PENSTOCK_TRY_ASSIGN(const Comparison comparison,
                        compare_checkpoints({directory, *earlier}, {directory, again}, false));
    done.tensors_equal = static_cast<int64_t>(comparison.equal_count);
    if (!comparison.equal()) {
      done.difference =
          fmt::format("another {}, the first of {} tensors that differ from those of {}",
                      comparison.differences.front().name, comparison.differences.size(),
                      manifest_file_name(earlier->commit_seq));
    }
  }
  for (const CommitSegment& segment : saved.segments) {
    const Status removed = real_file_system().remove(directory / segment.file);
    if (!removed.ok()) log_warning("job {}: {}", request.job, removed.to_string());
  }
  return {};
}

Result<CheckpointRecord> commit_now(CheckpointStore& store, const CommitCheckpoint& request) {
  PENSTOCK_TRY_ASSIGN(const CommitRequest commit, commit_request(request));
  PENSTOCK_TRY_ASSIGN(const CommitReport report, store.commit(commit));
  if (!report.index.ok()) log_warning("checkpoint index: {}", report.index.to_string());
  CheckpointRecord record;
  const Path manifest = store.directory() / report.info.manifest_file;
  record.step = request.step;
  record.epoch = request.epoch;
  record.manifest = manifest.string();
  record.bytes = report.info.payload_bytes;
  const Result<StoredManifest> stored = read_manifest(manifest);
  if (stored.ok()) {
    record.weights_digest = state_digest(stored->manifest, TensorKind::kWeight);
  }
  return record;
}

void remove_old(CheckpointStore& store, const CommitCheckpoint& request) {
  const RetentionPolicy policy{.keep_last = request.keep_last, .keep_every = request.keep_every};
  const Result<RemovalReport> removed = store.retain(policy);
  if (!removed.ok()) {
    log_warning("job {}: old checkpoints stay: {}", request.job, removed.status().to_string());
  } else {
    for (const RefusedCheckpoint& refused : removed->passed_over) {
      log_warning("job {}: {} does not count: {}", request.job, refused.manifest_file,
                  refused.reason.message());
    }
  }
  if (const auto swept = store.sweep_orphans(request.epoch); !swept.ok()) {
    log_warning("job {}: left-over segments stay: {}", request.job, swept.status().to_string());
  }
}

std::string sentence(const RefusedCheckpoint& refused) {
  return fmt::format("{}: {}", refused.manifest_file, refused.reason.message());
}

// Leaves those that no rollback took back, and with a rollback to be made the best one last: those
// before its steps in their order, and before them the others, the oldest last.
void order_for_rollbacks(const FindCheckpoint& request, std::vector<CheckpointInfo>& candidates) {
  std::erase_if(candidates, [&](const CheckpointInfo& info) {
    return (request.before && info.step >= request.before->last) ||
           std::any_of(request.rolled_back.begin(), request.rolled_back.end(),
                       [&](const Rollback& rollback) {
                         return info.epoch <= rollback.epoch && info.step >= rollback.steps.first;
                       });
  });
  if (!request.before) return;
  const auto early_enough = std::stable_partition(
      candidates.begin(), candidates.end(),
      [&](const CheckpointInfo& info) { return info.step >= request.before->first; });
  const auto by_step = [](const CheckpointInfo& a, const CheckpointInfo& b) {
    return a.step < b.step;
  };
  std::stable_sort(candidates.begin(), early_enough,
                   [&](const auto& a, const auto& b) { return by_step(b, a); });
  std::stable_sort(early_enough, candidates.end(), by_step);
}

// The newest checkpoint that the request allows and of which every byte is as it was written, or at
// least everything but the data.
NewestWhole newest_of(const FindCheckpoint& request, StoreListing listing) {
  const Path directory = request.directory;
  NewestWhole newest;
  newest.directory = listing.directory;
  newest.refused = std::move(listing.refused);
  std::vector<CheckpointInfo>& candidates = listing.checkpoints;
  if (request.steps_within) {
    const auto [least, most] = *request.steps_within;
    std::erase_if(candidates, [least = least, most = most](const CheckpointInfo& info) {
      return info.step < least || info.step > most;
    });
    std::stable_sort(candidates.begin(), candidates.end(),
                     [](const auto& a, const auto& b) { return a.step < b.step; });
  }
  order_for_rollbacks(request, candidates);
  for (auto at = candidates.rbegin(); at != candidates.rend(); ++at) {
    const Result<StoredManifest> stored = read_manifest(directory / at->manifest_file);
    Status status = stored.status();
    if (status.ok()) {
      status = request.read_everything ? verify_checkpoint(directory, stored->manifest)
                                       : check_segments(directory, stored->manifest);
    }
    if (status.ok()) {
      newest.checkpoint = *at;
      break;
    }
    newest.refused.push_back({at->commit_seq, at->manifest_file, status});
  }
  return newest;
}

CheckpointFound find_now(const FindCheckpoint& request) {
  const Path directory = request.directory;
  CheckpointFound found;
  found.job = request.job;
  found.number = request.number;
  StoreListing listing = list_checkpoints(directory, request.job);
  for (const CheckpointInfo& info : listing.checkpoints) found.steps.push_back(info.step);
  const bool special = request.read_everything || request.steps_within || request.before ||
                       !request.rolled_back.empty();
  const NewestWhole newest =
      special ? newest_of(request, std::move(listing)) : newest_whole(directory, request.job);
  found.status = newest.directory;
  for (const RefusedCheckpoint& refused : newest.refused) {
    found.refused.push_back(sentence(refused));
  }
  if (newest.checkpoint) {
    found.step = newest.checkpoint->step;
    found.manifest = (directory / newest.checkpoint->manifest_file).string();
  }
  return found;
}

Status remove_now(const RemoveCheckpoints& request) {
  PENSTOCK_TRY_ASSIGN(const bool is_store, holds_store(request.directory));
  if (request.newest_step && !is_store) {
    return failed_precondition(fmt::format(
        "the checkpoint of step {}, which was committed, is not in {}; mount or restore that "
        "directory, or remove the job without its checkpoints: penstock rm {}",
        *request.newest_step, request.directory, request.job));
  }
  return remove_store(request.directory, request.job);
}

Result<std::vector<ListedCheckpoint>> list_now(const Path& directory, JobId job) {
  const StoreListing listing = list_checkpoints(directory, job);
  PENSTOCK_TRY(listing.directory);
  PENSTOCK_TRY_ASSIGN(const std::set<uint64_t> pinned, pinned_checkpoints(directory));
  std::vector<ListedCheckpoint> listed;
  for (const CheckpointInfo& info : listing.checkpoints) {
    ListedCheckpoint item{
        info.step,       info.epoch, (directory / info.manifest_file).string(), info.payload_bytes,
        info.created_at, {},         pinned.contains(info.commit_seq)};
    const Result<StoredManifest> stored = read_manifest(item.manifest);
    const Status whole =
        stored.ok() ? check_segments(directory, stored->manifest) : stored.status();
    if (!whole.ok()) item.damage = whole.message();
    listed.push_back(std::move(item));
  }
  for (const RefusedCheckpoint& refused : listing.refused) {
    ListedCheckpoint item;
    item.manifest = (directory / refused.manifest_file).string();
    item.damage = refused.reason.message();
    listed.push_back(std::move(item));
  }
  return listed;
}

}  // namespace

// One job's thread and what waits for it.
class CheckpointThreads::Lane {
 public:
  Lane() : thread_([this] { run(); }) {}
  ~Lane() {
    stop();
    thread_.join();
  }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  void push(std::function<void()> task) {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
    changed_.notify_all();
  }
  // After the task in progress.
  void stop() {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  bool stopped_within(Duration limit) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, limit, [this] { return stopped_; });
  }

  int unfinished = 0;  // tasks; the loop's own

 private:
  void run() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
      if (stopping_) break;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      lock.lock();
    }
    stopped_ = true;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;  // guarded by mutex_
  bool stopping_ = false;                    // guarded by mutex_
  bool stopped_ = false;                     // guarded by mutex_
  std::thread thread_;                       // last: it uses all of the above
};

Result<std::unique_ptr<CheckpointThreads>> CheckpointThreads::start(EventLoop& loop,
                                                                    const Path& index_path) {
  PENSTOCK_TRY_ASSIGN(std::unique_ptr<CheckpointIndex> index, CheckpointIndex::open(index_path));
  if (!index->opening_report().empty()) log_warning("{}", index->opening_report());
  return std::make_unique<CheckpointThreads>(loop, std::move(index));
}

CheckpointThreads::CheckpointThreads(EventLoop& loop, std::unique_ptr<CheckpointIndex> index)
    : loop_(loop), index_(std::move(index)) {}

CheckpointThreads::~CheckpointThreads() = default;

void CheckpointThreads::enqueue(JobId job, std::function<void()> task) {
  std::unique_ptr<Lane>& lane = lanes_[job];
  if (!lane) lane = std::make_unique<Lane>();
  ++lane->unfinished;
  lane->push([this, job, task = std::move(task)] {
    task();
    loop_.post([this, job] { finished(job); });
  });
}

// An idle thread goes; the next task of its job gets a new one.
void CheckpointThreads::finished(JobId job) {
  const auto lane = lanes_.find(job);
  if (--lane->second->unfinished == 0) lanes_.erase(lane);
}

std::vector<JobId> CheckpointThreads::finish(Duration limit) {
  pace_.stop();
  for (const auto& [job, lane] : lanes_) lane->stop();
  const int64_t deadline_ns = monotonic_ns() + limit.count();
  std::vector<JobId> hanging;
  for (const auto& [job, lane] : lanes_) {
    const Duration left(std::max<int64_t>(0, deadline_ns - monotonic_ns()));
    if (!lane->stopped_within(left)) hanging.push_back(job);
  }
  return hanging;
}

// The index may have been lost or damaged, or miss a commit that a crash cut short.
void CheckpointThreads::reconcile_once(JobId job, const Path& directory) {
  {
    const std::lock_guard lock(mutex_);
    if (reconciled_.contains(job)) return;
  }
  const Result<IndexReport> report = index_->reconcile(job, directory);
  if (!report.ok()) {
    return log_warning("checkpoint index, job {}: {}", job, report.status().message());
  }
  {
    const std::lock_guard lock(mutex_);
    reconciled_.insert(job);
  }
  if (report->rebuilt) {
    log_warning("checkpoint index, job {}: made anew from the manifests: {}", job, report->reason);
  }
  for (const CheckpointInfo& lost : report->lost) {
    log_warning("job {}: the checkpoint of step {} was committed, but {} is gone", job, lost.step,
                (directory / lost.manifest_file).string());
  }
}

void CheckpointThreads::commit(CommitCheckpoint request,
                               std::function<void(CheckpointDone, Duration)> done) {
  const JobId job = request.job;
  enqueue(job, [this, request = std::move(request), done = std::move(done)] {
    const int64_t begun_ns = monotonic_ns();
    reconcile_once(request.job, request.directory);
    CheckpointDone result;
    result.job = request.job;
    result.epoch = request.epoch;
    result.step = request.step;
    // A tool that prunes or pins holds the lock while it reads the newest checkpoint.
    const auto wait = [this, begun_ns] {
      return monotonic_ns() - begun_ns < kLockWait.count() && pace_.pause(kLockRetry);
    };
    Result<CheckpointStore> store =
        CheckpointStore::open_when_free(request.directory, request.job, index_.get(), wait);
    result.compared = request.compare;
    if (!store.ok()) {
      result.status = store.status();
    } else if (request.compare) {
      result.status = compare_now(*store, request, result);
    } else if (Result<CheckpointRecord> record = commit_now(*store, request); record.ok()) {
      result.checkpoint = *std::move(record);
    } else {
      result.status = record.status();
    }
    const Duration took(monotonic_ns() - begun_ns);
    const bool committed = result.status.ok() && !request.compare;
    loop_.post([done, result = std::move(result), took] { done(result, took); });
    if (committed) remove_old(*store, request);  // after the answer: ranks wait for that
  });
}

void CheckpointThreads::find(FindCheckpoint request, std::function<void(CheckpointFound)> done) {
  const JobId job = request.job;
  enqueue(job, [this, request = std::move(request), done = std::move(done)] {
    reconcile_once(request.job, request.directory);
    loop_.post([done, found = find_now(request)] { done(found); });
  });
}

void CheckpointThreads::prepare(JobId job, Path directory, std::function<void(Status)> done) {
  if (!preparing_.insert(job).second) return;
  enqueue(job, [this, job, directory = std::move(directory), done = std::move(done)] {
    loop_.post([this, job, done, made = create_directories_durably(directory)] {
      preparing_.erase(job);
      done(made);
    });
  });
}

void CheckpointThreads::remove(RemoveCheckpoints request, std::function<void(Status)> done) {
  const JobId job = request.job;
  enqueue(job, [this, job, request = std::move(request), done = std::move(done)] {
    Status removed = remove_now(request);
    if (removed.ok()) {
      const Status forgotten = index_->forget_job(job);
      if (!forgotten.ok()) log_warning("checkpoint index: {}", forgotten.message());
    }
    loop_.post([done, removed = std::move(removed)] { done(removed); });
  });
}

void CheckpointThreads::list(JobId job, Path directory,
                             std::function<void(Result<std::vector<ListedCheckpoint>>)> done) {
  if (lists_waiting_ >= kListsMax) {
    return done(resource_exhausted("too many listings of checkpoints are under way; try again"));
  }
  ++lists_waiting_;
  enqueue(job, [this, job, directory = std::move(directory), done = std::move(done)] {
    loop_.post([this, done, listed = list_now(directory, job)] {
      --lists_waiting_;
      done(listed);
    });
  });
}

}  // namespace penstock
