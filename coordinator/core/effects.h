// What goes into the core and what comes out. Plain values; see coordinator.h for who does what
// with them.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "comm/base/log.h"
#include "comm/base/status.h"
#include "comm/control/message.h"
#include "comm/run/job_spec.h"
#include "coordinator/core/records.h"

namespace penstock {

// Names one client's command, so that its answer finds it. Chosen by the driver, never 0.
using RequestId = Id<struct RequestTag, uint64_t>;

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
};
// Move experts between ranks when the next checkpoint is committed.
struct RebalanceJob {
  RequestId request;
  JobId job;
};
// A message from the connection `peer`; the core decides which worker that is.
struct WorkerMessage {
  std::string peer;
  ControlMessage message;
};
// The end of a CommitCheckpoint effect.
struct CheckpointDone {
  JobId job;
  Epoch epoch;
  int64_t step = 0;
  Status status;
  CheckpointRecord checkpoint;  // when the status is ok
};
// The end of a FindCheckpoint effect.
struct CheckpointFound {
  JobId job;
  Status status;                     // not ok: the directory could not be read
  int64_t step = 0;                  // 0 with an empty manifest: there is none
  std::string manifest;              // absolute path
  std::vector<std::string> refused;  // newer ones passed over, one sentence each
};
// Time passed. Sent at least every CoreConfig::heartbeat_interval / 2.
struct Tick {};

using Event = std::variant<SubmitJob, CancelJob, ResumeJob, RebalanceJob, WorkerMessage,
                           CheckpointDone, CheckpointFound, Tick>;

// ---- out

struct OutgoingMessage {
  std::string peer;
  ControlMessage message;
};
struct Answer {
  RequestId request;
  Status status;
  JobId job;  // the one submitted, cancelled, resumed or to rebalance, when ok
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
  // Records that a crash may cost the newest of.
  std::vector<JobRecord> relaxed_jobs;
  std::vector<StepRecord> steps;
  std::vector<EvaluationRecord> evaluations;

  std::vector<OutgoingMessage> messages;
  std::vector<Answer> answers;
  std::vector<CommitCheckpoint> commits;
  std::vector<FindCheckpoint> finds;
  std::vector<LogChunk> log_chunks;
  std::vector<LogLine> log;

  bool must_sync() const {
    return !jobs.empty() || !specs.empty() || !seats.empty() || !data.empty() || !workers.empty() ||
           !events.empty();
  }
};

// Everything an Effects wants written, in one batch.
std::vector<Record> records_of(const Effects& effects);

}  // namespace penstock
