// Going on from a copy of the state that a daemon keeps (comm/control/state_stream.h).
#pragma once

#include "comm/base/file.h"
#include "comm/base/status.h"
#include "comm/control/message.h"

namespace penstock {

// Puts the state of start.restore_step into the memory in which the rank is to keep its own
// (`state_file`, not empty), as if an earlier process of it had left it there. What is there must
// be this rank's all the same: the engine compares its contents with what it needs. Gives up when
// nothing comes in for a while.
//
// REQUIRES: start.from_memory, and start.state_from says where.
Status fetch_state(const StartRank& start, const Path& state_file);

}  // namespace penstock
