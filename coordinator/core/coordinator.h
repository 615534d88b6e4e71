// The coordinator's decisions: jobs, gangs, epochs, recovery, checkpoints. Decides; never acts.
//
//   submit                         processes run    ranks ready
//   ──► QUEUED ─► PLACING ─► STARTING ──────► LOADING ──────► RUNNING
//         ▲          ▲          │                │               │   │ every rank finished
//         │          │          └──────┬─────────┴───────────────┘   ▼
//         │          └─ RECOVERING ◄───┘ rank or worker lost     STOPPING ─► SUCCEEDED
//         │                                  fatal cause, budget used up ─► STOPPING ─► FAILED
//         └── resume: FAILED, CANCELLED, SUSPENDED            cancel ─► STOPPING ─► CANCELLED
//                           suspend, once the state is saved ─► STOPPING ─► SUSPENDED
//
// RUNNING ─► RECOVERING is also how experts move between ranks (planned, at a checkpoint), and how
// a guard takes steps back; neither is a failure.
//
// Fencing: a job's epoch grows by one per start. STOPPING and RECOVERING order StopRanks(epoch)
// from every worker of the placement and last until each has answered RanksStopped, or is lost, or
// is silent while another has answered. Only then may devices be given away or a new epoch be
// placed.
//
// A worker that is silent is not lost: its ranks may train, and nothing is done about it. It is
// lost when its host proves that it is gone, or when its lease is over, by which its ranks have
// ended by themselves (comm/control/lease_file.h). An epoch needs all its ranks for every step:
// where some are known to have ended, it makes no progress any more whatever the others do, so its
// job waits for no silent worker. Nothing that such ranks report or save is accepted (their epoch
// is lower), and the first thing their worker hears when it is back is the order to stop them.
//
// Every order is repeated until what workers report shows it done, so that any message may be lost.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "coordinator/core/effects.h"
#include "coordinator/core/job.h"
#include "coordinator/core/placement.h"
#include "coordinator/plan/expert_placement.h"

namespace penstock {

struct CoreConfig {
  std::string checkpoint_root;  // jobs without checkpoint.dir get <root>/<job id>; absolute
  Duration heartbeat_interval = std::chrono::seconds(1);
  int silent_beats = 3;  // a worker is silent after this many without a word
  // A silent worker is lost when this and the margin have passed: by then its ranks have ended,
  // also where nobody can tell them to, because it has heard nothing for the lease.
  Duration lease = std::chrono::seconds(15);
  Duration lease_margin = std::chrono::seconds(2);    // for ranks to notice, and end
  Duration startup_grace = std::chrono::seconds(10);  // for workers to come back after a restart
  Duration start_timeout = std::chrono::seconds(60);  // for every rank process to exist
  Duration checkpoint_timeout =
      std::chrono::minutes(10);                      // from a round's first segment to its last
  Duration backoff_first = std::chrono::seconds(1);  // after two failures in a row without a step
  Duration backoff_most = std::chrono::seconds(30);
  Duration forget_worker_after =
      std::chrono::minutes(10);  // lost longer: its devices count no more
  // So many failures that point to one host, within that time, put its worker in quarantine, for as
  // long again; 0: never.
  int64_t quarantine_failures = 3;
  Duration quarantine_window = std::chrono::hours(1);
  double slow_ratio = 1.5;                       // as in SlowLimits; 0: no rank is ever slow
  Duration slow_span = std::chrono::seconds(3);  // of a window, at least
  Duration clock_offset_most = std::chrono::milliseconds(500);  // before it is an event
};

// What start() rebuilds from.
struct StoredState {
  std::vector<Record> records;       // every one under kStatePrefixes
  uint64_t last_event_sequence = 0;  // 0: no event yet
};

// Reads no clock, socket, file or random source: all arrive as arguments, so a seed replays a
// cluster. Not thread-safe: only the coordinator's loop calls it.
class Coordinator {
 public:
  explicit Coordinator(CoreConfig config) : config_(std::move(config)) {}

  // Once, first. kDataLoss names the damaged record.
  Result<Effects> start(Instant now, const StoredState& stored);
  Effects step(Instant now, const Event& event);

