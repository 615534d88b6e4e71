// What tests of the ways to and from the disk share.
#pragma once

#include "checkpoint/segment.h"

namespace penstock::checkpoint_test {

inline constexpr SegmentIdentity kIdentity = {JobId{7}, Epoch{3}, Rank{2}, 60};

// What a ring does to one read or write, counted from 1 over all of them.
struct Fault {
  enum class Kind { kNone, kError, kNotTaken, kShort, kRefused } kind = Kind::kNone;
  int64_t at = 0;
};

}  // namespace penstock::checkpoint_test
