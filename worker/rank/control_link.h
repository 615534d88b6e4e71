// The rank's side of the conversation with its daemon (worker/agent/agent.h has the protocol), on a
// thread of its own, so that messages are handled while the compute thread is busy.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "comm/base/clock.h"
#include "comm/base/status.h"
#include "comm/control/channel.h"
#include "comm/control/event_loop.h"
#include "comm/control/lease_file.h"
#include "comm/control/message.h"

namespace penstock {

// Every public function may be called from any thread.
class ControlLink {
 public:
  // Connects to the daemon at `endpoint` and says hello; also takes over SIGTERM and SIGINT of the
  // process, and ends it with kUnreachable when the lease kept in `lease_file`, if any, is over.
  // kInvalidArgument when `endpoint` is none. Returns at once.
  static Result<std::unique_ptr<ControlLink>> open(const std::string& endpoint,
                                                   const RankHello& hello,
                                                   const Path& lease_file = {});
  // Sends what is queued (for at most kLingerMs) and ends the thread.
  ~ControlLink();
  ControlLink(const ControlLink&) = delete;
  ControlLink& operator=(const ControlLink&) = delete;

  // Each waits for its message. kDeadlineExceeded after `timeout`, kAborted when the rank is asked
  // to stop first.
  Result<StartRank> wait_start(Duration timeout);
  Result<BeginTraining> wait_begin();
  // Ok when the coordinator committed the checkpoint of `step`; kFailedPrecondition, with its
  // reason, when not.
  Status wait_outcome(int64_t step);

  // Until stop_requested().
  void wait_stop();

  // The newest step whose checkpoint is committed or given up; -1: none.
  int64_t newest_outcome() const;

  // The newest SaveInterval; none before the first.
  std::optional<int64_t> save_interval() const;

  // PauseRanks arrived since the last forget_pause().
  bool pause_requested() const;
  void forget_pause();

  void send(ControlMessage message);

  // SIGTERM, SIGINT or StopRanks arrived. Never false again once true.
  bool stop_requested() const;

 private:
  explicit ControlLink(const RankHello& hello) : hello_(hello) {}
  Status start(const std::string& endpoint, const Path& lease_file);
  void keep_to_lease() const;
  void on_message(ControlMessage message);
  bool is_mine(JobId job, Epoch epoch) const { return job == hello_.job && epoch == hello_.epoch; }
  void request_stop();
  // Waits until `there()` or a stop; kAborted for the latter.
  template <typename Condition>
  Status wait_until(std::unique_lock<std::mutex>& lock, const Condition& there);

  const RankHello hello_;
  std::optional<LeaseFile> lease_;
  EventLoop loop_;
  std::unique_ptr<DealerChannel> channel_;  // loop thread only, once it runs

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  bool stop_requested_ = false;
  bool pause_requested_ = false;
  std::optional<StartRank> start_;
  std::optional<BeginTraining> begin_;
  std::optional<int64_t> save_interval_;
  std::map<int64_t, CheckpointOutcome> outcomes_;  // by step

  std::thread thread_;
};

}  // namespace penstock
