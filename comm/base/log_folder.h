// The bound of a folder in which a daemon keeps what ranks print: <root>/<job>/<log>, a folder per
// job.
#pragma once

#include <cstdint>

#include "comm/base/file.h"

namespace penstock {

// Disk space, not lengths: a log that gave back its older half keeps its length.
struct LogBounds {
  uint64_t file_bytes_max = 64 << 20;
  uint64_t job_bytes_max = 1 << 30;
  uint64_t total_bytes_max = uint64_t{8} << 30;
};
// Who writes logs applies the bounds at its first line and each time it has written this much more.
inline constexpr uint64_t kLogBytesPerCheck = 16 << 20;

// Gives space back until the bounds hold:
//   1. a log over file_bytes_max loses its older half;
//   2. of a job over job_bytes_max the longest logs lose their older half, one after the other;
//   3. over total_bytes_max the job that has been silent longest loses its folder, then the next;
//      never the one that wrote last.
// A half that goes becomes a hole in the file, so that positions in what stays do not change. May
// run beside writers and readers. A folder that does not exist is within its bounds.
Status bound_logs(const Path& root, const LogBounds& bounds = {});

}  // namespace penstock
