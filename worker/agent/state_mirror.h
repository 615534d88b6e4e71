// Copies of this host's ranks' state in the memory of other hosts' daemons, and of theirs here, so
// that the loss of a host costs a few steps and not all those since the newest checkpoint.
//
// The coordinator names one step at a time, and who keeps whose copy (MirrorRanks). When a rank has
// finished that step its state is copied out of the memory that it trains in, without a word to the
// rank, which overwrites it two or three steps later. Then the copy is sent, at a bounded rate, and
// it stays here, too: after a failure all ranks go back to one step. When each rank's copy is here
// and there the coordinator hears so (RanksMirrored), and names another step; with it it says which
// copies stay.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "comm/control/message.h"
#include "worker/agent/state_copies.h"
#include "worker/agent/state_server.h"

namespace penstock {

// Thread-safe: called by the daemon's loop, and never waits for copying or sending. Of its own
// threads one copies, one sends, and others serve (StateServer).
class StateMirror {
 public:
  // Called on threads of this object.
  using OnDone = std::function<void(const RanksMirrored&)>;

  // `bytes_max`: of all copies here.
  StateMirror(uint64_t bytes_max, OnDone on_done);
  ~StateMirror();
  StateMirror(const StateMirror&) = delete;
  StateMirror& operator=(const StateMirror&) = delete;

  // Once, before the first order: listens, as StateServer::start(). Without it nothing is kept for
  // others.
  Status listen(const std::string& coordinator);
  std::string address() const { return server_ ? server_->address() : ""; }
  Digest key() const { return server_ ? server_->key() : Digest(); }

  // `memory` of those of this worker's ranks that have any (StateHolders). Repeated for a step that
  // is done, it is said again that it is. One that knows of an earlier step or kept step than an
  // order before it is answered with those.
  void order(const MirrorRanks& order, std::map<Rank, FileDescriptor> memory);
  void progressed(const RankProgress& progress);

  // Every copy of that attempt, of own ranks and others'.
  std::vector<HeldRank> copies(JobId job, Epoch epoch) const { return copies_.list(job, epoch); }
  // That rank of this worker may have written anything to its memory.
  void distrust(JobId job, Rank rank);
  // Attempts up to this one are over: copies() of them do not change any more, and those of lower
  // ones, which nobody goes back to, go.
  void fence(JobId job, Epoch epoch);
  void drop_before(JobId job, Epoch epoch) { copies_.drop_before(job, epoch); }

  uint64_t byte_count() const { return copies_.byte_count(); }
  uint64_t bytes_sent() const { return bytes_sent_; }
  uint64_t copies_missed() const { return copies_missed_; }

 private:
  enum class Progress : uint8_t { kTraining, kCopied, kSent };
  struct Source {
    std::shared_ptr<const FileDescriptor> memory;
    Progress progress = Progress::kTraining;
  };
  struct Round {
    MirrorRanks order;
    std::map<Rank, Source> sources;
    std::optional<RanksMirrored> outcome;
  };
  // One copy that is to be taken or sent.
  struct Task {
    JobId job;
    Epoch epoch;
    int64_t step = 0;
    MirrorTarget target;
    int64_t bytes_per_second = 0;
    std::shared_ptr<const FileDescriptor> memory;
    std::shared_ptr<const StateCopy> copy;
  };

  void copy_all();
  void send_all();
  std::vector<Task> tasks_to_copy() const;
  void copy(Task task);
  Status send(const Task& task);
  Status send_once(const Task& task);
  Status send_over(StateConnection& buddy, const Task& task);
  Status pace(const Task& task, size_t byte_count);
  Status pause(const Task& task, Duration span);
  bool is_current(const Task& task) const;
  void sent(const Task& task);
  void fail(const Task& task, const Status& why);

  const OnDone on_done_;
  StateCopies copies_;
  std::unique_ptr<StateServer> server_;
  std::atomic<uint64_t> bytes_sent_ = 0;
  std::atomic<uint64_t> copies_missed_ = 0;

  mutable std::mutex mutex_;
  std::condition_variable wake_copier_;
  std::condition_variable wake_sender_;
  std::map<JobId, Round> rounds_;  // guarded by mutex_, as are
  std::deque<Task> to_send_;
  bool copies_due_ = false;
  bool ending_ = false;
  const StateConnection* sending_ = nullptr;

  int64_t last_block_ns_ = 0;    // of the sender: when one was due, and
  size_t last_block_bytes_ = 0;  //   its size
  std::thread copier_;
  std::thread sender_;
};

}  // namespace penstock
