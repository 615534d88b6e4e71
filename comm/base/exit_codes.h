// Exit codes of every Penstock program. Documented in docs/exit-codes.md and `penstock help
// exit-codes`.
#pragma once

#include "comm/base/status.h"

namespace penstock {

enum class ExitCode : int {
  kOk = 0,
  kFailure = 1,
  kUsage = 2,  // wrong flag, or a job spec that is not valid
  kNotFound = 3,
  kPermission = 4,
  kUnreachable = 5,  // no coordinator at that address
  kConflict = 6,     // port or name in use, wrong state
  kTimeout = 7,      // of `wait`
  kJobFailed = 10,
  kJobCancelled = 11,
  kPreempted = 12,
  kOutOfMemory = 13,
  kDataCorrupt = 14,  // data set or checkpoint damaged
  kPeerLost = 15,     // rank only: a peer went away; the cause is elsewhere
  kDiverged = 16,     // loss or gradient norm is NaN or infinite; the same step ends so every time
  kNotReproduced = 17,  // steps that were trained again have other bits than were recorded
  kMiscomputed = 18,    // rank only: a processor, memory or network changes bits (guards)
  kUnhealthy = 19,      // worker only: its host failed a check
  kInterrupted = 130,
};

// How a command or daemon that ended with this error exits. Ranks have a rule of their own, which
// tells lost peers from causes: worker/rank/rank_process.h.
ExitCode exit_code_of(const Status& status);

// Whether a rank that ended like this has left its state as it was, wherever there are copies of
// it: it was done, it was killed or told to stop, a peer of it was gone, or its lease was over. One
// that crashed or gave up may have written anything anywhere. `signal`: 0 when it exited by itself.
bool leaves_sound_state(int exit_code, int signal);

}  // namespace penstock
