// Every control message, as owned, checked values. The wire form is comm/control/message.capnp;
// codec.h turns one into the other at the edge, and nothing past it sees a frame or a Cap'n Proto
// reader.
//
// Who talks to whom:
//   worker daemon <-> coordinator   one DEALER/ROUTER pair, reconnecting by itself
//   rank <-> its worker daemon      one DEALER/ROUTER pair on a local endpoint
// A message of an epoch below the receiver's is dropped by the receiver; ranks never talk to the
// coordinator, the daemon relays. After every (re-)registration a daemon sends again what the
// coordinator may not have stored: handlers of RankReady, StepReport, EvaluationReport,
// ExpertLoadReport, SegmentSaved, SaveFailed, RankFinished and RankExited are idempotent.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "comm/base/hash.h"
#include "comm/base/ids.h"
#include "comm/run/data_identity.h"
#include "comm/run/expert_seats.h"
#include "comm/run/flight_record.h"
#include "comm/run/guards.h"
#include "comm/run/program.h"

namespace penstock {

inline constexpr uint32_t kProtocolVersion = 7;

// Bounds of what a frame may carry; a frame beyond one is refused whole.
inline constexpr size_t kFrameBytesMax = 16 << 20;
inline constexpr size_t kTextBytesMax = 1 << 20;  // spec, log chunk
inline constexpr size_t kNameBytesMax = 4096;     // names, paths, reasons
inline constexpr size_t kLogTailBytesMax = 2048;
inline constexpr size_t kCheckReportBytesMax = 4096;
inline constexpr size_t kRanksMax = 1 << 20;
inline constexpr size_t kSlicesMax = 1 << 20;
inline constexpr size_t kInstructionsMax = 1 << 20;
inline constexpr size_t kAddressBytesMax = 64 << 10;
inline constexpr size_t kStepRangesMax = 1 << 20;
inline constexpr size_t kDataSetsMax = 2048;  // training and validation sources of a spec

enum class RankState : uint8_t { kStarting, kReady, kTraining, kFinished };

// What a rank has spent its steps with since it began, added up.
struct RankPace {
  int64_t steps = 0;          // that it has timed
  double busy_seconds = 0.0;  // computing
  double wait_seconds = 0.0;  // for other ranks, reductions included
  bool operator==(const RankPace&) const = default;
};

// One running rank process, as its daemon sees it.
struct RankStatus {
  JobId job;
  Epoch epoch;
  Rank rank;
  RankState state = RankState::kStarting;
  int64_t step = 0;  // last finished
  RankPace pace = {};
  bool operator==(const RankStatus&) const = default;
};

// Worker -> coordinator: first message of every connection, repeated until answered. `ranks` is the
// truth about what runs there, from which a restarted coordinator re-learns it.
struct Register {
  uint32_t protocol_version = kProtocolVersion;
  std::string name;          // host-unique, stable over restarts of the daemon
  uint64_t incarnation = 0;  // random, new for each daemon process
  std::string host;
  int32_t device_count = 0;
  std::string device_kind;   // "cpu" or the GPU's name
  std::string http_address;  // host:port of the daemon's /metrics
  std::vector<RankStatus> ranks;
  // Where it takes in copies of ranks' state (state_stream.h), and its key; empty: nowhere.
  std::string state_address = {};
  Digest state_key = {};
  uint64_t sequence = 0;   // counts with those of Heartbeat, from 1: what is older is dropped
  uint64_t challenge = 0;  // of the newest Registered that had one; 0: none had
  bool operator==(const Register&) const = default;
};

// Coordinator -> worker: the answer to Register, and to every Heartbeat. A non-empty refusal means:
// exit, and print it. Worker 0 without a refusal means: this coordinator does not know you (it
// restarted); Register again, and after the answer repeat every RankReady, SegmentSaved,
// SaveFailed, RankFinished and RankExited that has not been answered yet.
struct Registered {
  WorkerId worker;
  int64_t heartbeat_interval_ms = 0;
  std::string refusal;
  // For so long after it was last heard the worker's ranks may run, and nobody takes their place;
  // 0: for ever, of an older coordinator.
  int64_t lease_ms = 0;
  uint64_t heard_sequence = 0;  // of the Heartbeat that this answers; 0: it answers Register
  // With worker 0: another daemon of this name is known, and the words of one that ended come late;
  // who repeats this number in its next Register lives. 0: nothing is asked.
  uint64_t challenge = 0;
  bool operator==(const Registered&) const = default;
};

// Worker -> coordinator. Loss-tolerant: the newest wins, nothing is resent.
struct Heartbeat {
  WorkerId worker;
  uint64_t incarnation = 0;
  uint64_t sequence = 0;  // strictly increasing per incarnation; gaps legal, repeats dropped
  std::vector<RankStatus> ranks;
  int64_t sent_at_ns = 0;  // the worker's wall clock; 0: it does not say
  bool operator==(const Heartbeat&) const = default;
};

// Where a copy of a rank's state is to be had, or kept (state_stream.h).
struct StatePlace {
  std::string address;  // of a daemon, "host:port"; empty: nowhere
  Digest key = {};      // of that daemon
  bool operator==(const StatePlace&) const = default;
};

// Coordinator -> worker: start one rank process. Idempotent per (job, epoch, rank): repeated for a
// rank that is already loaded, the daemon repeats its RankReady (or RankExited). Refused, by
// silence, at or below an epoch that StopRanks named.
struct StartRank {
  JobId job;
  Epoch epoch;
  Rank rank;
  int32_t device = 0;     // index on that worker
  std::string spec_json;  // canonical job spec
  Program program;
  std::string checkpoint_dir;    // of this job, absolute
  std::string restore_manifest;  // absolute path; empty: start from initial weights
  // Of the manifest; 0 with none, unless the rank is to go on from what its daemon holds in memory
  // of it, and of every other rank, at this step.
  int64_t restore_step = 0;
  bool from_memory = false;
  // With from_memory, where the state is when it is not in the memory that the rank's daemon holds
  // for it: a copy, made in the epoch before this one.
  StatePlace state_from = {};
  int64_t saved_step = 0;  // of the newest committed checkpoint; 0: none
  int64_t first_unreported_step =
      0;  // steps below were recorded by an earlier attempt (replay is reported all the same)
  ExpertSeats seats;                     // of the layers that the rank holds
  int64_t save_interval = 0;             // as in SaveInterval, to begin with; 0: as the spec says
  std::vector<StepRange> left_out = {};  // steps that change nothing, by rollbacks
  bool operator==(const StartRank&) const = default;
};

// Rank -> daemon -> coordinator: loaded, listening at this data-plane address.
struct RankReady {
  JobId job;
  Epoch epoch;
  Rank rank;
  std::string address;  // opaque, transport's own
  // Of the spec's training sources, then of its validation sources. Empty: of an older worker.
  std::vector<DataIdentity> data = {};
  bool operator==(const RankReady&) const = default;
};

// Coordinator -> workers -> ranks: every rank is ready; begin. Idempotent per epoch.
struct BeginTraining {
  JobId job;
  Epoch epoch;
  std::vector<std::string> addresses;  // by rank
  bool operator==(const BeginTraining&) const = default;
};

// Coordinator -> worker: end every rank of this job up to and including `epoch`. grace_ms 0:
// SIGKILL at once.
struct StopRanks {
  JobId job;
  Epoch epoch;
  int64_t grace_ms = 0;
  std::string reason;
  bool keep_state = false;  // what is held in memory of its ranks may be needed; else it goes
  bool operator==(const StopRanks&) const = default;
};

// The steps whose state a daemon holds in memory for a rank that ended (comm/run/held_state.h).
struct HeldRank {
  Rank rank;
  std::vector<int64_t> steps;  // ascending
  bool operator==(const HeldRank&) const = default;
};

// Worker -> coordinator, the answer to every StopRanks, also a repeated one or one of an unknown
// job: no rank of this job up to and including `epoch` runs here now, and none will be started.
// Sent once the last such process is reaped; a new epoch is placed only after it.
struct RanksStopped {
  JobId job;
  Epoch epoch;
  std::vector<HeldRank> held = {};  // with StopRanks::keep_state
  // Likewise: copies of that epoch's state, of any rank (MirrorRanks).
  std::vector<HeldRank> copies = {};
  bool holds_any() const { return !held.empty() || !copies.empty(); }
  bool operator==(const RanksStopped&) const = default;
};

// How the reason of a RankExited begins when the daemon itself ended the rank, as it was ordered or
// because it ends.
inline constexpr std::string_view kStoppedByDaemon = "stopped by its daemon: ";

// How it begins when there was no process, because the host could not make one.
inline constexpr std::string_view kCouldNotStart = "could not start the rank: ";

// Daemon -> coordinator: a rank process ended. Repeated until acknowledged by StopRanks or a newer
// epoch, and told at least once.
struct RankExited {
  JobId job;
  Epoch epoch;
  Rank rank;
  int32_t exit_code = 0;      // as in comm/base/exit_codes.h; -1 when a signal ended it
  int32_t signal = 0;         // 0 when it exited by itself
  std::string reason;         // one sentence: how it ended and, if it said, why
  std::string log_tail = {};  // the last lines of its stderr, any bytes
  bool operator==(const RankExited&) const = default;
};

// Coordinator -> worker: what do your ranks of this attempt do now? Asked when a job has been
// silent for long; not repeated: asked anew, with another number.
struct InspectRanks {
  JobId job;
  Epoch epoch;
  uint64_t request = 0;
  bool operator==(const InspectRanks&) const = default;
};

// What one rank does, as its daemon reads it without a word from it.
struct RankActivity {
  Rank rank;
  ProcessState process = ProcessState::kUnknown;
  bool recorded = false;  // `state` is its flight record; else it has none
  FlightState state = {};
  int64_t quiet_ms = 0;       // since that record changed; without one: since the process began
  std::string log_tail = {};  // the last lines of its stderr, any bytes
  bool operator==(const RankActivity&) const = default;
};

// Worker -> coordinator, the answer: every rank of the attempt that has a process here. Not resent.
struct RanksInspected {
  JobId job;
  Epoch epoch;
  uint64_t request = 0;  // of InspectRanks
  std::vector<RankActivity> ranks;
  bool operator==(const RanksInspected&) const = default;
};

// Rank 0 -> daemon -> coordinator, once per step. Ordered per epoch.
struct StepReport {
  JobId job;
  Epoch epoch;
  int64_t step = 0;        // 1 is the first
  double loss = 0.0;       // mean next-token cross-entropy over the global batch, nats
  double grad_norm = 0.0;  // before clipping
  double learning_rate = 0.0;
  int64_t tokens = 0;  // trained in this step
  double step_seconds = 0.0;
  double expert_load_max_ratio = 0.0;  // largest over layers of max load / mean load
  int64_t finished_at_ns = 0;          // wall clock of rank 0
  double mtp_loss = 0.0;               // of multi-token prediction, before its weight; 0 without it
  double balance_loss = 0.0;           // mean over sequences, summed over layers; 0 without it
  // Of step_seconds: what saving the state made rank 0 wait for. 0: it was not saved after it.
  double checkpoint_seconds = 0.0;
  // What the step's guards found. With kSkip the step changed nothing, and `tokens` is 0. With
  // kRollback the step is not finished, and the ranks wait to be stopped.
  GuardFinding guard = {};
  bool operator==(const StepReport&) const = default;
};

// Rank 0 -> daemon -> coordinator.
struct EvaluationReport {
  JobId job;
  Epoch epoch;
  int64_t step = 0;
  double loss = 0.0;  // mean held-out cross-entropy, nats per token
  int64_t tokens = 0;
  bool operator==(const EvaluationReport&) const = default;
};

// First rank of a stage -> daemon -> coordinator, before its SegmentSaved of the same step. For a
// group of more than one expert rank.
struct ExpertLoadReport {
  JobId job;
  Epoch epoch;
  Rank rank;
  int64_t step = 0;
  ExpertLoads layers;  // tokens of a step that chose each expert, averaged over recent steps
  bool operator==(const ExpertLoadReport&) const = default;
};

// One box of one tensor in a segment file, as DESIGN §8: ranks never appear in names.
struct SavedSlice {
  std::string name;            // logical: "model.layers.3.mlp.experts.7.up_proj.weight|exp_avg"
  std::string dtype;           // "f32", "i64", …
  std::vector<int64_t> shape;  // of the whole tensor
  std::vector<int64_t> box_offset;
  std::vector<int64_t> box_size;
  uint64_t file_offset = 0;
  uint64_t byte_count = 0;
  Digest digest;  // of the slice's bytes
  bool operator==(const SavedSlice&) const = default;
};

// Rank -> daemon -> coordinator: this rank's segment of a checkpoint is durable.
struct SegmentSaved {
  JobId job;
  Epoch epoch;
  Rank rank;
  int64_t step = 0;
  std::string file;  // relative to the job's checkpoint directory
  uint64_t byte_count = 0;
  Digest footer_digest;
  std::vector<SavedSlice> slices;
  // Asked to by PauseRanks: the rank trains nothing more until the checkpoint is known to have
  // failed.
  bool pauses = false;
  bool operator==(const SegmentSaved&) const = default;
};

// Rank -> daemon -> coordinator: this rank could not save; the attempt at this step is dead, the
// run goes on.
struct SaveFailed {
  JobId job;
  Epoch epoch;
  Rank rank;
  int64_t step = 0;
  std::string reason;
  bool operator==(const SaveFailed&) const = default;
};

// Coordinator -> workers -> ranks: what became of the checkpoint of `step`.
struct CheckpointOutcome {
  JobId job;
  Epoch epoch;
  int64_t step = 0;
  bool committed = false;
  std::string reason;  // when not committed
  bool operator==(const CheckpointOutcome&) const = default;
};

// Coordinator -> workers -> ranks: from now on the state is saved when so many steps were trained
// since it last was. Rank 0 counts, and tells the others with the sums of each step. Loss-tolerant:
// the newest wins, and it is sent again with every CheckpointOutcome.
struct SaveInterval {
  JobId job;
  Epoch epoch;
  int64_t steps = 0;  // at least 1
  bool operator==(const SaveInterval&) const = default;
};

// Coordinator -> workers -> ranks: save the state after the step in progress, and train no other
// before StopRanks, unless it cannot be saved. One rank that hears it is enough: the wish travels
// with the sums of the step, so all pause after the same one. Loss-tolerant: repeated until then.
struct PauseRanks {
  JobId job;
  Epoch epoch;
  bool operator==(const PauseRanks&) const = default;
};

// Where the copy of a rank goes.
struct MirrorTarget {
  Rank rank;
  StatePlace to;
  bool operator==(const MirrorTarget&) const = default;
};

// Coordinator -> worker: copy the state of your ranks after `step`, to stay with you and with
// others, and take in the copies of others' ranks. Repeated until RanksMirrored answers it; a newer
// step takes its place.
struct MirrorRanks {
  JobId job;
  Epoch epoch;
  int64_t step = 0;
  int64_t kept_step = 0;  // copies of this step stay until then, of others they go; 0: of none
  int64_t bytes_per_second = 0;    // of the sending of this worker, at most
  std::vector<MirrorTarget> send;  // ranks of this worker, each once
  std::vector<Rank> keep;          // ranks of others
  bool operator==(const MirrorRanks&) const = default;
};

// Worker -> coordinator, the answer: the copies of all its ranks are here and there, or why not; or
// that the worker knows of a later step or kept step of this attempt than the order, which is of a
// coordinator that was restarted, or late. Not kept: the order is repeated.
struct RanksMirrored {
  JobId job;
  Epoch epoch;
  int64_t step = 0;
  std::string failure;    // one sentence; empty: none
  bool missed = false;    // only that a rank was faster than its daemon
  bool outdated = false;  // the order was: `step` and `kept_step` are of the newest one here
  int64_t kept_step = 0;  // 0 unless outdated
  bool operator==(const RanksMirrored&) const = default;
};

// Worker -> coordinator: this daemon was asked to end (SIGTERM). Its ranks are to save and move, as
// from a drained worker; repeated until WorkerReleased. `left`: it ends now, and none of its ranks
// runs any more; not resent, silence says it otherwise.
struct WorkerLeaving {
  uint64_t incarnation = 0;
  bool left = false;
  bool operator==(const WorkerLeaving&) const = default;
};

// Coordinator -> worker, the answer to WorkerLeaving once nothing of the worker is needed any more.
struct WorkerReleased {
  WorkerId worker;
  bool operator==(const WorkerReleased&) const = default;
};

// Coordinator -> worker: check your host (worker/rank/host_check.h), beside what runs there. The
// coordinator repeats it until it is answered; the daemon runs one check at a time.
struct CheckHost {
  uint64_t request = 0;  // never 0
  bool operator==(const CheckHost&) const = default;
};

// Worker -> coordinator, the answer. Not resent, but repeated with the question.
struct HostChecked {
  uint64_t request = 0;  // of CheckHost
  bool passed = false;
  std::string report;  // what is wrong with the host; passed: what was measured
  bool operator==(const HostChecked&) const = default;
};

// Rank -> daemon -> coordinator: every step is done, and (rank by rank) the digest of its final
// weights.
struct RankFinished {
  JobId job;
  Epoch epoch;
  Rank rank;
  int64_t step = 0;
  bool operator==(const RankFinished&) const = default;
};

// Daemon -> coordinator. Lines of one rank's stdout and stderr; offset is the byte position in that
// log.
struct LogChunk {
  JobId job;
  Epoch epoch;
  Rank rank;
  uint64_t offset = 0;
  std::string text;
  bool operator==(const LogChunk&) const = default;
};

// Rank -> daemon, at its start: binds the connection to a rank the daemon spawned.
struct RankHello {
  JobId job;
  Epoch epoch;
  Rank rank;
  int32_t pid = 0;
  bool operator==(const RankHello&) const = default;
};

// Rank -> daemon, after each step; becomes RankStatus and the daemon's metrics.
struct RankProgress {
  JobId job;
  Epoch epoch;
  Rank rank;
  int64_t step = 0;
  double step_seconds = 0.0;
  double compute_seconds = 0.0;        // of the step: kernels
  double expert_wait_seconds = 0.0;    // waiting for dispatch and combine
  double pipeline_wait_seconds = 0.0;  // waiting for neighbours
  double reduce_seconds = 0.0;         // gradient reduction and weight gathering
  double optimizer_seconds = 0.0;
  double checkpoint_seconds = 0.0;  // stall for saving
  uint64_t bytes_sent = 0;          // cumulative
  uint64_t arena_bytes = 0;
  bool operator==(const RankProgress&) const = default;
};

using ControlMessage =
    std::variant<Register, Registered, Heartbeat, StartRank, RankReady, BeginTraining, StopRanks,
                 RankExited, StepReport, EvaluationReport, SegmentSaved, SaveFailed,
                 CheckpointOutcome, RankFinished, LogChunk, RankHello, RankProgress, RanksStopped,
                 ExpertLoadReport, SaveInterval, InspectRanks, RanksInspected, PauseRanks,
                 WorkerLeaving, WorkerReleased, CheckHost, HostChecked, MirrorRanks, RanksMirrored>;

// The message's name, for logs and metrics: "step_report".
std::string_view message_name(const ControlMessage& message);

}  // namespace penstock
