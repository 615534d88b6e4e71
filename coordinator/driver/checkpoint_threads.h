// The coordinator's work on checkpoint directories, off the loop: disks are slow, and a network
// file system may hang for hours. Each job with work has a thread of its own while it lasts, so
// that a directory that hangs holds up nothing but its job. Results come back on the loop; those of
// one job in the order of its requests.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "checkpoint/index.h"
#include "checkpoint/pace.h"
#include "comm/control/event_loop.h"
#include "coordinator/core/effects.h"
#include "coordinator/http/api.h"

namespace penstock {

// Loop thread only, but where it says otherwise.
class CheckpointThreads {
 public:
  // Borrows `loop`, which must outlive this. The index is opened (or made) at `index_path`.
  static Result<std::unique_ptr<CheckpointThreads>> start(EventLoop& loop, const Path& index_path);
  CheckpointThreads(EventLoop& loop, std::unique_ptr<CheckpointIndex> index);  // for start()
  ~CheckpointThreads();  // waits for the tasks in progress, drops the rest
  static constexpr int kListsMax = 8;
  CheckpointThreads(const CheckpointThreads&) = delete;
  CheckpointThreads& operator=(const CheckpointThreads&) = delete;

  // `done` runs on the loop.
  void commit(CommitCheckpoint request, std::function<void(CheckpointDone, Duration)> done);
  void find(FindCheckpoint request, std::function<void(CheckpointFound)> done);
  // Makes the directory and its parents. Does nothing while an earlier prepare() of the job is
  // under way.
  void prepare(JobId job, Path directory, std::function<void(Status)> done);
  // Removes all that the job saved, and the directory where nothing else is in it.
  // kFailedPrecondition where a checkpoint was committed and no store is there.
  void remove(RemoveCheckpoints request, std::function<void(Status)> done);
  // kResourceExhausted, at once, while kListsMax others are waiting: clients that come and go must
  // not hold up commits.
  void list(JobId job, Path directory,
            std::function<void(Result<std::vector<ListedCheckpoint>>)> done);

  // Drops what has not begun and waits for the rest, at most `limit`; nothing may be asked for
  // afterwards. The jobs whose directories have not answered by then: until they do, the destructor
  // would wait. Whatever they are in the middle of is safe to abandon with the process
  // (docs/checkpoint-format.md). Not while the loop runs.
  std::vector<JobId> finish(Duration limit);

 private:
  class Lane;
  void enqueue(JobId job, std::function<void()> task);
  void finished(JobId job);
  void reconcile_once(JobId job, const Path& directory);

  EventLoop& loop_;
  const std::unique_ptr<CheckpointIndex> index_;  // any thread
  Pace pace_{0};                                  // any thread; stopped by finish()
  int lists_waiting_ = 0;
  std::set<JobId> preparing_;
  std::mutex mutex_;
  std::set<JobId> reconciled_;                    // guarded by mutex_
  std::map<JobId, std::unique_ptr<Lane>> lanes_;  // last: their threads use all of the above
};

}  // namespace penstock
