// Where a daemon takes in copies of the state of other hosts' ranks, and hands out those it keeps
// (comm/control/state_stream.h). Who calls must have this daemon's key, which only the coordinator
// passes on; a copy is taken in only of a rank, attempt and step that the coordinator named.
#pragma once

#include <atomic>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>

#include "comm/control/state_stream.h"
#include "worker/agent/state_copies.h"

namespace penstock {

// Thread-safe. A thread waits for connections, and one more serves each.
class StateServer {
 public:
  // More connections than this are closed again.
  static constexpr size_t kCallersMax = 64;

  // Listens on the address of this host from which `coordinator` ("tcp://host:port") is reached.
  // May wait for a name server.
  static Result<std::unique_ptr<StateServer>> start(const std::string& coordinator,
                                                    StateCopies& copies);
  ~StateServer();  // ends every connection
  StateServer(const StateServer&) = delete;
  StateServer& operator=(const StateServer&) = delete;

  const std::string& address() const { return address_; }  // "host:port"
  const Digest& key() const { return key_; }

  // From now on copies of that step are taken in, and of no other of the job.
  void expect(JobId job, Epoch epoch, int64_t step, const std::vector<Rank>& ranks);
  void fence(JobId job, Epoch epoch);

 private:
  struct Caller {
    explicit Caller(FileDescriptor socket) : connection(std::move(socket)) {}
    StateConnection connection;
    std::atomic<bool> served = false;
    std::thread thread;
  };
  struct Expected {
    Epoch epoch;
    int64_t step = 0;
    std::set<Rank> ranks;
  };

  StateServer(std::string address, FileDescriptor port, StateCopies& copies);
  void run();
  void drop_served();
  Status take_caller();
  void serve(StateConnection& caller);
  void take(StateConnection& caller, const StreamRequest& request);
  void give(StateConnection& caller, const StreamRequest& request);
  bool is_expected(const StreamRequest& request) const;

  const std::string address_;
  const Digest key_;
  const FileDescriptor port_;
  StateCopies& copies_;
  std::atomic<bool> ending_ = false;
  mutable std::mutex mutex_;
  std::map<JobId, Expected> expected_;  // guarded by mutex_
  std::list<Caller> callers_;           // of the thread
  std::thread thread_;
};

}  // namespace penstock
