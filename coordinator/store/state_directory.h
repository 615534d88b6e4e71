// A coordinator's state directory, and who may write to it: one process.
#pragma once

#include "comm/base/file.h"

namespace penstock {

// Where in it the records are.
inline constexpr const char* kRecordsFolder = "state";

// Makes the directory if need be, and holds it until the descriptor is closed. kAlreadyExists names
// who has it.
Result<FileDescriptor> lock_state_directory(const Path& directory);

}  // namespace penstock
