#include "coordinator/driver/run_metrics.h"

#include <cmath>

#include "comm/base/version.h"
#include "coordinator/core/failure.h"
#include "coordinator/core/hang_verdict.h"

namespace penstock {
namespace {

const std::vector<double>& step_bounds_seconds() {
  static const std::vector<double> bounds = {0.01, 0.025, 0.05, 0.1,  0.25, 0.5,  1.0,
                                             2.5,  5.0,   10.0, 30.0, 60.0, 120.0};
  return bounds;
}

// Every cause a restart can have (coordinator/core/failure.h and the daemons' fates).
constexpr const char* kCauses[] = {
    "rank_exited",       "rank_killed",      "out_of_memory",     "peer_lost",    "data_corrupt",
    "worker_lost",       "worker_restarted", "cluster_restarted", "rank_missing", "not_found",
    "permission_denied", "start_timeout",    kCauseRankHung};
constexpr JobState kFinalStates[] = {JobState::kSucceeded, JobState::kFailed, JobState::kCancelled};

// The value of the label `run`, as workers use it too: the job's id, which is never reused.
std::string run_label(JobId job) {
  return fmt::format("{}", job);
}

double seconds_of(Instant at) {
  return static_cast<double>(at.nanoseconds) * 1e-9;
}

Counter finished_runs(MetricRegistry& registry, JobState outcome) {
  return registry.counter("penstock_coordinator_runs_finished_total", "Runs that ended.",
                          {{"outcome", std::string(job_state_name(outcome))}});
}
Histogram queue_wait(MetricRegistry& registry) {
  return registry.histogram("penstock_coordinator_queue_wait_seconds",
                            "Time from QUEUED to a placement.", {0.1, 1, 10, 60, 600, 3600, 36000});
}
Histogram journal_write(MetricRegistry& registry) {
  return registry.histogram("penstock_coordinator_journal_fsync_duration_seconds",
                            "Time to make one batch of records durable.", latency_bounds_seconds());
}
Counter rejected(MetricRegistry& registry, const std::string& kind) {
  return registry.counter("penstock_coordinator_frames_rejected_total",
                          "Control frames and connections refused because they are malformed.",
                          {{"kind", kind}});
}
Counter steps(MetricRegistry& registry, const std::string& run) {
  return registry.counter("penstock_run_steps_total", "Steps trained, replayed ones included.",
                          {{"run", run}});
}
Counter replayed_steps(MetricRegistry& registry, const std::string& run) {
  return registry.counter("penstock_run_replayed_steps_total",
                          "Steps trained again after a recovery.", {{"run", run}});
}
Counter tokens(MetricRegistry& registry, const std::string& run) {
  return registry.counter("penstock_run_tokens_total", "Tokens trained, replayed ones included.",
                          {{"run", run}});
}
Counter nonfinite_steps(MetricRegistry& registry, const std::string& run) {
  return registry.counter("penstock_run_nonfinite_steps_total",
                          "Steps whose loss or gradient norm was not finite.", {{"run", run}});
}
Counter guard_actions(MetricRegistry& registry, const std::string& run, GuardSignal signal,
                      GuardPolicy action) {
  return registry.counter("penstock_run_guard_actions_total",
                          "Steps whose loss or gradient norm a guard acted upon.",
                          {{"run", run},
                           {"signal", std::string(to_string(signal))},
                           {"action", std::string(to_string(action))}});
}
void create_guard_actions(MetricRegistry& registry, const std::string& run,
                          const GuardsSpec& guards) {
  const std::pair<GuardSignal, GuardPolicy> configured[] = {
      {GuardSignal::kNotFinite, guards.not_finite},
      {GuardSignal::kLossSpike, guards.loss_spike.policy},
      {GuardSignal::kGradNormSpike, guards.grad_norm_spike.policy}};
  for (const auto& [signal, policy] : configured) {
    const bool reported = policy == GuardPolicy::kWarn || policy == GuardPolicy::kSkip;
    if (reported) guard_actions(registry, run, signal, policy);
  }
}
Counter restarts(MetricRegistry& registry, const std::string& run, const std::string& cause) {
  return registry.counter("penstock_run_restarts_total", "Recoveries, by first cause.",
                          {{"run", run}, {"cause", cause}});
}
Counter hangs(MetricRegistry& registry, const std::string& run) {
  return registry.counter("penstock_run_hangs_total", "Attempts that ended because a rank hung.",
                          {{"run", run}});
}
Counter rebalances(MetricRegistry& registry, const std::string& run) {
  return registry.counter("penstock_run_rebalances_total",
                          "Restarts that moved experts between ranks.", {{"run", run}});
}
Counter planned_restarts(MetricRegistry& registry, const std::string& run,
                         const std::string& cause) {
  return registry.counter("penstock_run_planned_restarts_total",
                          "Restarts after a pause, which lost no step.",
                          {{"run", run}, {"cause", cause}});
}
Counter rollbacks(MetricRegistry& registry, const std::string& run) {
  return registry.counter("penstock_run_rollbacks_total",
                          "Restarts from before a step that a guard acted upon.", {{"run", run}});
}
Counter saves(MetricRegistry& registry, const std::string& run, const std::string& result) {
  return registry.counter("penstock_checkpoint_saves_total", "Checkpoints, by result.",
                          {{"run", run}, {"result", result}});
}
Histogram step_duration(MetricRegistry& registry, const std::string& run) {
  return registry.histogram("penstock_run_step_duration_seconds", "Duration of a training step.",
                            step_bounds_seconds(), {{"run", run}});
}
Histogram recovery_duration(MetricRegistry& registry, const std::string& run) {
  return registry.histogram("penstock_run_recovery_duration_seconds",
                            "Time from a failure to training again.", step_bounds_seconds(),
                            {{"run", run}});
}
Histogram save_duration(MetricRegistry& registry, const std::string& run) {
  return registry.histogram("penstock_checkpoint_save_duration_seconds",
                            "Time of one stage of saving a checkpoint.", step_bounds_seconds(),
                            {{"run", run}, {"stage", "commit"}});
}
Gauge run_gauge(MetricRegistry& registry, const char* name, const char* help,
                const std::string& run) {
  return registry.gauge(name, help, {{"run", run}});
}
Gauge batch_tokens(MetricRegistry& registry, const std::string& run) {
  return run_gauge(registry, "penstock_run_global_batch_tokens",
                   "Tokens of the newest step; before the first, of that one.", run);
}
Gauge loss(MetricRegistry& registry, const std::string& run, const char* kind) {
  return registry.gauge("penstock_run_loss", "Newest mean cross-entropy, nats per token.",
                        {{"run", run}, {"kind", kind}});
}
Gauge imbalance(MetricRegistry& registry, const std::string& run) {
  return run_gauge(registry, "penstock_run_expert_rank_load_max_ratio",
                   "Load of the most loaded rank of an expert group over the mean, of the worst "
                   "layer; as measured up to the newest checkpoint.",
                   run);
}
Gauge last_step_time(MetricRegistry& registry, const std::string& run) {
  return run_gauge(registry, "penstock_run_last_step_timestamp_seconds",
                   "When the newest step finished; before the first, when the attempt began.", run);
}
Gauge last_save_time(MetricRegistry& registry, const std::string& run) {
  return run_gauge(
      registry, "penstock_checkpoint_last_success_timestamp_seconds",
      "When the newest checkpoint was committed; before the first, when the run began.", run);
}

Counter scrubbed_bytes(MetricRegistry& registry, const std::string& run) {
  return registry.counter("penstock_checkpoint_scrubbed_bytes_total",
                          "Bytes of checkpoints read over in the background.", {{"run", run}});
}
Counter damaged(MetricRegistry& registry, const std::string& run) {
  return registry.counter("penstock_checkpoint_damaged_total",
                          "Checkpoints that reading them over found damaged.", {{"run", run}});
}
Gauge last_scrub_time(MetricRegistry& registry, const std::string& run) {
  return run_gauge(registry, "penstock_checkpoint_scrub_last_pass_timestamp_seconds",
                   "When every checkpoint of the run was last read over; 0: not yet.", run);
}
// Of the runs that have finished, all together: they are too many for series of their own.
Counter finished_scrubbed_bytes(MetricRegistry& registry) {
  return registry.counter("penstock_coordinator_finished_scrubbed_bytes_total",
                          "Bytes of finished runs' checkpoints read over in the background.");
}
Counter finished_damaged(MetricRegistry& registry) {
  return registry.counter("penstock_coordinator_finished_damaged_total",
                          "Checkpoints of finished runs that reading them over found damaged.");
}
Gauge finished_last_scrub_time(MetricRegistry& registry) {
  return registry.gauge("penstock_coordinator_finished_scrub_last_pass_timestamp_seconds",
                        "When every checkpoint of finished runs was last read over; 0: not yet.");
}

// Whether the transition is the end of an attempt because a rank hung.
bool ends_by_hang(const JobEvent& event, const JobRecord& job) {
  return wants_ranks(*event.from) && !wants_ranks(*event.state) && job.last_failure &&
         job.last_failure->reason.code == kCauseRankHung &&
         (event.reason.code == kCauseRankHung || event.reason.code == "restart_budget");
}

}  // namespace

RunMetrics::RunMetrics(MetricRegistry& registry, const Coordinator& core)
    : registry_(registry), core_(core) {
  registry_
      .gauge("penstock_build_info", "1, labelled with what is running.", {{"version", kVersion}})
      .set(1);
  for (const JobState state : kFinalStates) finished_runs(registry_, state);
  for (const char* kind : {"frame", "connection"}) rejected(registry_, kind);
  queue_wait(registry_);
  journal_write(registry_);
  finished_scrubbed_bytes(registry_);
  finished_damaged(registry_);
  finished_last_scrub_time(registry_);
  for (const auto& [id, job] : core_.jobs()) {
    if (!is_final(job.record.state)) create(job);
  }
}

void RunMetrics::create(const Job& job) {
  const JobRecord& record = job.record;
  const std::string run = run_label(record.id);
  created_[record.id] = spec_digest(job.spec);
  registry_
      .gauge("penstock_run_info", "1, labelled with what the run is.",
             {{"run", run},
              {"name", record.name},
              {"schedule", std::string(to_string(job.spec.parallelism.schedule))},
              {"spec_digest", to_hex(spec_digest(job.spec))}})
      .set(1);
  steps(registry_, run);
  replayed_steps(registry_, run);
  tokens(registry_, run);
  nonfinite_steps(registry_, run);
  create_guard_actions(registry_, run, job.spec.guards);
  for (const char* cause : kCauses) restarts(registry_, run, cause);
  hangs(registry_, run);
  rebalances(registry_, run);
  rollbacks(registry_, run);
  for (const char* result : {"committed", "failed"}) saves(registry_, run, result);
  scrubbed_bytes(registry_, run);
  damaged(registry_, run);
  last_scrub_time(registry_, run);
  step_duration(registry_, run);
  recovery_duration(registry_, run);
  save_duration(registry_, run);
  run_gauge(registry_, "penstock_run_target_steps", "Steps the run is to train.", run)
      .set(static_cast<double>(record.target_steps));
  batch_tokens(registry_, run)
      .set(static_cast<double>(job.spec.tokens_at(record.last_step ? record.last_step->step : 1)));
  run_gauge(registry_, "penstock_run_step", "Newest finished step.", run)
      .set(static_cast<double>(record.last_step ? record.last_step->step : 0));
  run_gauge(registry_, "penstock_checkpoint_last_success_step", "Step of the newest checkpoint.",
            run)
      .set(static_cast<double>(record.checkpoint ? record.checkpoint->step : 0));
  run_gauge(registry_, "penstock_checkpoint_size_bytes", "Size of the newest checkpoint.", run)
      .set(static_cast<double>(record.checkpoint ? record.checkpoint->bytes : 0));
  last_step_time(registry_, run)
      .set(seconds_of(record.last_step ? record.last_step->finished : record.created));
  last_save_time(registry_, run)
      .set(seconds_of(record.checkpoint ? record.checkpoint->committed : record.created));
  set_state(record);
}

void RunMetrics::forget(JobId job) {
  created_.erase(job);
  forget_slow(job);
  registry_.remove_series("run", run_label(job));
}

void RunMetrics::forget_slow(JobId job) {
  std::erase_if(slow_shown_, [&](const auto& shown) { return std::get<0>(shown) == job; });
}

void RunMetrics::set_state(const JobRecord& job) {
  for (const JobState state : kJobStates) {
    registry_
        .gauge("penstock_run_state", "1 for the state the run is in, 0 for the others.",
               {{"run", run_label(job.id)}, {"state", std::string(job_state_name(state))}})
        .set(state == job.state ? 1 : 0);
  }
}

void RunMetrics::observe(Instant now, const Effects& effects) {
  for (const JobEvent& event : effects.events) {
    if (event.job.value != 0) observe_event(now, event);
  }
  for (const JobId job : effects.removed_jobs) {
    if (created_.contains(job)) forget(job);
  }
  for (const StepRecord& step : effects.steps) observe_step(step);
  for (const EvaluationRecord& evaluation : effects.evaluations) {
    loss(registry_, run_label(evaluation.job), "eval").set(evaluation.loss);
  }
}

void RunMetrics::observe_event(Instant now, const JobEvent& event) {
  const Job& job = *core_.find_job(event.job);
  const std::string run = run_label(event.job);
  if (event.reason.code == "checkpoint_damaged" && is_final(job.record.state)) {
    return finished_damaged(registry_).increment();
  }
  const bool relaid = (event.reason.code == "resumed" || event.reason.code == kScaled) &&
                      created_.contains(event.job) &&
                      created_.at(event.job) != spec_digest(job.spec);
  if (relaid) forget(event.job);
  if (!created_.contains(event.job)) create(job);
  if (event.reason.code == kCauseDiverged && event.state == JobState::kFailed && event.from) {
    nonfinite_steps(registry_, run).increment();  // which rank 0 did not report
  }
  if (event.reason.code == "checkpoint_committed" && job.record.checkpoint) {
    saves(registry_, run, "committed").increment();
    run_gauge(registry_, "penstock_checkpoint_last_success_step", "Step of the newest checkpoint.",
              run)
        .set(static_cast<double>(job.record.checkpoint->step));
    run_gauge(registry_, "penstock_checkpoint_size_bytes", "Size of the newest checkpoint.", run)
        .set(static_cast<double>(job.record.checkpoint->bytes));
    last_save_time(registry_, run).set(seconds_of(now));
    if (!job.loads.empty()) {
      imbalance(registry_, run)
          .set(largest_imbalance(job.loads, job.seats, job.spec.parallelism.expert));
    }
  }
  if (event.reason.code == "checkpoint_failed") saves(registry_, run, "failed").increment();
  if (event.reason.code == "checkpoint_damaged") damaged(registry_, run).increment();
  if (!event.from) return;
  if (ends_by_hang(event, job.record)) hangs(registry_, run).increment();
  set_state(job.record);
  observe_transition(now, event);
}

void RunMetrics::observe_transition(Instant now, const JobEvent& event) {
  const std::string run = run_label(event.job);
  switch (*event.state) {
    case JobState::kQueued:
      queued_since_[event.job] = now;
      break;
    case JobState::kPlacing:
      if (const auto since = queued_since_.find(event.job); since != queued_since_.end()) {
        queue_wait(registry_).observe(to_seconds(now - since->second));
        queued_since_.erase(since);
      }
      last_step_time(registry_, run).set(seconds_of(now));
      break;
    case JobState::kRecovering:
      if (event.reason.code == kRebalancing || event.reason.code == kRollingBack) {
        const bool moves = event.reason.code == kRebalancing;
        (moves ? rebalances(registry_, run) : rollbacks(registry_, run)).increment();
        break;
      }
      if (event.reason.code == kPauseOver || event.reason.code == kDraining ||
          event.reason.code == kScaling) {
        planned_restarts(registry_, run, event.reason.code).increment();
        break;
      }
      restarts(registry_, run, event.reason.code).increment();
      recovering_since_.emplace(event.job, now);
      break;
    case JobState::kRunning:
      if (const auto since = recovering_since_.find(event.job); since != recovering_since_.end()) {
        recovery_duration(registry_, run).observe(to_seconds(now - since->second));
        recovering_since_.erase(since);
      }
      break;
    case JobState::kSucceeded:
    case JobState::kFailed:
    case JobState::kCancelled:
      finished_runs(registry_, *event.state).increment();
      recovering_since_.erase(event.job);
      queued_since_.erase(event.job);
      break;
    case JobState::kSuspended:
      recovering_since_.erase(event.job);
      queued_since_.erase(event.job);
      break;
    case JobState::kStarting:
    case JobState::kLoading:
    case JobState::kStopping:
      break;
  }
}

void RunMetrics::observe_step(const StepRecord& step) {
  const std::string run = run_label(step.job);
  run_gauge(registry_, "penstock_run_step", "Newest finished step.", run)
      .set(static_cast<double>(step.step));
  last_step_time(registry_, run).set(seconds_of(step.finished));
  const bool left_out =  // by a rollback: nothing was trained
      step.guard.signal == GuardSignal::kNone && step.guard.action == GuardPolicy::kSkip;
  if (left_out) return;
  steps(registry_, run).increment();
  if (step.replayed) replayed_steps(registry_, run).increment();
  tokens(registry_, run).increment(static_cast<double>(std::max<int64_t>(0, step.tokens)));
  if (!std::isfinite(step.loss) || !std::isfinite(step.grad_norm)) {
    nonfinite_steps(registry_, run).increment();
  }
  if (step.guard.signal != GuardSignal::kNone) {
    guard_actions(registry_, run, step.guard.signal, step.guard.action).increment();
  }
  step_duration(registry_, run).observe(step.step_seconds);
  batch_tokens(registry_, run).set(static_cast<double>(step.tokens));
  loss(registry_, run, "train").set(step.loss);
  run_gauge(registry_, "penstock_run_grad_norm", "Global gradient norm before clipping.", run)
      .set(step.grad_norm);
  run_gauge(registry_, "penstock_run_learning_rate", "Learning rate of the newest step.", run)
      .set(step.learning_rate);
}

// Of a rank that is slow, and 0 of one that was.
void RunMetrics::show_slow_ranks() {
  const auto gauge = [&](JobId job, Rank rank, const std::string& node) {
    return registry_.gauge(
        "penstock_run_slow_rank_ratio",
        "Time that a slow rank computes over that of those that do the same; 0: "
        "slow no more.",
        {{"run", run_label(job)}, {"rank", fmt::format("{}", rank)}, {"node", node}});
  };
  for (const auto& [job, rank, node] : slow_shown_) gauge(job, rank, node).set(0);
  for (const auto& [id, spec] : created_) {
    const Job& job = *core_.find_job(id);
    for (const auto& [rank, slow] : job.slow) {
      const WorkerId worker = job.record.placement[static_cast<size_t>(rank.value)].worker;
      const std::string& node = core_.find_worker(worker)->record.name;
      gauge(id, rank, node).set(slow.ratio);
      slow_shown_.insert({id, rank, node});
    }
  }
}

void RunMetrics::refresh_workers() {
  std::map<std::string, double> workers = {
      {"up", 0}, {"silent", 0}, {"quarantined", 0}, {"lost", 0}};
  double free_devices = 0;
  double held_devices = 0;
  double drained_devices = 0;
  double quarantined_devices = 0;
  std::map<std::string, double> quarantines;
  for (const char* cause : kQuarantineCauses) quarantines[cause] = 0;
  for (const auto& [id, worker] : core_.workers()) {
    const bool is_up = worker.state == WorkerState::kUp;
    const bool quarantined = worker.record.quarantine || (is_up && worker.record.check_due);
    if (worker.record.quarantine) ++quarantines[worker.record.quarantine->reason.code];
    ++workers[!is_up                    ? "lost"
              : core_.is_silent(worker) ? "silent"
              : quarantined             ? "quarantined"
                                        : "up"];
    if (is_up) {
      const auto free = static_cast<double>(core_.free_devices(id).size());
      (quarantined           ? quarantined_devices
       : worker.record.drain ? drained_devices
                             : free_devices) += free;
      held_devices += worker.record.device_count - free;
    }
    registry_
        .gauge("penstock_coordinator_worker_last_heartbeat_timestamp_seconds",
               "When the worker was last heard.", {{"node", worker.record.name}})
        .set(seconds_of(worker.last_seen));
    if (!worker.clock_behind) continue;
    registry_
        .gauge("penstock_coordinator_worker_clock_offset_seconds",
               "By how much the worker's clock is ahead of the coordinator's.",
               {{"node", worker.record.name}})
        .set(-to_seconds(*worker.clock_behind));
  }
  for (const auto& [cause, count] : quarantines) {
    registry_
        .gauge("penstock_coordinator_quarantined_workers", "Workers in quarantine, by cause.",
               {{"cause", cause}})
        .set(count);
  }
  const auto set = [&](const char* name, const char* help, const char* state, double value) {
    registry_.gauge(name, help, {{"state", state}}).set(value);
  };
  for (const auto& [state, count] : workers) {
    set("penstock_coordinator_workers", "Worker daemons known, by state.", state.c_str(), count);
  }
  set("penstock_coordinator_devices", "Devices of workers that are up.", "free", free_devices);
  set("penstock_coordinator_devices", "Devices of workers that are up.", "held", held_devices);
  set("penstock_coordinator_devices", "Devices of workers that are up.", "drained",
      drained_devices);
  set("penstock_coordinator_devices", "Devices of workers that are up.", "quarantined",
      quarantined_devices);
}

void RunMetrics::refresh(Instant now) {
  show_slow_ranks();
  std::map<JobState, int> runs;
  for (const auto& [id, job] : core_.jobs()) ++runs[job.record.state];
  for (const JobState state : kJobStates) {
    registry_
        .gauge("penstock_coordinator_runs", "Runs known, by state.",
               {{"state", std::string(job_state_name(state))}})
        .set(runs[state]);
  }
  refresh_workers();
  std::erase_if(created_, [&](const auto& entry) {
    const JobId id = entry.first;
    const JobRecord& job = core_.find_job(id)->record;
    const bool over = job.finished && now - *job.finished > kSeriesGrace;
    if (over) {
      registry_.remove_series("run", run_label(id));
      forget_slow(id);
    }
    return over;
  });
}

void RunMetrics::observe_write(Duration took) {
  journal_write(registry_).observe(to_seconds(took));
}

void RunMetrics::observe_commit(JobId job, Duration took) {
  save_duration(registry_, run_label(job)).observe(to_seconds(took));
}

void RunMetrics::observe_scrub(JobId id, uint64_t bytes) {
  const Job* job = core_.find_job(id);
  if (job == nullptr) return;
  const bool finished = is_final(job->record.state);
  if (!finished && !created_.contains(id)) return;
  (finished ? finished_scrubbed_bytes(registry_) : scrubbed_bytes(registry_, run_label(id)))
      .increment(static_cast<double>(bytes));
}

void RunMetrics::observe_scrub_pass(JobId job, Instant now) {
  if (created_.contains(job)) last_scrub_time(registry_, run_label(job)).set(seconds_of(now));
}

void RunMetrics::observe_finished_scrub_pass(Instant now) {
  finished_last_scrub_time(registry_).set(seconds_of(now));
}

void RunMetrics::frame_rejected(const std::string& kind) {
  rejected(registry_, kind).increment();
}

}  // namespace penstock
