// A folder of safetensors that `checkpoint export` wrote, as a checkpoint again.
#pragma once

#include <optional>

#include "checkpoint/store.h"

namespace penstock {

// Makes a store in `directory`, which is not there yet or empty, with one commit: the step and job
// spec of the folder, each of its files as one segment, of job `job` (none: the one that was
// exported). Before the commit the digest of the whole state is compared with the exported one.
// Memory: none, files are mapped.
//   kAlreadyExists  there is something in `directory`
//   kDataLoss       the folder is not whole, or its tensors are not those that were exported
Result<CheckpointInfo> import_state(const Path& folder, const Path& directory,
                                    std::optional<JobId> job);

}  // namespace penstock
