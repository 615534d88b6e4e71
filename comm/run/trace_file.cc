#include "comm/run/trace_file.h"

#include <algorithm>
#include <cstring>

namespace penstock {
namespace {

Result<TraceFileHeader> checked_header(Bytes file) {
  TraceFileHeader header;
  if (file.size() < kTraceRecordsOffset) return data_loss("a trace without a header");
  std::memcpy(&header, file.data(), sizeof(header));
  if (header.magic != kTraceMagic || header.version != kTraceVersion ||
      header.record_bytes != sizeof(TraceRecord) || header.capacity == 0 ||
      header.capacity > kTraceRecordsMax || header.rank < 0) {
    return data_loss("not a trace of this version");
  }
  if (file.size() != kTraceRecordsOffset + header.capacity * sizeof(TraceRecord)) {
    return data_loss(
        fmt::format("a trace of {} records in {} bytes", header.capacity, file.size()));
  }
  return header;
}

// Whether its numbers may index what they index.
bool is_sound(const TraceRecord& record) {
  return static_cast<int>(record.kind) < kTraceKindCount && record.step > 0 && record.end_ns >= 0 &&
         record.begin_ns >= 0 && record.wait_begin_ns >= 0 && record.wait_end_ns >= 0;
}

}  // namespace

TraceSteps whole_steps(std::span<const TraceRecord> records, bool from_start) {
  // A step's own record is its last: a step is whole when its predecessor's is there.
  TraceSteps steps;
  bool predecessor_there = from_start;
  for (const TraceRecord& record : records) {
    if (record.kind != TraceKind::kStep) continue;
    if (predecessor_there) {
      const bool follows = !steps.empty() && record.step - 1 == steps.last;
      if (!follows) steps.first = record.step;
      steps.last = record.step;
    }
    predecessor_there = true;
  }
  return steps;
}

uint64_t trace_records_added(Bytes header) {
  TraceFileHeader parsed;
  if (header.size() < sizeof(parsed)) return 0;
  std::memcpy(&parsed, header.data(), sizeof(parsed));
  return parsed.added;
}

Result<Trace> decode_trace(Bytes file) {
  return decode_trace(file, trace_records_added(file));
}

Result<Trace> decode_trace(Bytes file, uint64_t added_after) {
  PENSTOCK_TRY_ASSIGN(const TraceFileHeader header, checked_header(file));
  if (added_after < header.added) return data_loss("the trace was begun anew while it was read");
  // Good are those that were counted before the reading began and neither overwritten, nor being
  // overwritten, when it ended.
  const uint64_t first = added_after < header.capacity ? 0 : added_after - header.capacity + 1;
  std::vector<TraceRecord> records(first < header.added ? header.added - first : 0);
  for (size_t i = 0; i < records.size(); ++i) {
    const uint64_t place = (first + i) % header.capacity;
    std::memcpy(&records[i], file.data() + kTraceRecordsOffset + place * sizeof(TraceRecord),
                sizeof(TraceRecord));
  }
  if (!std::all_of(records.begin(), records.end(), is_sound)) {
    return data_loss(fmt::format("the trace of rank {} holds records that cannot be", header.rank));
  }
  Trace trace{.job = JobId{header.job},
              .epoch = Epoch{static_cast<uint32_t>(header.epoch)},
              .rank = Rank{header.rank},
              .clock_offset_ns = header.clock_offset_ns,
              .clock_uncertainty_ns = header.clock_uncertainty_ns,
              .steps = whole_steps(records, first == 0),
              .records = std::move(records)};
  std::erase_if(trace.records, [&](const TraceRecord& record) {
    return record.step < trace.steps.first || record.step > trace.steps.last;
  });
  return trace;
}

std::string encode_trace(const Trace& trace, TraceSteps steps) {
  std::vector<TraceRecord> records;
  for (const TraceRecord& record : trace.records) {
    if (record.step >= steps.first && record.step <= steps.last) records.push_back(record);
  }
  // One place more than records, as in a ring that is not full.
  const TraceFileHeader header{.magic = kTraceMagic,
                               .version = kTraceVersion,
                               .record_bytes = sizeof(TraceRecord),
                               .capacity = records.size() + 1,
                               .added = records.size(),
                               .job = trace.job.value,
                               .epoch = trace.epoch.value,
                               .rank = trace.rank.value,
                               .clock_offset_ns = trace.clock_offset_ns,
                               .clock_uncertainty_ns = trace.clock_uncertainty_ns};
  std::string bytes(kTraceRecordsOffset + header.capacity * sizeof(TraceRecord), '\0');
  std::memcpy(bytes.data(), &header, sizeof(header));
  if (!records.empty()) {
    std::memcpy(bytes.data() + kTraceRecordsOffset, records.data(),
                records.size() * sizeof(TraceRecord));
  }
  return bytes;
}

}  // namespace penstock
