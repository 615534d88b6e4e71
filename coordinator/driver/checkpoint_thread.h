// The coordinator's work on checkpoint directories, on a thread of its own: disks are slow, and the
// loop must not wait for them. Results come back on the loop, in the order of the requests.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <set>
#include <thread>

#include "checkpoint/index.h"
#include "comm/control/event_loop.h"
#include "coordinator/core/effects.h"
#include "coordinator/http/api.h"

namespace penstock {

class CheckpointThread {
 public:
  // Borrows `loop`, which must outlive this. The index is opened (or made) at `index_path`.
  static Result<std::unique_ptr<CheckpointThread>> start(EventLoop& loop, const Path& index_path);
  explicit CheckpointThread(EventLoop& loop, std::unique_ptr<CheckpointIndex> index);
  ~CheckpointThread();  // finishes the task in progress, drops the rest
  static constexpr int kListsMax = 8;
  CheckpointThread(const CheckpointThread&) = delete;
  CheckpointThread& operator=(const CheckpointThread&) = delete;

  // Loop thread. `done` runs there.
  void commit(CommitCheckpoint request, std::function<void(CheckpointDone, Duration)> done);
  void find(FindCheckpoint request, std::function<void(CheckpointFound)> done);
  // kResourceExhausted, at once, while kListsMax others are waiting: clients that come and go must
  // not hold up commits.
  void list(JobId job, Path directory,
            std::function<void(Result<std::vector<ListedCheckpoint>>)> done);

 private:
  void enqueue(std::function<void()> task);
  void run();
  void reconcile_once(JobId job, const Path& directory);

  EventLoop& loop_;
  const std::unique_ptr<CheckpointIndex> index_;
  std::set<JobId> reconciled_;  // the thread's own
  int lists_waiting_ = 0;       // loop thread only
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;  // guarded by mutex_
  bool stopping_ = false;                    // guarded by mutex_
  std::thread thread_;                       // last: it uses all of the above
};

}  // namespace penstock
