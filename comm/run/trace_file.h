// The trace of one rank as a file: the ring of records that the rank writes through shared memory
// while it trains (worker/engine/recorder.h), and the same form as a daemon serves it. Readable at
// any time, also after the rank died, without a word from it.
//
//   offset 0    TraceFileHeader
//   offset 128  records; record i of `added` is at place i modulo `capacity`
//
// Integers are little-endian. The writer fills a record before it counts it.
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "comm/base/bytes.h"
#include "comm/base/ids.h"
#include "comm/base/status.h"
#include "comm/run/trace_record.h"

namespace penstock {

static_assert(std::endian::native == std::endian::little);

struct TraceFileHeader {
  uint64_t magic = 0;
  uint32_t version = 0;
  uint32_t record_bytes = 0;
  uint64_t capacity = 0;  // records
  uint64_t added = 0;     // records written since the rank began
  uint64_t job = 0;
  uint64_t epoch = 0;
  int32_t rank = 0;
  int32_t reserved = 0;
  // To be added to this rank's times to get those of rank 0's clock, and how far that may be off.
  int64_t clock_offset_ns = 0;
  int64_t clock_uncertainty_ns = 0;
};
inline constexpr uint64_t kTraceMagic = 0x31454341'52545350;  // "PSTRACE1"
inline constexpr uint32_t kTraceVersion = 1;
inline constexpr size_t kTraceRecordsOffset = 128;
inline constexpr size_t kTraceRecordsMax = size_t{1} << 18;  // 16 MiB
static_assert(sizeof(TraceFileHeader) <= kTraceRecordsOffset);

// Steps [first, last]; none when first > last.
struct TraceSteps {
  int32_t first = 1;
  int32_t last = 0;
  bool empty() const { return first > last; }
  bool operator==(const TraceSteps&) const = default;
};

// Whole steps of one rank.
struct Trace {
  JobId job = {};
  Epoch epoch = {};
  Rank rank = {};
  int64_t clock_offset_ns = 0;
  int64_t clock_uncertainty_ns = 0;
  TraceSteps steps = {};
  std::vector<TraceRecord> records = {};  // of those steps, in the order they were added
};

// The newest run of steps of which every record is in `records`, which are in the order they were
// added. `from_start`: nothing was added before them.
TraceSteps whole_steps(std::span<const TraceRecord> records, bool from_start);

// The whole steps in the bytes of a file that its rank may have written to while they were read,
// from the first byte to the last: `added_after` is what the header said when the last was read.
// kDataLoss when it is no trace.
Result<Trace> decode_trace(Bytes file, uint64_t added_after);
// The same when nobody wrote.
Result<Trace> decode_trace(Bytes file);
// `added` of a header; 0 when it is none.
uint64_t trace_records_added(Bytes header);

// A file of the trace cut to `steps`.
std::string encode_trace(const Trace& trace, TraceSteps steps);

}  // namespace penstock
