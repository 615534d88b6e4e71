// What the end of a rank means for its job. Pure.
#pragma once

#include <string>

#include "comm/control/message.h"
#include "coordinator/core/records.h"

namespace penstock {

// Reason codes of failures. kPeerLost is a consequence, never a cause: a better one replaces it.
inline constexpr const char* kCausePeerLost = "peer_lost";
inline constexpr const char* kCauseDataCorrupt = "data_corrupt";

// The failure that an exit other than a clean one is. `restoring`: the rank was still loading, from
// a checkpoint, so that damaged data may be that checkpoint's and an older one may do.
Failure failure_of(const RankExited& exited, const std::string& worker_name, bool restoring);

// The exit is only what an order to stop looks like: a signal or kInterrupted.
bool looks_ordered(const RankExited& exited);

}  // namespace penstock
