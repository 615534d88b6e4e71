// A coordinator's state directory, and who may write to it: one process.
#pragma once

#include "comm/base/file.h"

namespace penstock {

// Where in it the records are.
inline constexpr const char* kRecordsFolder = "state";
// Where they are made from a backup, before they take that name.
inline constexpr const char* kRestoringFolder = "state.restoring";

// Makes the directory if need be, and holds it until the descriptor is closed. kAlreadyExists names
// who has it.
Result<FileDescriptor> lock_state_directory(const Path& directory);

}  // namespace penstock
