// What changes in a coordinator's records when they are taken from a backup: the cluster has gone
// on since, so that what they say of attempts and ids in use is out of date.
#pragma once

#include <vector>

#include "coordinator/core/coordinator.h"

namespace penstock {

// Between the newest that a backup knows of and the first that is used after it, so that nothing
// that came in between is given twice: more starts of one job, and more jobs, than happen between
// two backups.
inline constexpr uint32_t kRestoredEpochGap = 1000;
inline constexpr uint64_t kRestoredJobGap = 1000;

// The records that are to be written over those of `stored`, which was taken at `taken_at`:
// - every job's epoch is above all that it may have had meanwhile, so that ranks of those are
//   stopped and what they save does not count; those that had ranks are RECOVERING, which ends
//   them and goes on from the newest checkpoint there is by now;
// - ids of jobs go on above all that may have been given;
// - an event says so.
// kDataLoss: no coordinator can start on them.
Result<std::vector<Record>> restored_records(const StoredState& stored, Instant taken_at,
                                             Instant now);

}  // namespace penstock
