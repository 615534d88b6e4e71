// What happened in a simulation, for its reports: faults by kind, and events.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace penstock {

enum class Fault : uint8_t {
  kRankKilled,
  kRankCrashed,
  kRankHung,
  kRankSlow,
  kSpawnFailed,
  kDaemonKilled,
  kDaemonAskedToEnd,
  kDaemonStalled,
  kConnectionCut,
  kLinkStalled,
  kWorkerCutOff,
  kMessageLost,
  kMessageRepeated,
  kMessageOvertaken,
  kMessageLate,
  kCoordinatorCrashed,
  kCrashedInEvent,
  kCoordinatorStalled,
  kRecordLost,
  kSaveFailed,
  kCommitFailed,
  kCommitUnheard,
  kCheckpointDamaged,
  kLossSpike,
};
inline constexpr std::array<std::string_view, 24> kFaultNames = {
    "rank killed",
    "rank crashed",
    "rank hung",
    "rank slow",
    "rank could not be started",
    "worker daemon killed",
    "worker daemon asked to end",
    "worker daemon stopped for a while",
    "connection cut",
    "link held up",
    "worker cut off",
    "message lost",
    "message repeated",
    "message overtaken by a later one",
    "message that took seconds",
    "coordinator crashed",
    "of these within an event: before its records were written, or after it and before it acted",
    "coordinator stopped for a while",
    "record lost that was not synced",
    "save failed",
    "commit failed",
    "commit done or not, its answer lost",
    "checkpoint damaged",
    "loss spike",
};
static_assert(static_cast<size_t>(Fault::kLossSpike) + 1 == kFaultNames.size());

struct SimCounts {
  int64_t core_events = 0;    // steps of the coordinator's core
  int64_t worker_events = 0;  // calls of worker agents but for idle ticks, or what stands for them
  int64_t restarts = 0;
  int64_t memory_starts = 0;  // ranks that went on from what their daemon held
  int64_t mirrored = 0;       // rounds of a worker whose copies are there
  int64_t fetched = 0;        // ranks that went on from a copy
  int64_t rebalances = 0;
  int64_t suspensions = 0;  // resumed since
  int64_t quarantines = 0;
  std::array<int64_t, kFaultNames.size()> faults = {};

  int64_t& of(Fault fault) { return faults[static_cast<size_t>(fault)]; }
  SimCounts& operator+=(const SimCounts& other) {
    core_events += other.core_events;
    worker_events += other.worker_events;
    restarts += other.restarts;
    memory_starts += other.memory_starts;
    mirrored += other.mirrored;
    fetched += other.fetched;
    rebalances += other.rebalances;
    suspensions += other.suspensions;
    quarantines += other.quarantines;
    for (size_t i = 0; i < faults.size(); ++i) faults[i] += other.faults[i];
    return *this;
  }
};

}  // namespace penstock
