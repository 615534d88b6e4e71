// The records that a coordinator on this host keeps or left behind.
#pragma once

#include <memory>

#include "coordinator/store/record_store.h"

namespace penstock {

// `state_dir`: a coordinator's, or that of a dev cluster. For reading alone: takes no lock and
// changes nothing, so the coordinator may run. kNotFound: none are there.
Result<std::unique_ptr<RecordStore>> open_coordinator_store(const Path& state_dir);

// kFailedPrecondition: `state_dir` is a dev cluster's, whose coordinator has a folder of its own.
Status check_own_state(const Path& state_dir);

}  // namespace penstock