  const std::map<JobId, Job>& jobs() const { return jobs_; }
  const std::map<WorkerId, Worker>& workers() const { return workers_; }
  const Job* find_job(JobId id) const;
  const Worker* find_worker(WorkerId id) const;
  const Worker* find_worker(const std::string& name) const;
  // By name, or by decimal id; of several jobs with one name the newest.
  const Job* find_job(const std::string& id_or_name) const;
  // Devices of a worker that no placement holds.
  std::vector<int32_t> free_devices(WorkerId id) const;
  // Whether that process of that worker counts as up, so that its pulses are taken note of.
  bool hears(WorkerId id, uint64_t incarnation) const;
  // Not heard for some beats, and not lost yet.
  bool is_silent(const Worker& worker) const;
  uint64_t last_event_sequence() const { return event_sequence_; }
  // What RebalanceJob would do by the newest measured load. kFailedPrecondition says why it would
  // do nothing.
  Result<ExpertBalance> rebalance_plan(const Job& job) const;

 private:
  // coordinator_commands.cc: what clients ask for.
  void on_event(const SubmitJob& submit);
  void on_event(const CancelJob& cancel);
  void on_event(const ResumeJob& resume);
  void on_event(const RemoveJob& remove);
  void on_event(const CheckpointsRemoved& removed);
  void erase_job(JobId id, RequestId request, bool checkpoints);
  Status check_submission(const JobSpec& spec, JobId resumed) const;
  Status check_resume(const Job& job, const ResumeJob& resume) const;
  void adopt_spec(Job& job, const JobSpec& spec);

  // coordinator_pauses.cc: epochs that end with their state saved, because somebody wants it.
  void on_event(const SuspendJob& suspend);
  std::optional<Reason> wanted_pause(const Job& job) const;
  void pause_when_wanted(Job& job);
  void on_paused(Job& job, int64_t step);
  void end_for_pause(Job& job);
  void on_save_failed(Job& job, const std::string& reason);
  bool suspend_unplaced(Job& job);

  // coordinator_drains.cc: workers that are to have no ranks.
  void on_event(const DrainWorker& drain);
  void conclude_drain(Worker& worker);
  bool is_idle(const Worker& worker) const;
  void release_when_idle(const Worker& worker);
  void on_message(Worker& worker, const WorkerLeaving& message);
  void on_left(Worker& worker);
  const Worker* drained_host(const Job& job) const;
  static std::string drained_words(const Worker& worker);

  // coordinator_health.cc: workers whose hosts are not trusted with ranks.
  void on_event(const QuarantineWorker& quarantine);
  void blame_host(Job& job, Failure failure);
  void suspect(const Job& job, const Failure& failure);
  void exonerate(const Job& job, const Failure& failure);
  std::vector<HostEvidence> counted_evidence(const Worker& worker) const;
  std::string why_trusted_on(const Worker& worker) const;
  void quarantine_unless_needed(Worker& worker, Reason reason, std::optional<Instant> until);
  void put_in_quarantine(Worker& worker, Quarantine quarantine, const std::string& actor);
  void readmit(Worker& worker, const std::string& actor, const std::string& why);
  void release_when_sound(Worker& worker, const std::string& actor);
  void ask_for_check(Worker& worker);
  void on_message(Worker& worker, const HostChecked& message);
  void refuse_host(Worker& worker, const std::string& report);
  bool awaits_check(const Job& job) const;
  void compare_clock(Worker& worker, Instant sent);
  bool is_being_checked(const Worker& worker) const;
  void watch_health(Worker& worker);

  // coordinator_pace.cc: ranks that the others wait for.
  void forget_pace(Job& job);
  void watch_pace(Job& job);
  void note_pace(Job& job, Rank rank, const RankPaceVerdict& verdict);
  void replace_slow(Job& job, Rank rank);
  std::string why_slow_stays(const Job& job, const Worker& worker) const;

  // coordinator_scaling.cc: other data-parallel widths.
  void on_event(const ScaleJob& scale);
  Status check_scaling(const Job& job, const JobSpec& next) const;
  void ask_to_scale(Job& job, const JobSpec& next, const std::string& actor,
                    const std::string& why);
  bool scale_unplaced(Job& job);
  std::optional<std::vector<RankPlacement>> place_narrower(Job& job);
  void grow_at_checkpoint(Job& job);

