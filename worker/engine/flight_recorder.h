// A rank's flight record (comm/run/flight_record.h): what its compute thread does now. Always on; a
// change is a handful of stores into two cache lines, with the times that tracing takes anyway.
//
// Single-threaded: the rank's compute thread writes.
#pragma once

#include <atomic>
#include <cstdint>

#include "comm/base/file.h"
#include "comm/base/ids.h"
#include "comm/base/status.h"
#include "comm/run/flight_record.h"

namespace penstock {

class FlightRecorder {
 public:
  FlightRecorder() = default;
  ~FlightRecorder();
  FlightRecorder(const FlightRecorder&) = delete;
  FlightRecorder& operator=(const FlightRecorder&) = delete;

  // From now on the record is the file `path`, made anew. An error (no such folder, disk full)
  // leaves it in memory.
  Status keep_in(const Path& path, JobId job, Epoch epoch, Rank rank);

  void begin_phase(FlightPhase phase, int64_t step);
  // What `operation` names is begun, at its begin_ns.
  void begin(const TraceRecord& operation) { begin_at(operation, operation.begin_ns); }
  void begin_at(const TraceRecord& operation, int64_t now_ns) {
    state_.kind = operation.kind;
    state_.what = operation.what;
    state_.direction = operation.direction;
    state_.microbatch = operation.microbatch;
    state_.layer = operation.layer;
    state_.peer = -1;
    publish(now_ns);
  }
  // The operation waits for a message of `peer`, or (sending) for `peer` to take one.
  void begin_wait(int32_t peer, bool sending, int64_t now_ns) {
    state_.peer = peer;
    state_.sending = sending;
    publish(now_ns);
  }
  void end_wait(int64_t now_ns) {
    state_.peer = -1;
    state_.sending = false;
    publish(now_ns);
  }

  const FlightState& state() const { return state_; }

 private:
  void publish(int64_t now_ns) {
    const FlightFile::Slot packed = pack_flight(state_, now_ns);
    FlightFile::Slot& slot = file_->slots[++state_.changes % 2];
    // Released one by one: who sees one of these sees the count from before it, too. On the hosts
    // we run on that is a plain store.
    for (size_t i = 0; i < packed.size(); ++i) {
      std::atomic_ref(slot[i]).store(packed[i], std::memory_order_release);
    }
    std::atomic_ref(file_->count).store(state_.changes, std::memory_order_release);
  }

  FlightFile own_file_;
  FlightFile* file_ = &own_file_;
  void* mapping_ = nullptr;  // of the file, once there is one
  FlightState state_;
};

}  // namespace penstock
