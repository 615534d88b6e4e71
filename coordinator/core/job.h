// What the core knows beyond its records: what workers and ranks said since it started. All of it
// can be lost and is learned again.
#pragma once

#include <algorithm>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "comm/control/message.h"
#include "comm/run/job_spec.h"
#include "coordinator/core/records.h"
#include "coordinator/core/slow_ranks.h"

namespace penstock {

// Names one client's command, so that its answer finds it. Chosen by the driver, never 0.
using RequestId = Id<struct RequestTag, uint64_t>;

// One rank of the current epoch.
struct RankView {
  bool seen = false;                   // its daemon has said that the process runs
  bool finished = false;               // every step done
  std::optional<std::string> address;  // from RankReady
  RankState state = RankState::kStarting;
  int64_t step = 0;
  RankPace pace;     // newest
  RankPace pace_at;  // when the window of Job::paces that is open began
  // Its daemon no longer lists it, and has not said why: since then, and in so many heartbeats.
  std::optional<Instant> missing_since;
  int missing_beats = 0;
};

// Segments of one step's checkpoint on their way to a commit.
struct CheckpointRound {
  std::map<Rank, SegmentSaved> segments;  // slices dropped
  Instant opened;
  bool committing = false;
  bool pauses = false;  // as in SegmentSaved
};

// A question to every host of a silent job, and what they have answered.
struct HangInquiry {
  uint64_t request = 0;  // as in InspectRanks
  Instant asked_at;
  std::set<WorkerId> awaiting;
  std::map<Rank, RankActivity> answers;
};

// What the next start restores from.
enum class Restore : uint8_t {
  kUnknown,    // must be looked for before the next start
  kSearching,  // a FindCheckpoint is on its way
  kKnown,      // JobRecord::restore_manifest (or restored_from_memory) and restore_step hold
};

// Reason codes of restarts that are no failures: to move experts, to take steps back, off a worker
// that is drained, with another data-parallel width, and after a pause that nobody wants any more.
inline constexpr const char* kRebalancing = "rebalancing";
inline constexpr const char* kRollingBack = "rolling_back";
inline constexpr const char* kDraining = "draining";
inline constexpr const char* kScaling = "scaling";
inline constexpr const char* kPauseOver = "pause_over";
// Of the event that tells of the new width.
inline constexpr const char* kScaled = "scaled";

// Of the events that tell of a rank that is slow, and that it is no more.
inline constexpr const char* kSlowRank = "slow_rank";
inline constexpr const char* kSlowRankOver = "slow_rank_over";

// A rank that computes longer than those that do the same (coordinator/core/slow_ranks.h).
struct SlowRank {
  int64_t since_step = 0;
  double ratio = 0.0;
  double busy_seconds = 0.0;  // of a step
  double usual_seconds = 0.0;
  std::string words;         // as in the event
  std::string kept_because;  // with recovery.replace_slow: what the newest event said
};

// What a daemon holds in memory of a rank of the attempt that ended.
struct HeldAt {
  WorkerId worker;
  std::vector<int64_t> steps;  // ascending
  bool holds(int64_t step) const {
    return std::find(steps.begin(), steps.end(), step) != steps.end();
  }
};

// The worker whose copy of its state a rank goes on from.
struct CopyUse {
  WorkerId worker;
  bool rescued = false;  // the worker that ran the rank is gone
};

// Copies of ranks' state in other workers' memory, of the epoch that runs.
struct MirrorState {
  std::map<Rank, WorkerId> buddies;  // who keeps the copy of a rank; empty: not chosen
  int64_t step = 0;                  // the newest that was named to the workers
  std::set<WorkerId> awaiting;       // who have not said that its copies are where they are to be
  int64_t kept_step = 0;             // the newest of which they are; 0: none
  Instant ordered_at;
  Instant not_before;  // of the next one
  int64_t haste = 1;   // a step is named so many times as far ahead as would do
  std::string told;    // the failure of which there was an event
};

struct Job {
  JobRecord record;
  JobSpec spec;
  ExpertSeats seats;               // as in SeatsRecord
  std::vector<DataIdentity> data;  // as in DataRecord; empty: no rank has said yet
  // Newest measured load, and the step it came with. Empty: none since this coordinator started.
  ExpertLoads loads;
  int64_t loads_step = 0;
  SaveMeter saves;  // of this epoch, or of what this coordinator saw of it
  // While JobRecord::proof is there: what is recorded of the steps that are yet to be compared, as
  // far as it is read, and steps whose records are not.
  std::map<int64_t, StepRecord> recorded;
  int64_t recorded_through = 0;  // up to this step it is read
  std::deque<StepRecord> uncompared;
  std::vector<RankView> ranks;  // of the current epoch, as long as it is placed
  std::set<WorkerId> awaiting;  // workers that have not confirmed the stop of the epoch yet
  std::map<int64_t, CheckpointRound> rounds;     // by step
  std::map<int64_t, std::string> failed_rounds;  // step to reason, of this epoch
  RequestId removing;  // the RemoveJob that waits for its checkpoints to be gone; 0: none
  // From the stop of an attempt to the next start: what the daemon of each rank holds of it, who
  // has copies of it, and of which ranks nothing may be used: they may have written anything.
  std::map<Rank, HeldAt> held;
  std::map<Rank, std::vector<HeldAt>> copies;
  std::set<Rank> untrusted;
  std::map<Rank, CopyUse> copied_from;  // of a start from memory: ranks whose state is a copy
  MirrorState mirror;
  Restore restore = Restore::kUnknown;
  uint64_t searches = 0;  // for a checkpoint; the newest one's answer counts
  Instant place_after;  // back-off
  Instant epoch_began;  // StartRanks sent, or adopted after a restart of the coordinator
  Instant pause_after;  // PauseRanks, where they are wanted, are due then
  Instant ordered_at;   // newest orders sent; they are repeated when nothing shows for it
  Instant heard_at;     // something of this epoch came that shows that it moves
  Instant ask_after;    // the newest inquiry found that nothing hangs
  std::optional<HangInquiry> inquiry;
  uint64_t inquiries = 0;
  int64_t stop_grace_ms = 0;
  // While it runs: windows that were measured in this epoch, newest last; the one that is open;
  // whether one was closed before it; and what came of them.
  std::deque<PaceWindow> paces;
  Instant pace_since;
  bool pace_begun = false;
  std::map<Rank, SlowRank> slow;
  std::deque<StepRecord> recent_steps;       // newest last, of this epoch, at most kRecentStepsMax
  std::deque<EvaluationRecord> evaluations;  // newest last, at most kEvaluationsMax

