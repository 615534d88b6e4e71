// The worker daemon's side of pulses (pulse.h) and its lease, on a thread that does nothing else:
// it allocates nothing, writes no file and waits for no lock that is held for long, so that neither
// a disk nor whatever keeps the daemon's loop busy makes it late.
//
// The lease is how long the daemon's ranks may run without the coordinator knowing of it. It counts
// from when something was sent that the coordinator has heard, which is never later than when that
// was heard; so it is over here before the coordinator takes it for over. It goes on, too, while
// nobody can take its ranks' place:
//
//   the coordinator's host refuses connections   there is no coordinator
//   it accepts one, and nobody says a word       the coordinator is stopped; it will count anew
//
// while a host that does not answer at all may be one that cannot be reached.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "comm/base/clock.h"
#include "comm/base/file.h"
#include "comm/base/status.h"
#include "comm/control/lease_file.h"
#include "comm/control/pulse.h"

namespace penstock {

// Every public function may be called from any thread.
class PulseThread {
 public:
  // `coordinator`: the control endpoint. To any but "tcp://host:port" it sends nothing.
  // `lease` is what the ranks read; endless until a coordinator has set one.
  static Result<std::unique_ptr<PulseThread>> start(std::string coordinator, uint64_t incarnation,
                                                    LeaseFile lease);
  ~PulseThread();
  PulseThread(const PulseThread&) = delete;
  PulseThread& operator=(const PulseThread&) = delete;

  struct Registration {
    WorkerId worker;
    Duration heartbeat_interval;
    Duration lease = Duration(0);  // 0: endless
    int64_t asked_ns = 0;          // when the coordinator was asked
  };
  // From now on it pulses as that worker, kPulsesPerBeat times a heartbeat.
  void registered(const Registration& registration);
  // The coordinator has heard what was sent to it then, by another way than this.
  void heard(int64_t sent_ns);
  const LeaseFile& lease() const { return *lease_file_; }
  // Neither sends nor hears anything meanwhile: of a partition for tests.
  void cut_off(bool is_cut_off);
  // The daemon's loop went round. A daemon that has done nothing for kLoopHungMax is as good as
  // dead, and must not look alive.
  void loop_turned() { loop_turned_ns_.store(monotonic_ns(), std::memory_order_relaxed); }
  static constexpr Duration kLoopHungMax = std::chrono::seconds(60);

  // The life port (lifelines.h), for ranks to hold; -1: there is none yet. It is there before the
  // coordinator can have heard of this daemon.
  int life_socket() const { return life_socket_.load(); }

  uint64_t answers() const { return answers_.load(std::memory_order_relaxed); }

 private:
  struct Terms {
    WorkerId worker;  // 0: not registered yet
    Duration interval = std::chrono::milliseconds(250);
    Duration lease = Duration(0);
    bool is_cut_off = false;
  };

  PulseThread(std::string coordinator, uint64_t incarnation, FileDescriptor wake)
      : coordinator_(std::move(coordinator)), incarnation_(incarnation), wake_(std::move(wake)) {}
  void run();
  void change(const Terms& terms);
  void wake() const;
  Terms terms() const;
  bool may_pulse(const Terms& terms, int64_t now_ns) const;
  void reach(int64_t now_ns);
  void send_pulse(const Terms& terms);
  void hear(const Terms& terms, int64_t now_ns);
  void take_calls();
  void extend(const Terms& terms, int64_t since_ns);
  void probe(const Terms& terms, int64_t now_ns);
  void look_at_probe(const Terms& terms, int64_t now_ns);

  const std::string coordinator_;
  const uint64_t incarnation_;
  const FileDescriptor wake_;            // an eventfd
  std::optional<LeaseFile> lease_file_;  // always, once started
  std::atomic<bool> ending_ = false;
  std::atomic<int64_t> loop_turned_ns_ = monotonic_ns();
  std::atomic<uint64_t> answers_ = 0;
  std::atomic<int> life_socket_ = -1;
  // The newest thing sent that the coordinator has heard.
  std::atomic<int64_t> heard_sent_ns_ = monotonic_ns();

  mutable std::mutex mutex_;
  Terms terms_;  // guarded by mutex_

  // Of the thread.
  SocketAddress coordinator_address_;
  FileDescriptor socket_;
  uint64_t sequence_ = 0;
  std::array<int64_t, 64> sent_ns_ = {};  // of the newest pulses, by sequence
  FileDescriptor probe_;                  // a connection that is to show what is there
  int64_t probe_begun_ns_ = 0;
  bool probe_stands_ = false;
  int64_t heard_ns_ = 0;  // or when the socket was made
  FileDescriptor life_port_;
  uint16_t life_port_number_ = 0;
  // Connections to it: the newest ones, since nobody says when he has no more use for his.
  std::array<FileDescriptor, 16> callers_;
  size_t next_caller_ = 0;

  std::thread thread_;
};

}  // namespace penstock