  // coordinator_experts.cc: where experts are.
  void on_event(const RebalanceJob& rebalance);
  void on_message(Worker& worker, const ExpertLoadReport& message);
  void rebalance_at_checkpoint(Job& job, int64_t step);
  Result<ExpertBalance> measured_balance(const Job& job) const;
  ExpertSeats seats_for(const Job& job, int64_t pipeline_index) const;

  // coordinator_saves.cc: the interval between checkpoints, where the spec leaves it to us.
  void measure_step(Job& job, const StepRecord& step);
  void measure_commit(Job& job, int64_t step);
  void choose_interval(Job& job);
  static int64_t save_interval_of(const Job& job);  // REQUIRES: JobRecord::saving
  void send_save_interval(const Job& job);
  std::optional<int64_t> next_save_step(const Job& job) const;

  // coordinator_hangs.cc: jobs that have been silent for too long.
  void heard_of(Job& job);
  void watch_for_hang(Job& job);
  void on_message(Worker& worker, const RanksInspected& message);
  void conclude_inquiry(Job& job);
  Duration patience_of(const Job& job) const;

  // coordinator_memory.cc: going on from what daemons hold of the ranks that ended.
  static bool wants_held_state(const Job& job);
  using Usable = std::map<WorkerId, std::vector<int32_t>>;  // workers, and their free devices
  void keep_held(Job& job, WorkerId worker, const RanksStopped& message);
  Usable usable_workers() const;
  static std::optional<WorkerId> copy_of(const Job& job, Rank rank, int64_t step,
                                         const Usable& usable);
  static std::optional<int64_t> held_step(const Job& job, const Usable& usable);
  std::optional<std::vector<RankPlacement>> held_placement(Job& job, int64_t step) const;
  std::string start_source(const Job& job) const;
  std::string copies_used(const Job& job) const;
  static void forget_held(Job& job, WorkerId worker);
  bool restore_from_held(Job& job);
  void drop_held(Job& job, const std::set<WorkerId>& kept);
  void let_go_of_held(const Worker& worker, const RanksStopped& message);

  // coordinator_mirrors.cc: copies of ranks' state in other workers' memory.
  static bool wants_mirror(const Job& job);
  std::map<Rank, WorkerId> choose_buddies(const Job& job) const;
  static int64_t mirror_lead(const Job& job);
  void keep_mirroring(Job& job);
  void send_mirror(const Job& job, WorkerId worker);
  void catch_up(Job& job, const RanksMirrored& message);
  void on_message(Worker& worker, const RanksMirrored& message);

  // coordinator_proof.cc: a resume that compares the steps it trains again with what is recorded.
  Status begin_proof(Job& job, int64_t steps);
  void place_proof(Job& job, const CheckpointFound& found);
  void refuse_proof(Job& job, const CheckpointFound& found);
  void read_proof(Job& job, int64_t after);
  void read_more(const Job& job);
  void on_event(const StepsRead& read);
  void compare_step(Job& job, const StepRecord& step);
  bool waits_for_proof(Job& job, int64_t step);
  void compare_checkpoint(Job& job, const CheckpointDone& done);
  void conclude_proof(Job& job);
  void fail_proof(Job& job, std::string message);
  void drop_proof(Job& job);

  // coordinator_guards.cc: steps whose loss or gradient norm is out of the ordinary.
  void note_guard(Job& job, const StepRecord& step);
  void roll_back(Job& job, const StepReport& found);
  void settle_rollback(Job& job, const CheckpointFound& found);
  static std::vector<StepRange> left_out_of(const Job& job);

  // coordinator.cc: starting, one step, and what others may ask.
  Status load(const StoredState& stored);
  void resume_watch(Job& job);

  // coordinator_workers.cc: registration, heartbeats, silence.
  void on_event(const WorkerMessage& event);
  void on_event(const WorkerPulse& pulse);
  void on_event(const WorkerGone& gone);
  void on_event(const Tick& tick);
  void on_register(const std::string& peer, const Register& message);
  std::string refusal_of(const Register& message) const;
  void adopt_connection(Worker& worker, const std::string& peer, const Register& message);
  bool proves_alive(Worker& worker, const std::string& peer, const Register& message);
  void on_new_incarnation(Worker& worker, bool cluster_restarted);
  void observe_ranks(Worker& worker, const std::vector<RankStatus>& ranks);
  void observe_rank(Worker& worker, const RankStatus& status);
  void hear(Worker& worker);
  bool lease_is_over(const Worker& worker) const;
  Failure failure_of_silent(const Worker& worker) const;
  void do_without_silent(Job& job);
  Registered welcome(WorkerId id, uint64_t heard_sequence = 0) const;
  void stop_stale(Worker& worker);
  void lose_worker(Worker& worker, const std::string& why);
  void repeat_orders(Job& job);
  void check_deadlines(Job& job);
  void advance(Job& job);