  int64_t world_size() const { return spec.parallelism.world_size(); }
  bool placed() const { return !record.placement.empty(); }
  bool commit_in_flight() const;
  // Over recent steps of this epoch; nullopt before the first.
  std::optional<double> tokens_per_second() const;
  std::optional<double> eta_seconds() const;
};

enum class WorkerState : uint8_t {
  kExpected,  // known from the records, not heard since this coordinator started
  kUp,
  kLost,  // proven gone, or silent for longer than its lease: its ranks have ended
};

// One rank that a worker has a device for, in the current epoch of its job.
struct HostedRank {
  JobId job;
  Rank rank;
  int32_t device = 0;
};

struct Worker {
  WorkerRecord record;
  WorkerState state = WorkerState::kExpected;
  std::string peer;  // of its newest Register; empty: not seen since this coordinator started
  std::deque<uint64_t> replaced;  // incarnations that a newer one took the place of; newest last
  std::string host;
  std::string device_kind;
  std::string http_address;
  StatePlace state_place;       // where it takes in copies of ranks' state
  Instant last_seen;            // kExpected: when this coordinator started
  uint64_t heard_sequence = 0;  // of the newest Register or Heartbeat of its daemon
  // Who says that it is the next daemon, and the number that it is to repeat, if it lives.
  struct Challenge {
    uint64_t incarnation = 0;
    uint64_t number = 0;
  };
  Challenge challenge;
  std::vector<HostedRank> hosted;  // what holds its devices
  // Attempts that are over, but not known to be stopped here: it was lost or silent while it hosted
  // them, or says that it still runs them. Until it confirms the stop it gets nothing new, and
  // while it can be heard those jobs start nowhere.
  std::map<JobId, Epoch> stale;
  Instant stale_ordered_at;
  bool leaving = false;  // its daemon, of this incarnation, is asked to end
  // The newest CheckHost, while WorkerRecord::check_due; asked by this coordinator.
  uint64_t check_request = 0;
  Instant check_asked_at;
  // What its heartbeats say of its clock: by how much ours is ahead of it, and the way to here; the
  // least of some seconds. Then, and whether it was too much.
  Instant clock_since;
  int64_t clock_beats = 0;
  Duration clock_least = Duration::max();
  std::optional<Duration> clock_behind;
  bool clock_is_off = false;
  bool is_trusted() const {
    return state == WorkerState::kUp && !record.drain && !record.quarantine && !leaving;
  }
  bool takes_ranks() const { return is_trusted() && !record.check_due; }
  bool was_replaced(uint64_t incarnation) const;
  void note_replaced();  // the incarnation on record is about to be
};

// "pipeline 2, data 1, expert 4, dualpipe", for people.
std::string layout_text(const ParallelismSpec& grid);

inline constexpr size_t kRecentStepsMax = 20;
inline constexpr size_t kEvaluationsMax = 100;
inline constexpr size_t kReplacedMax = 16;

}  // namespace penstock
