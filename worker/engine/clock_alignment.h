// How far the clock of this rank's host is from that of rank 0's: so that one trace can show many
// hosts.
#pragma once

#include <cstdint>

#include "comm/base/status.h"
#include "comm/data/transport.h"

namespace penstock {

struct ClockOffset {
  int64_t offset_ns = 0;       // to be added to monotonic_ns() here to get rank 0's
  int64_t uncertainty_ns = 0;  // half the round trip it was measured by
};

// Every rank of the transport's world calls it at the same place of its program, with the same tag.
// Rank 0 answers kClockRounds questions of each other rank in turn; of those the one with the
// shortest round trip counts, because it was held up least.
Result<ClockOffset> align_clock(Transport& transport, Tag tag);
inline constexpr int kClockRounds = 8;

}  // namespace penstock