  // coordinator_runs.cc: what ranks report. Each drops what is not of the current epoch or not from
  // the worker that hosts the rank.
  void on_message(Worker& worker, const Heartbeat& message);
  void on_message(Worker& worker, const RankReady& message);
  void on_message(Worker& worker, const RankExited& message);
  void on_message(Worker& worker, const RanksStopped& message);
  void on_message(Worker& worker, const StepReport& message);
  void on_message(Worker& worker, const EvaluationReport& message);
  void on_message(Worker& worker, const SegmentSaved& message);
  void on_message(Worker& worker, const SaveFailed& message);
  void on_message(Worker& worker, const RankFinished& message);
  void on_message(Worker& worker, const LogChunk& message);
  void on_event(const CheckpointDone& done);
  void on_event(const CheckpointDamaged& damaged);
  void commit_round(Job& job, int64_t step);
  void drop_overtaken_rounds(Job& job, int64_t committed_step);
  void fail_round(Job& job, int64_t step, const std::string& reason);
  void tell_outcome(Job& job, int64_t step, bool committed, const std::string& reason);
  void check_finished(Job& job);

  // coordinator_jobs.cc: the state machine.
  void transition(Job& job, JobState to, std::string actor, Reason reason,
                  std::optional<Rank> rank = std::nullopt);
  void note(const Job& job, std::string actor, Reason reason,
            std::optional<Rank> rank = std::nullopt);
  JobEvent event_of(const Job& job, std::string actor, std::optional<Rank> rank) const;
  void note_cluster(std::string actor, Reason reason);
  void append_event(JobEvent event);
  void on_event(const CheckpointFound& found);
  void schedule();
  bool ready_to_place(Job& job);
  std::vector<FreeDevices> free_on_workers(bool drained_too = false) const;
  std::string why_no_room(const Job& job) const;
  void start_epoch(Job& job, std::vector<RankPlacement> placement);
  void send_start(const Job& job, Rank rank);
  void begin_training(Job& job);
  void send_begin(const Job& job, WorkerId worker);
  void fail(Job& job, Failure failure);
  void stop_epoch(Job& job, JobState state, JobState outcome, int64_t grace_ms, std::string actor,
                  Reason reason, std::optional<Rank> rank = std::nullopt);
  void await_stops(Job& job);
  void send_stop(const Job& job, WorkerId worker);
  void worker_stopped(Job& job, WorkerId worker);
  void settle(Job& job);
  void hold_devices(const Job& job);
  void release_devices(Job& job);
  void wait(Job& job, Reason reason);
  Duration backoff(const Job& job) const;

  // Shared helpers.
  Job* current_epoch(JobId job, Epoch epoch);
  RankView* hosted_rank(Job& job, Rank rank, WorkerId worker);
  void send(WorkerId worker, ControlMessage message);
  void changed(Job& job) { changed_jobs_.insert(job.record.id); }
  std::string worker_name(WorkerId id) const;
  std::set<WorkerId> hosts(const Job& job) const;
  Duration two_beats() const { return 2 * config_.heartbeat_interval; }
  Effects finish_step();

  const CoreConfig config_;
  std::map<JobId, Job> jobs_;
  std::set<JobId> open_jobs_;  // not final
  std::map<WorkerId, Worker> workers_;
  std::map<std::string, WorkerId> worker_by_peer_;
  std::map<std::string, WorkerId> worker_by_name_;
  JobId last_job_;  // no job had a higher id
  uint64_t event_sequence_ = 0;
  Instant last_tick_;

  // Of the step in progress.
  Instant now_;
  Instant arrived_;  // of the message that is being taken in, by this host's clock as it is set
  Effects effects_;
  std::set<JobId> changed_jobs_;  // to be written, synced
  std::set<JobId> relaxed_jobs_;  // to be written, not synced
  bool schedule_needed_ = false;
};

}  // namespace penstock
