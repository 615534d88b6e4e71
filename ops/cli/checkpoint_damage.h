// Damages a checkpoint on purpose, as a disk does that changed a byte.
#pragma once

#include <cstdint>
#include <string>

#include "comm/base/file.h"
#include "comm/base/ids.h"
#include "comm/base/status.h"

namespace penstock {

struct FlippedByte {
  std::string file;  // absolute
  uint64_t offset = 0;
  std::string tensor;
  int64_t step = 0;  // of the checkpoint
};

// Inverts one byte in the middle of the largest piece that `rank` saved of the newest checkpoint in
// `directory`. Only reading the piece finds it. kFailedPrecondition when no other checkpoint is
// there to go on from, or the rank saved nothing.
Result<FlippedByte> flip_byte(const Path& directory, JobId job, Rank rank);

}  // namespace penstock
