// What the end of a rank means for its job. Pure.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "comm/base/exit_codes.h"
#include "comm/control/message.h"
#include "coordinator/core/records.h"

namespace penstock {

// Reason codes of failures. kPeerLost is a consequence, never a cause: a better one replaces it.
inline constexpr const char* kCausePeerLost = "peer_lost";
inline constexpr const char* kCauseDataCorrupt = "data_corrupt";
inline constexpr const char* kCauseDiverged = "diverged";
// A daemon or its host is gone, or cannot be heard and is waited for.
inline constexpr const char* kCauseWorkerLost = "worker_lost";
// A processor, memory or network changed bits.
inline constexpr const char* kCauseSilentCorruption = "silent_corruption";
// A replay gave other bits than were recorded.
inline constexpr const char* kCauseNotReproduced = "not_reproduced";
// The coordinator and the worker were restarted, as by "penstock dev down" and "up" or a reboot of
// everything. Nothing was wrong with the job: it does not count against recovery.max_restarts.
inline constexpr const char* kCauseClusterRestarted = "cluster_restarted";

// A worker daemon ended as it was asked to, before the job had saved. As the one above.
inline constexpr const char* kCauseWorkerLeft = "worker_left";

// How far a rank had come when it ended.
enum class RankPhase : uint8_t {
  kLoading,    // from initial weights
  kRestoring,  // loading, from a checkpoint
  kTraining,
};

// As comm/base/exit_codes.h says, by which its daemon goes, too.
inline bool leaves_sound_state(const RankExited& exited) {
  return leaves_sound_state(exited.exit_code, exited.signal);
}

// The failure that an exit other than a clean one is. Fatal, because a retry meets the same: wrong
// usage; a loss or gradient norm that is not finite; damaged data, but while restoring, when it may
// be the checkpoint's and an older one may do; data that is missing or may not be read at the first
// start.
Failure failure_of(const RankExited& exited, const std::string& worker_name, RankPhase phase);

// A rank found other data than `expected`, what the job began with: fatal; nullopt: it did not. Not
// compared when either side is empty: an older worker says nothing.
std::optional<Failure> data_changed(const std::vector<DataIdentity>& expected,
                                    const RankReady& ready, const std::string& worker_name);

// Its daemon ended the rank, which did just that: no cause of anything. A rank that somebody else
// killed is one, however late that is heard.
bool was_ordered(const RankExited& exited);

}  // namespace penstock
