// The daemon's side of a rank's conversation, for tests: spawns real penstock-rank processes,
// answers them as penstock-worker does, commits their checkpoints, and keeps every message.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "checkpoint/store.h"
#include "comm/control/channel.h"
#include "comm/control/event_loop.h"
#include "comm/control/process.h"
#include "comm/run/job_spec.h"

namespace penstock {

struct FakeDaemonOptions {
  JobSpec spec;
  std::vector<Program> programs;  // by pipeline index
  Path directory;                 // for the endpoint
  Path checkpoint_dir;
  std::string restore_manifest;
  int64_t restore_step = 0;
  StatePlace state_from = {};  // where ranks fetch the state of that step; no address: nowhere
  int64_t save_interval = 0;
  std::string state_file;                // --state-file of every rank; empty: none
  std::optional<std::string> spec_json;  // instead of the spec's own
  int64_t first_answered_step = 0;       // saves of steps below are not answered
  bool begin = true;                     // send BeginTraining when every rank is ready
  std::function<void()> before_begin = {};
};

struct RankExit {
  ExitStatus status;
  std::string last_words;  // as worker daemons find them
};

// Thread-safe but for the constructor.
class FakeDaemon {
 public:
  explicit FakeDaemon(FakeDaemonOptions options);
  ~FakeDaemon();

  void spawn_all();
  ChildProcess& child(int32_t rank);
  void send_to(int32_t rank, const ControlMessage& message);
  // Blocks until a message satisfies `wanted`, or fails the test after 60 s.
  bool wait_for(const std::function<bool(const ControlMessage&)>& wanted);
  // Blocks until the process ends.
  RankExit wait_exit(int32_t rank);
  std::vector<ControlMessage> messages() const;

  template <typename Message>
  std::vector<Message> all() const {
    std::vector<Message> found;
    for (const ControlMessage& message : messages()) {
      if (const auto* one = std::get_if<Message>(&message)) found.push_back(*one);
    }
    return found;
  }

  static constexpr JobId kJob{5};
  static constexpr Epoch kEpoch{3};

 private:
  void on_message(const PeerId& peer, ControlMessage message);
  void on_ready(const RankReady& ready);
  void on_saved(int64_t step, std::optional<CommitSegment> segment, const std::string& reason);
  void send_all(const ControlMessage& message);

  const FakeDaemonOptions options_;
  const int32_t world_size_;
  EventLoop loop_;
  std::unique_ptr<RouterChannel> channel_;                  // loop thread
  std::map<int32_t, PeerId> peers_;                         // loop thread
  std::map<int32_t, std::string> addresses_;                // loop thread
  std::map<int64_t, std::vector<CommitSegment>> segments_;  // loop thread; by step
  std::map<int64_t, int32_t> reported_;                     // loop thread; by step
  std::optional<CheckpointStore> store_;                    // loop thread
  std::vector<FileDescriptor> outputs_;                     // by rank; the test's thread
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<ControlMessage> messages_;                 // guarded by mutex_
  std::vector<std::unique_ptr<ChildProcess>> children_;  // guarded by mutex_; by rank
  std::thread thread_;
};

}  // namespace penstock
