#include "worker/engine/flight_recorder.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <cerrno>
#include <new>

#include "comm/base/clock.h"

namespace penstock {

FlightRecorder::~FlightRecorder() {
  if (mapping_ != nullptr) ::munmap(mapping_, sizeof(FlightFile));
}

Status FlightRecorder::keep_in(const Path& path, JobId job, Epoch epoch, Rank rank) {
  PENSTOCK_TRY_ASSIGN(const FileDescriptor file, open_file(path, O_RDWR | O_CREAT | O_TRUNC));
  // Its block now: a disk that is full later must not end the rank.
  if (const int error = ::posix_fallocate(file.get(), 0, sizeof(FlightFile)); error != 0) {
    return errno_status(error, "allocate " + path.string());
  }
  void* const mapping =
      ::mmap(nullptr, sizeof(FlightFile), PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
  if (mapping == MAP_FAILED) return errno_status(errno, "map " + path.string());
  mapping_ = mapping;
  own_file_.job = job.value;
  own_file_.epoch = epoch.value;
  own_file_.rank = rank.value;
  file_ = new (mapping) FlightFile(own_file_);
  begin_phase(state_.phase, state_.step);
  return {};
}

void FlightRecorder::begin_phase(FlightPhase phase, int64_t step) {
  state_ = {.phase = phase, .step = step, .changes = state_.changes};
  publish(monotonic_ns());
}

}  // namespace penstock
