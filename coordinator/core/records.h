// What the coordinator remembers: jobs, workers, events, steps, evaluations, each as one key and
// one JSON value. The store holds nothing else, and a coordinator is rebuilt from these alone.
//
//   job/<id>                     JobRecord
//   spec/<id>                    canonical job spec (comm/run/job_spec.h)
//   seats/<id>                   SeatsRecord, once experts were moved
//   data/<id>                    DataRecord
//   last-job                     highest id that any job ever had; once the newest was removed
//   worker/<id>                  WorkerRecord
//   event/<sequence>             JobEvent, every event in order
//   job-event/<id>/<sequence>    the same, by job
//   step/<id>/<cursor>           StepRecord; the cursor is epoch << 32 | step: the order trained
//   evaluation/<id>/<cursor>     EvaluationRecord
// Numbers in keys are 16 lower-case hexadecimal digits, so that key order is number order.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "comm/base/clock.h"
#include "comm/base/ids.h"
#include "comm/base/status.h"
#include "comm/run/data_identity.h"
#include "comm/run/expert_seats.h"
#include "comm/run/guards.h"
#include "coordinator/plan/save_interval.h"

namespace penstock {

enum class JobState : uint8_t {
  kQueued,
  kPlacing,
  kStarting,  // rank processes are being spawned
  kLoading,   // every rank process runs; data, model, checkpoint are being read
  kRunning,
  kRecovering,  // the failed epoch is being stopped, or waits to be placed again
  kStopping,    // on the way to a final state: JobRecord::outcome
  kSucceeded,
  kFailed,
  kCancelled,
  kSuspended,  // holds no device, and waits for a resume: not ended
};
inline constexpr JobState kJobStates[] = {
    JobState::kQueued,  JobState::kPlacing,    JobState::kStarting, JobState::kLoading,
    JobState::kRunning, JobState::kRecovering, JobState::kStopping, JobState::kSucceeded,
    JobState::kFailed,  JobState::kCancelled,  JobState::kSuspended};

// "RUNNING"; the names of reference documentation, API and events.
std::string_view job_state_name(JobState state);
std::optional<JobState> job_state_of(std::string_view name);
bool is_final(JobState state);
// Ranks of the current epoch are wanted: STARTING, LOADING, RUNNING.
bool wants_ranks(JobState state);

struct RankPlacement {
  WorkerId worker;
  int32_t device = 0;
  // Of a start from memory: who has the copy of its state that the rank fetches; 0: it is in the
  // memory that its own worker holds for it.
  WorkerId state_from = {};
  bool operator==(const RankPlacement&) const = default;
};

// Why something is as it is: a code from a closed set for programs, a sentence for people.
struct Reason {
  std::string code;
  std::string message;
  std::string log_tail = {};  // where a rank ended: the last lines it printed, any bytes
  bool operator==(const Reason&) const = default;
};

// The first cause of the newest failure.
struct Failure {
  Reason reason;
  std::optional<Rank> rank;
  std::string worker;         // its name, or empty
  int64_t step = 0;           // last one reported before
  bool fatal = false;         // a retry cannot help
  bool host_suspect = false;  // what happened points to the host
  bool operator==(const Failure&) const = default;
};

struct StepRecord {
  JobId job;
  Epoch epoch;
  int64_t step = 0;
  double loss = 0.0;
  double grad_norm = 0.0;
  double learning_rate = 0.0;
  int64_t tokens = 0;
  double step_seconds = 0.0;
  double expert_load_max_ratio = 0.0;
  bool replayed = false;  // an earlier epoch had reached this step
  bool in_proof = false;  // trained again to be compared: no measure for another proof
  Instant finished = {};
  double mtp_loss = 0.0;
  double balance_loss = 0.0;
  double checkpoint_seconds = 0.0;  // of step_seconds: waited for saving; 0: nothing was saved
  GuardFinding guard = {};
  // Position in the job's records: grows in the order trained.
  uint64_t cursor() const { return uint64_t{epoch.value} << 32 | static_cast<uint64_t>(step); }
};

struct EvaluationRecord {
  JobId job;
  Epoch epoch;
  int64_t step = 0;
  double loss = 0.0;
  int64_t tokens = 0;
  Instant received;
};

// The newest committed checkpoint of a job.
struct CheckpointRecord {
  int64_t step = 0;
  Epoch epoch;
  std::string manifest;  // absolute path
  uint64_t bytes = 0;
  std::string weights_digest;  // hexadecimal; empty when the driver could not compute it
  Instant committed;
};

// Of a job whose spec leaves the interval between checkpoints to the coordinator.
struct SavingRecord {
  SaveMeasurements measured;
  SaveChoice choice;  // what its ranks go by; of 0 steps before the first start
  int64_t commits = 0;
  bool operator==(const SavingRecord&) const = default;
};

// A resume that is to show that steps trained before come out the same when they are trained again.
struct ProofRecord {
  int64_t steps = 0;        // at least so many
  Epoch epoch;              // no record of a newer one counts
  int64_t from = 0;         // the replay begins after this step
  int64_t through = 0;      // the last step that is recorded
  int64_t digest_step = 0;  // of a checkpoint that the replay saves again; 0: none
  int64_t compared = 0;     // steps that were equal so far
  int64_t tensors = 0;      // of checkpoints saved again that were equal so far
  int64_t saved_again = 0;  // those of steps up to this one are compared, or will not be
  bool operator==(const ProofRecord&) const = default;
};

// A rollback: steps that change nothing in any later epoch. What `epoch` or an older one saved of
// the first of them and after it is not of this training any more.
struct Rollback {
  StepRange steps;
  Epoch epoch;
  bool operator==(const Rollback&) const = default;
};

// What a job's guards did, over its life; what a replay repeats counts once.
struct GuardRecord {
  int64_t warnings = 0;
  int64_t skips = 0;
  int64_t rollbacks = 0;  // since the user last submitted or resumed: what is limited
  std::vector<Rollback> rolled_back = {};  // in the order they happened
  // Where the newest one goes back to is not settled: its first step is what was asked for.
  bool rolling_back = false;
  bool operator==(const GuardRecord&) const = default;
};

struct JobRecord {
  JobId id;
  std::string name;
  JobState state = JobState::kQueued;
  Reason reason;
  JobState outcome = JobState::kFailed;  // meaningful in STOPPING
  Instant created;
  std::optional<Instant> started;  // first time RUNNING
  std::optional<Instant> finished;
  int64_t target_steps = 0;
  Epoch epoch;           // 0 before the first start
  int64_t restarts = 0;  // recoveries over the job's life
  int64_t failures = 0;  // since the user last submitted or resumed: what max_restarts limits
  int64_t failures_without_step = 0;     // in a row; sets the back-off
  int64_t highest_step = 0;              // over all epochs
  std::vector<RankPlacement> placement;  // of `epoch`, by rank; empty: no rank of it can be left
  std::string checkpoint_dir;
  std::string restore_manifest;  // of `epoch`; empty: initial weights
  int64_t restore_step = 0;
  bool restored_from_memory = false;  // `epoch`: from what daemons held of restore_step
  int64_t replacements = 0;           // of slow ranks, since the user last submitted or resumed
  bool suspend = false;    // asked for: the epoch is to end with its state saved, as SUSPENDED
  int64_t scale_to = 0;    // the data-parallel width that the next epoch is to have; 0: as it is
  bool rebalance = false;  // asked for: experts are to move when the next checkpoint is committed
  int64_t rebalanced_step = 0;  // highest_step when experts or the layout changed; 0: never
  std::optional<SavingRecord> saving;
  std::optional<ProofRecord> proof;  // until it is decided
  GuardRecord guards;
  std::optional<CheckpointRecord> checkpoint;
  std::optional<Failure> last_failure;
  std::optional<StepRecord> last_step;
};

// Where the experts of a job are: of its epoch while ranks of that are wanted, else of the next.
struct SeatsRecord {
  JobId job;
  ExpertSeats seats;
};

// What the first ranks of a job found: every later start must find the same. With the job and not
// in its checkpoints, since no other job restores those, and since a start from initial weights
// must not change the data of steps that are recorded either.
struct DataRecord {
  JobId job;
  std::vector<DataIdentity> data;
};

// A failure that points to the host it happened on.
struct HostEvidence {
  Instant at;
  std::string code;  // of the failure
  JobId job;
  Epoch epoch;
  std::optional<Rank> rank;
  int64_t step = 0;
  std::string message;
  bool operator==(const HostEvidence&) const = default;
};

// Why a worker is not trusted with ranks.
struct Quarantine {
  Reason reason;  // one of kQuarantineCauses, and the evidence
  bool by_user = false;
  Instant since;
  std::optional<Instant> until;  // it is over then; none: not before penstock release
  bool releasing = false;        // as soon as its host has passed a check
  bool operator==(const Quarantine&) const = default;
};

struct WorkerRecord {
  WorkerId id;
  std::string name;
  uint64_t incarnation = 0;
  int32_t device_count = 0;
  bool lost = false;
  std::optional<std::string> drain = {};  // it is to have no ranks; why, which may be empty
  bool drain_done = false;                // it had none any more
  std::optional<Quarantine> quarantine = {};
  std::vector<HostEvidence> evidence = {};  // oldest first, at most kHostEvidenceMax
  bool check_due = false;                   // its host gets no ranks before it has passed a check
};

// What puts a worker in quarantine: somebody asked for it, a rank on it was found to compute
// wrongly, failures that point to it added up, its host failed a check, a rank there was slow.
inline constexpr const char* kQuarantineRequested = "requested";
inline constexpr const char* kQuarantineMiscomputes = "silent_corruption";
inline constexpr const char* kQuarantineFailures = "host_failures";
inline constexpr const char* kQuarantineCheck = "host_check";
inline constexpr const char* kQuarantineSlow = "slow_rank";
inline constexpr const char* kQuarantineCauses[] = {kQuarantineRequested, kQuarantineMiscomputes,
                                                    kQuarantineFailures, kQuarantineCheck,
                                                    kQuarantineSlow};
inline constexpr size_t kHostEvidenceMax = 8;

// One transition or noteworthy fact. The command line, the page and the metrics all read these.
struct JobEvent {
  uint64_t sequence = 0;  // over the whole cluster, from 1, without gaps
  Instant at;
  std::string actor;  // "user", "coordinator", "worker NAME"
  JobId job;          // 0: of the cluster
  std::string job_name;
  Epoch epoch;
  std::optional<Rank> rank;
  std::optional<JobState> state;  // of the job after the event; none for cluster events
  std::optional<JobState> from;   // set when the event is a transition
  Reason reason;
};

struct Record {
  std::string key;
  std::string value;
};

Record record_of(const JobRecord& job);
Record record_of(const SeatsRecord& seats);
Record record_of(const DataRecord& data);
Record record_of(const WorkerRecord& worker);
Record record_of(const StepRecord& step);
Record record_of(const EvaluationRecord& evaluation);
Record spec_record(JobId job, std::string spec_json);
Record last_job_record(JobId job);
// Both keys of an event.
std::vector<Record> records_of(const JobEvent& event);

// kDataLoss, naming the field, when the value is not what record_of writes.
Result<JobRecord> decode_job(std::string_view value);
Result<SeatsRecord> decode_seats(std::string_view value);
Result<DataRecord> decode_data(std::string_view value);
Result<WorkerRecord> decode_worker(std::string_view value);
Result<StepRecord> decode_step(std::string_view value);
Result<EvaluationRecord> decode_evaluation(std::string_view value);
Result<JobEvent> decode_event(std::string_view value);
Result<JobId> decode_last_job(std::string_view value);

// "job/000…7"; with a trailing slash where more parts follow.
std::string job_key(JobId job);
std::string spec_key(JobId job);
std::string job_event_prefix(JobId job);
std::string step_prefix(JobId job);
std::string key_number(uint64_t number);
// Of everything that is recorded of a job, but for its events in the list of all.
std::vector<std::string> prefixes_of(JobId job);
// The job named in a spec/<id> key; nullopt for another key.
std::optional<JobId> job_of_spec_key(std::string_view key);

inline constexpr std::string_view kJobPrefix = "job/";
inline constexpr std::string_view kSpecPrefix = "spec/";
inline constexpr std::string_view kSeatsPrefix = "seats/";
inline constexpr std::string_view kDataPrefix = "data/";
inline constexpr std::string_view kLastJobKey = "last-job";
inline constexpr std::string_view kWorkerPrefix = "worker/";
inline constexpr std::string_view kEventPrefix = "event/";
inline constexpr std::string_view kEvaluationPrefix = "evaluation/";
// What a coordinator is rebuilt from, beside the last event.
inline constexpr std::string_view kStatePrefixes[] = {kJobPrefix,       kSpecPrefix, kSeatsPrefix,
                                                      kDataPrefix,      kLastJobKey, kWorkerPrefix,
                                                      kEvaluationPrefix};

}  // namespace penstock
