// What goes into the core and what comes out. Plain values; see coordinator.h for who does what
// with them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "comm/base/log.h"
#include "comm/base/status.h"
#include "comm/control/message.h"
#include "comm/run/job_spec.h"
#include "coordinator/core/job.h"
#include "coordinator/core/records.h"

namespace penstock {

// ---- in

struct SubmitJob {
  RequestId request;
  JobSpec spec;
};
struct CancelJob {
  RequestId request;
  JobId job;
  int64_t grace_ms = 5000;  // between SIGTERM and SIGKILL of its ranks
};
struct ResumeJob {
  RequestId request;
  JobId job;
  int64_t prove_steps = 0;           // above 0: so many steps are trained again first, and compared
  std::optional<JobSpec> spec = {};  // what it goes on by: another layout; none: as before
};
// Save the job's state, release its devices, and keep both so until it is resumed.
struct SuspendJob {
  RequestId request;
  JobId job;
};
// The worker of that name gets no ranks any more, and those it has move; without a reason, it takes
// ranks again. Its answer names no job.
struct DrainWorker {
  RequestId request;
  std::string worker;
  std::optional<std::string> reason;  // may be empty
};
// The worker of that name is not trusted with ranks any more; without a reason, it is again. Its
// answer names no job.
struct QuarantineWorker {
  RequestId request;
  std::string worker;
  std::optional<std::string> reason;
};
// Go on with another data-parallel width.
struct ScaleJob {
  RequestId request;
  JobId job;
  int64_t data = 1;
};
// Move experts between ranks when the next checkpoint is committed.
struct RebalanceJob {
  RequestId request;
  JobId job;
};
// Forget a job that has ended.
struct RemoveJob {
  RequestId request;
  JobId job;
  bool checkpoints = false;  // and remove its checkpoint directory, first
};
// The end of a RemoveCheckpoints effect.
struct CheckpointsRemoved {
  JobId job;
  Status status;
};
// A message from the connection `peer`; the core decides which worker that is.
struct WorkerMessage {
  std::string peer;
  ControlMessage message;
  // By this host's clock as it is set, which the time of events does not follow; none: as they say.
  std::optional<Instant> arrived = {};
};
// A worker shows that it is there (comm/control/pulse.h).
struct WorkerPulse {
  WorkerId worker;
  uint64_t incarnation = 0;
};
// That process of the worker and all its ranks have ended: their host says so
// (comm/control/lifelines.h).
struct WorkerGone {
  WorkerId worker;
  uint64_t incarnation = 0;
};
// The end of a CommitCheckpoint effect.
struct CheckpointDone {
  JobId job;
  Epoch epoch;
  int64_t step = 0;
  Status status;
  CheckpointRecord checkpoint;  // when the status is ok, and it was not to be compared
  bool compared = false;  // as in CommitCheckpoint::compare; then, where there is another one:
  int64_t tensors_equal = 0;
  std::string difference;  // the first tensor that is another one, and how; empty: all are equal
};
// The end of a FindCheckpoint effect.
struct CheckpointFound {
  JobId job;
  Status status;                     // not ok: the directory could not be read
  int64_t step = 0;                  // 0 with an empty manifest: there is none
  std::string manifest;              // absolute path
  std::vector<std::string> refused;  // newer ones passed over, one sentence each
  std::vector<int64_t> steps;        // of every checkpoint whose manifest can be read
  uint64_t number = 0;               // as in the effect
};
// The end of a ReadSteps effect.
struct StepsRead {
  JobId job;
  Epoch epoch;  // these three as in the effect
  int64_t first = 0;
  int64_t last = 0;
  Status status;
  std::vector<StepRecord> steps;  // of each step the newest record, where there is one
};
// A checkpoint that was committed is not what was written, which reading it over has shown.
struct CheckpointDamaged {
  JobId job;
  std::string damage;  // one sentence: file, rank, range, tensors
};
// Time passed. Sent at least every CoreConfig::heartbeat_interval / 2.
struct Tick {};

using Event = std::variant<SubmitJob, CancelJob, ResumeJob, SuspendJob, ScaleJob, DrainWorker,
                           QuarantineWorker, RebalanceJob, RemoveJob, WorkerMessage, WorkerPulse,
                           WorkerGone, CheckpointDone, CheckpointFound, StepsRead,
                           CheckpointDamaged, CheckpointsRemoved, Tick>;

// ---- out

struct OutgoingMessage {
  std::string peer;
  ControlMessage message;
};
struct Answer {
  RequestId request;
  Status status;
  JobId job;  // the one that it is about, when ok
};
// Publish the checkpoint these segments make. They cover every rank; nothing else is proven yet.
struct CommitCheckpoint {
  JobId job;
  Epoch epoch;
  int64_t step = 0;
  std::string directory;
  std::string spec_json;
  std::string layout;
  int64_t keep_last = 1;
  int64_t keep_every = 0;
  // Publish nothing: compare it with the newest checkpoint of the same step, and remove it.
  bool compare = false;
  Instant at;
  std::vector<SegmentSaved>
      segments;  // by rank, slices dropped: the commit re-reads them from the files
};
// Find the newest checkpoint that can be restored. `read_everything`: verify every byte, because a
// rank has just refused to load the newest one.
struct FindCheckpoint {
  JobId job;
  std::string directory;
  bool read_everything = false;
  // Only of steps within; the one of the latest step counts as the newest. Else that of the last
  // commit.
  std::optional<std::pair<int64_t, int64_t>> steps_within = {};
  // Not those that these took back.
  std::vector<Rollback> rolled_back = {};
  // For a rollback that leaves out these steps: the newest of a step before them. Where there is
  // none, the oldest of a step before the last of them.
  std::optional<StepRange> before = {};
  uint64_t number = 0;  // of this search, to be repeated in its answer
};
// Read what is recorded of steps `first` to `last` in epochs up to `epoch`, but by no replay.
struct ReadSteps {
  JobId job;
  Epoch epoch;
  int64_t first = 0;
  int64_t last = 0;
};
// Remove everything that the job saved.
struct RemoveCheckpoints {
  JobId job;
  std::string directory;
  std::optional<int64_t> newest_step = {};  // that was committed, so something must be there
};
struct LogLine {
  LogLevel level = LogLevel::kInfo;
  std::string text;
};

// One step's effects, to be carried out in this order: write (synced if must_sync()), then
// everything else.
struct Effects {
  // Records whose loss would break a promise.
  std::vector<JobRecord> jobs;
  std::vector<std::pair<JobId, std::string>> specs;  // canonical JSON
  std::vector<SeatsRecord> seats;
  std::vector<DataRecord> data;
  std::vector<WorkerRecord> workers;
  std::vector<JobEvent> events;
  // Jobs whose every record goes, and what keeps their ids from being given again.
  std::vector<JobId> removed_jobs;
  std::optional<JobId> last_job;
  // Records that a crash may cost the newest of.
  std::vector<JobRecord> relaxed_jobs;
  std::vector<StepRecord> steps;
  std::vector<EvaluationRecord> evaluations;

  std::vector<OutgoingMessage> messages;
  std::vector<Answer> answers;
  std::vector<CommitCheckpoint> commits;
  std::vector<FindCheckpoint> finds;
  std::vector<ReadSteps> reads;
  std::vector<RemoveCheckpoints> removals;
  std::vector<LogChunk> log_chunks;
  std::vector<LogLine> log;

  bool must_sync() const {
    return !jobs.empty() || !specs.empty() || !seats.empty() || !data.empty() || !workers.empty() ||
           !events.empty() || !removed_jobs.empty();
  }
};

// Everything an Effects wants written, in one batch.
std::vector<Record> records_of(const Effects& effects);

}  // namespace penstock
