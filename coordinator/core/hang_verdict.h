// Which rank hangs, from what the daemons say their ranks do. Pure.
//
// Every rank that waits names the peer it waits for. Following these edges leads to a rank that
// waits for nobody, which is stuck by itself (stopped, in compute, in storage), or round in a
// circle. A job that is merely slow has some rank whose record changed lately, and no verdict.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "comm/base/clock.h"
#include "comm/control/message.h"

namespace penstock {

// Reason code of a failure that is a hang.
inline constexpr const char* kCauseRankHung = "rank_hung";

// How long a rank may be without a change of its record.
struct HangLimits {
  Duration stopped = {};   // its process is stopped, so nothing can come
  Duration training = {};  // in a step
  Duration slow = {};      // in any other phase
};

struct HangVerdict {
  Rank rank;
  std::string message;  // one sentence: rank, host, operation, layer, micro-batch, step, who waits
  std::string log_tail;
};

// `ranks`: by rank what its daemon said, null where none has answered. `hosts`: by rank. nullopt:
// something moves, the coordinator is waited for, or it cannot be told without a missing answer.
std::optional<HangVerdict> find_hung(const std::vector<const RankActivity*>& ranks,
                                     const std::vector<std::string>& hosts,
                                     const HangLimits& limits);

// The rank that the others wait for and whose host cannot be heard. `unheard`: by rank whether its
// host is silent; `patience`: how long everybody else must have been quiet. nullopt: somebody
// moves, or nobody waits for such a rank.
std::optional<HangVerdict> find_unreachable(const std::vector<const RankActivity*>& ranks,
                                            const std::vector<std::string>& hosts,
                                            const std::vector<bool>& unheard, Duration patience);

}  // namespace penstock
