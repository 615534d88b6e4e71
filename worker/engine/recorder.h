// The trace of a rank's last steps: a ring of fixed-size records (comm/run/trace_record.h), always
// on. Taken up front; adding is a store, so the newest records are always there and the oldest go.
// Kept in a file (comm/run/trace_file.h) others can read it at any time, also after this rank died.
// Single-threaded: the rank's compute thread writes and, between steps, reads.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "comm/base/file.h"
#include "comm/base/ids.h"
#include "comm/run/program.h"
#include "comm/run/trace_file.h"
#include "comm/run/trace_record.h"
#include "worker/engine/flight_recorder.h"

namespace penstock {

class Recorder {
 public:
  static constexpr size_t kRecordsMin = size_t{1} << 10;
  static constexpr size_t kRecordsMax = kTraceRecordsMax;
  static constexpr size_t kStepsKept = 16;  // where kRecordsMax allows

  // `capacity` is brought between the bounds above. Borrows `flight`; null: it has one of its own.
  explicit Recorder(size_t capacity, FlightRecorder* flight = nullptr);
  ~Recorder();
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  // From now on the ring is the file `path`, made anew. Before the first record. An error (no such
  // folder, disk full) leaves it in memory.
  Status keep_in(const Path& path, JobId job, Epoch epoch, Rank rank);
  // As in TraceFileHeader.
  void set_clock(int64_t offset_ns, int64_t uncertainty_ns);

  // What is added from now on belongs to `step`; 0: it is not recorded (evaluations).
  void begin_step(int64_t step) { step_ = static_cast<int32_t>(step); }
  void add(TraceRecord record) {
    if (!enabled_ || step_ == 0) return;
    record.step = step_;
    ring_[header_->added % header_->capacity] = record;
    std::atomic_ref(header_->added).store(header_->added + 1, std::memory_order_release);
  }
  // What the rank does now; beside it, what it did.
  FlightRecorder& flight() { return flight_; }
  // For measuring what recording costs. On from the start.
  void set_enabled(bool enabled) { enabled_ = enabled; }

  // What is still there, in the order it was added.
  std::vector<TraceRecord> records() const;
  TraceSteps steps() const;  // of which every record is still there
  size_t capacity() const { return header_->capacity; }

 private:
  FlightRecorder own_flight_;
  FlightRecorder& flight_;
  TraceFileHeader own_header_;
  std::vector<TraceRecord> own_ring_;
  void* mapping_ = nullptr;  // of the file, once there is one
  size_t mapping_bytes_ = 0;
  TraceFileHeader* header_ = &own_header_;
  TraceRecord* ring_ = nullptr;
  int32_t step_ = 0;
  bool enabled_ = true;
};

// No training step of `program`, of whatever size, adds more, on stages of at most `layers_max`
// layers.
size_t records_per_step(const Program& program, int64_t layers_max);

}  // namespace penstock
