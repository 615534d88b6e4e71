#include "worker/engine/recorder.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <new>

#include "comm/base/check.h"

namespace penstock {
namespace {

// A pass: itself, its sub-operations, of which four in a layer of both halves start an exchange,
// and four more at its ends.
size_t records_of(Op op, int64_t layers_max) {
  const auto layers = static_cast<size_t>(layers_max);
  switch (op) {
    case Op::kForward:
      return 1 + 6 * layers + 4;
    case Op::kBackward:
    case Op::kBackwardInput:
      return 1 + 8 * layers + 4;
    case Op::kBackwardWeight:
      return 1 + 2 * layers + 4;
    case Op::kOverlapped:
      return 1 + 14 * layers + 8;
    case Op::kReceiveForward:
    case Op::kSendForward:
    case Op::kReceiveBackward:
    case Op::kSendBackward:
      return 1;
    case Op::kReduceGradients:
    case Op::kOptimizerStep:
      return 8;  // itself, and the collectives of two stages
  }
  return 1;
}

}  // namespace

Recorder::Recorder(size_t capacity, FlightRecorder* flight)
    : flight_(flight != nullptr ? *flight : own_flight_),
      own_ring_(std::clamp(capacity, kRecordsMin, kRecordsMax)),
      ring_(own_ring_.data()) {
  own_header_ = {.magic = kTraceMagic,
                 .version = kTraceVersion,
                 .record_bytes = sizeof(TraceRecord),
                 .capacity = own_ring_.size()};
}

Recorder::~Recorder() {
  if (mapping_ != nullptr) ::munmap(mapping_, mapping_bytes_);
}

Status Recorder::keep_in(const Path& path, JobId job, Epoch epoch, Rank rank) {
  PENSTOCK_CHECK(header_->added == 0 && mapping_ == nullptr, header_->added);
  PENSTOCK_TRY_ASSIGN(const FileDescriptor file, open_file(path, O_RDWR | O_CREAT | O_TRUNC));
  const size_t bytes = kTraceRecordsOffset + own_ring_.size() * sizeof(TraceRecord);
  // Every block now: a disk that is full later must not end the rank.
  if (const int error = ::posix_fallocate(file.get(), 0, static_cast<off_t>(bytes)); error != 0) {
    return errno_status(error, "allocate " + path.string());
  }
  void* const mapping = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
  if (mapping == MAP_FAILED) return errno_status(errno, "map " + path.string());
  mapping_ = mapping;
  mapping_bytes_ = bytes;
  own_header_.job = job.value;
  own_header_.epoch = epoch.value;
  own_header_.rank = rank.value;
  header_ = new (mapping) TraceFileHeader(own_header_);
  ring_ = reinterpret_cast<TraceRecord*>(static_cast<std::byte*>(mapping) + kTraceRecordsOffset);
  own_ring_ = {};
  return {};
}

void Recorder::set_clock(int64_t offset_ns, int64_t uncertainty_ns) {
  header_->clock_offset_ns = offset_ns;
  header_->clock_uncertainty_ns = uncertainty_ns;
}

std::vector<TraceRecord> Recorder::records() const {
  const uint64_t added = header_->added;
  const uint64_t kept = std::min(added, header_->capacity);
  std::vector<TraceRecord> records;
  records.reserve(kept);
  for (uint64_t i = added - kept; i < added; ++i) records.push_back(ring_[i % header_->capacity]);
  return records;
}

TraceSteps Recorder::steps() const {
  return whole_steps(records(), header_->added <= header_->capacity);
}

size_t records_per_step(const Program& program, int64_t layers_max) {
  const auto records = [&](const std::vector<Instruction>& training) {
    size_t count = 1;
    for (const Instruction& instruction : training) count += records_of(instruction.op, layers_max);
    return count;
  };
  size_t most = records(program.training);
  for (const ResizedTraining& resized : program.resized) {
    most = std::max(most, records(resized.training));
  }
  return most;
}

}  // namespace penstock
