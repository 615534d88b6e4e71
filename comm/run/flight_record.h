// What a rank does now: a block of two cache lines that its compute thread writes through shared
// memory with plain stores (worker/engine/flight_recorder.h), and that anybody on its host can read
// at any time (comm/control/flight_reader.h): while it runs, waits for ever or is stopped, and
// after it died, without a word from it. The trace (comm/run/trace_file.h) says what it did before.
//
// It is a file of its own, not a part of the trace's: it exists before the rank has its order, when
// nobody knows yet how large its trace will be, and is read without those megabytes.
//
// Integers are little-endian. The newest state is slots[count % 2]; the writer fills the other slot
// and then counts. So it is whole wherever the writer was stopped or died, and what was read is
// whole when the count was the same before and after.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "comm/base/ids.h"
#include "comm/base/status.h"
#include "comm/run/trace_record.h"

namespace penstock {

// What the kernel says a process does.
enum class ProcessState : uint8_t {
  kUnknown,  // there is none, or the kernel does not say
  kRunning,
  kSleeping,
  kDiskSleep,  // in the kernel, and cannot be interrupted: storage or a network file system
  kStopped,    // by SIGSTOP or a debugger
  kEnded,      // but not reaped
};
inline constexpr int kProcessStateCount = 6;

enum class FlightPhase : uint8_t {
  kStarting,    // its order has not come
  kLoading,     // data, memory, state
  kReady,       // waits for the coordinator's word to begin
  kConnecting,  // to its peers
  kTraining,
  kEvaluating,
  kSaving,      // waits for the save before it
  kCommitting,  // waits for the coordinator's word about the last checkpoint
  kFinishing,   // tells its peers that it needs them no more
};
inline constexpr int kFlightPhaseCount = 9;

struct FlightState {
  FlightPhase phase = FlightPhase::kStarting;
  int64_t step = 0;  // under way; in other phases than training: the last one trained
  // The operation that was begun last, as in TraceRecord; kStep: none of this phase yet.
  TraceKind kind = TraceKind::kStep;
  uint8_t what = 0;
  uint8_t direction = 0;
  int32_t microbatch = -1;
  int16_t layer = -1;
  int32_t peer = -1;     // the rank it waits for inside the operation; -1: it does not wait
  bool sending = false;  // and that rank is to take what it sends, not to send
  uint64_t changes = 0;  // of this record since the rank began
  bool operator==(const FlightState&) const = default;
};

struct FlightRecord {
  JobId job;
  Epoch epoch;
  Rank rank;
  int64_t since_ns = 0;  // of the newest change; the host's monotonic clock
  FlightState state;
};

inline constexpr uint64_t kFlightMagic = 0x31544847'494c4650;  // "PFLIGHT1"
inline constexpr uint32_t kFlightVersion = 1;

struct alignas(64) FlightFile {
  uint64_t magic = kFlightMagic;
  uint32_t version = kFlightVersion;
  int32_t rank = 0;
  uint64_t job = 0;
  uint64_t epoch = 0;
  uint64_t count = 0;  // changes
  std::array<uint64_t, 3> reserved = {};
  using Slot = std::array<uint64_t, 4>;
  std::array<Slot, 2> slots = {};
};
static_assert(sizeof(FlightFile) == 128);

FlightFile::Slot pack_flight(const FlightState& state, int64_t since_ns);

// Of a file that nobody wrote to while it was read. kDataLoss when it is none, or none of this
// version.
Result<FlightRecord> decode_flight_record(const FlightFile& file);

// "in combine(F) of layer 2, micro-batch 5, step 37, waiting for a message of rank 3"; "loading".
std::string to_sentence(const FlightState& state);

}  // namespace penstock
