// Which ranks are slow, from the time that they compute. Pure.
//
// A step takes as long on every rank, since all wait for the slowest: what differs is how much of
// it a rank computes and how much it waits. The slow one computes longest and waits least: it is
// the one that the others wait for.
#pragma once

#include <deque>
#include <optional>
#include <vector>

#include "comm/base/ids.h"
#include "comm/run/job_spec.h"

namespace penstock {

// Of one rank, over the steps of a window, per step.
struct RankRate {
  double busy_seconds = 0.0;
  double wait_seconds = 0.0;
};

// What was measured of all ranks at the same time.
struct PaceWindow {
  int64_t first_step = 0;
  int64_t last_step = 0;
  std::vector<RankRate> ranks;  // by rank
};

// Only what lasts so many windows counts: a machine that is shared is now slower, now faster.
inline constexpr size_t kSlowWindows = 3;
// Of a rank that no other one is like, as many earlier ones say what is usual.
inline constexpr size_t kPaceWindowsMax = 4 * kSlowWindows;

struct SlowLimits {
  double ratio = 1.5;      // of what is usual; above 1
  double imbalance = 1.0;  // ranks of an expert group may differ by that much without being slow
};

struct RankPaceVerdict {
  bool slow = false;   // in each of the newest windows, beyond all noise
  bool usual = false;  // in none of them
  double ratio = 0.0;  // of the time it computes to what is usual; median of the newest windows
  double busy_seconds = 0.0;  // as is this
  double usual_seconds =
      0.0;                  // what is usual: the median of ranks that do the same, or its own past
  double wait_share = 0.0;  // of its time
  double peers_wait_share = 0.0;  // of all others', the median
  int64_t peers = 0;              // that do the same; 0: compared with its own past
  int64_t since_step = 0;         // first step of the newest windows
};

// By rank; empty: not enough is known. REQUIRES: every window has parallelism.world_size() ranks.
//
// Ranks that do the same work: of the same expert index on the same stages (data replicas, and the
// twin in a bidirectional pipeline); where there are less than two, of the same stages, whose loads
// differ by `imbalance`; where there are none, the rank itself in earlier windows, as far as the
// others have not changed in the same way.
std::vector<RankPaceVerdict> judge_pace(const ParallelismSpec& parallelism,
                                        const std::deque<PaceWindow>& windows,
                                        const SlowLimits& limits);

}  // namespace penstock
