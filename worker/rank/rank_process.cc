#include "worker/rank/rank_process.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <optional>

#include "checkpoint/saved_slice.h"
#include "comm/base/clock.h"
#include "comm/base/log.h"
#include "comm/data/ucx_transport.h"
#include "worker/engine/engine.h"
#include "worker/model/linear.h"
#include "worker/rank/control_link.h"
#include "worker/rank/state_fetch.h"
#include "worker/rank/trainer.h"

namespace penstock {
namespace {

constexpr Duration kStartTimeout = std::chrono::seconds(30);

// A peer that hangs is the coordinator's to find, which says more about it: the transport gives up
// later than that.
Duration transport_timeout(const RecoverySpec& recovery) {
  return std::max<Duration>(UcxOptions().timeout,
                            2 * kSlowPhaseFactor * std::chrono::seconds(recovery.hang_timeout));
}

// What a rank holds between StartRank and its exit. Members in the order they need each other.
struct RankRun {
  const RankProcessOptions& options;
  ControlLink& link;
  FlightRecorder& flight;
  StartRank start;
  JobSpec spec = {};
  std::unique_ptr<UcxTransport> transport = {};
  std::unique_ptr<Kernels> kernels = {};
  std::optional<Sampler> training = {};
  std::optional<Sampler> validation = {};
  std::unique_ptr<Engine> engine = {};
  // Of the newest save after which the rank pauses; read by the saver.
  std::atomic<int64_t> pause_step = -1;
};

// What a reader of this rank's log wants to know first: who it is, where, and which part of the
// model it holds.
void log_place(const RankRun& run) {
  std::array<char, 256> host{};
  if (::gethostname(host.data(), host.size() - 1) != 0) host[0] = '\0';
  const RankLayout& layout = run.engine->layout();
  std::string stages;
  for (const LocalStage& stage : layout.stages) {
    stages += fmt::format("{}{}", stages.empty() ? "" : " and ", stage.stage);
  }
  log_info(
      "job {} epoch {}: rank {} of {} on {}, process {}; pipeline {}, data {}, expert {}; "
      "stage{} {}; {:.1f} MiB",
      run.options.job, run.options.epoch, run.options.rank, layout.world.size(), host.data(),
      ::getpid(), layout.position.pipeline_index, layout.position.data_index,
      layout.position.expert_index, layout.stages.size() > 1 ? "s" : "", stages,
      static_cast<double>(run.engine->memory_bytes()) / (1 << 20));
}

// Found out at the start rather than after the last step. The coordinator makes the directory
// before it orders rank 0; other ranks may come before that.
Status check_checkpoint_dir(const RankRun& run) {
  const std::string& dir = run.start.checkpoint_dir;
  if (run.options.rank.value != 0 || ::access(dir.c_str(), W_OK | X_OK) == 0) return {};
  return errno_status(errno, fmt::format("save checkpoints in {} (checkpoint.dir)", dir));
}

// Empty: in the rank's own memory. So also where the daemon's is closed to the rank, as /proc is
// when the daemon has capabilities by its file: training needs it no more than a daemon without it.
Path state_file_of(const RankRun& run) {
  const Path& file = run.options.state_file;
  if (!run.spec.recovery.from_memory || file.empty()) return {};
  if (::access(file.c_str(), R_OK | W_OK) == 0) return file;
  log_warning("what this rank trains will not outlive it in memory: {}",
              errno_status(errno, file.string()).message());
  return {};
}

Status load(RankRun& run) {
  PENSTOCK_TRY_ASSIGN(run.spec, parse_job_spec(run.start.spec_json,
                                               fmt::format("spec of job {}", run.options.job)));
  PENSTOCK_TRY(check_checkpoint_dir(run));
  const auto world_size = static_cast<int32_t>(run.spec.parallelism.world_size());
  PENSTOCK_TRY_ASSIGN(run.transport,
                      UcxTransport::create({.rank = run.options.rank,
                                            .world_size = world_size,
                                            .epoch = run.options.epoch,
                                            .timeout = transport_timeout(run.spec.recovery)}));
  run.kernels = make_kernels(run.spec.training.precision);
  PENSTOCK_TRY_ASSIGN(run.training, open_training_sampler(run.spec));
  if (!run.spec.data.validation.empty()) {
    PENSTOCK_TRY_ASSIGN(run.validation, open_validation_sampler(run.spec));
  }
  const Path state_file = state_file_of(run);
  if (!run.start.state_from.address.empty()) PENSTOCK_TRY(fetch_state(run.start, state_file));
  PENSTOCK_TRY_ASSIGN(
      run.engine, Engine::create(run.spec, run.options.rank, run.start.program, *run.kernels,
                                 run.transport.get(), *run.training,
                                 run.validation ? &*run.validation : nullptr, {}, run.start.seats,
                                 &run.flight, {run.options.job, state_file}));
  log_place(run);
  if (!run.options.trace_file.empty()) {
    const Status kept = run.engine->recorder().keep_in(run.options.trace_file, run.options.job,
                                                       run.options.epoch, run.options.rank);
    if (!kept.ok()) log_warning("no trace of this rank: {}", kept.to_string());
  }
  if (run.start.from_memory) {
    PENSTOCK_TRY(run.engine->restore_held(run.start.restore_step));
    log_info("going on from the state of step {}, held in memory", run.start.restore_step);
    return {};
  }
  if (run.start.restore_manifest.empty()) {
    PENSTOCK_TRY(run.engine->initialize());
    if (run.spec.checkpoint.init_from.empty()) {
      log_info("initial weights from seed {}", run.spec.training.seed);
    } else {
      log_info("initial weights from {}", run.spec.checkpoint.init_from);
    }
    return {};
  }
  const int64_t begin = monotonic_ns();
  PENSTOCK_TRY_ASSIGN(
      const LoadReport loaded,
      run.engine->restore(run.start.restore_manifest, run.options.job, run.start.restore_step));
  log_info("restored step {} from {}: {} bytes in {:.3f} s", run.start.restore_step,
           run.start.restore_manifest, loaded.bytes_loaded,
           to_seconds(Duration(monotonic_ns() - begin)));
  return {};
}

// The step up to which the state is on disk.
int64_t saved_step_of(const RankRun& run) {
  return run.start.from_memory ? run.start.saved_step : run.start.restore_step;
}

// Every rank says what it found: hosts may have different files under one name.
std::vector<DataIdentity> data_of(const RankRun& run) {
  std::vector<DataIdentity> data;
  for (const std::optional<Sampler>* sampler : {&run.training, &run.validation}) {
    if (!*sampler) continue;
    for (const SamplerSource& source : (*sampler)->sources()) {
      const IndexedDataset& opened = *source.data;
      data.push_back({opened.prefix(), opened.token_count(), opened.digest()});
      log_info("{}: {} tokens, digest {}", opened.prefix(), opened.token_count(),
               to_hex(data.back().digest));
    }
  }
  return data;
}

RankProgress progress_of(const RankRun& run, const StepResult& result, double checkpoint_seconds) {
  return {.job = run.options.job,
          .epoch = run.options.epoch,
          .rank = run.options.rank,
          .step = result.step,
          .step_seconds = result.times.total_seconds + checkpoint_seconds,
          .compute_seconds = result.times.compute_seconds,
          .expert_wait_seconds = result.times.expert_wait_seconds,
          .pipeline_wait_seconds = result.times.pipeline_wait_seconds,
          .reduce_seconds = result.times.reduce_seconds,
          .optimizer_seconds = result.times.optimizer_seconds,
          .checkpoint_seconds = checkpoint_seconds,
          .bytes_sent = run.engine->bytes_sent(),
          .arena_bytes = run.engine->memory_bytes()};
}

void report_step(const RankRun& run, const StepResult& result, double checkpoint_seconds) {
  if (run.options.rank.value == 0) {
    run.link.send(StepReport{.job = run.options.job,
                             .epoch = run.options.epoch,
                             .step = result.step,
                             .loss = result.loss,
                             .grad_norm = result.grad_norm,
                             .learning_rate = result.learning_rate,
                             .tokens = result.tokens,
                             .step_seconds = result.times.total_seconds + checkpoint_seconds,
                             .expert_load_max_ratio = result.expert_load_max_ratio,
                             .finished_at_ns = wall_now().nanoseconds,
                             .mtp_loss = result.prediction_loss,
                             .balance_loss = result.balance_loss,
                             .checkpoint_seconds = checkpoint_seconds,
                             .guard = result.guard});
    if (result.guard.signal != GuardSignal::kNone) {
      log_warning("step {}, policy {}: {}", result.step, to_string(result.guard.action),
                  words_of(result.guard));
    }
    log_info("step {} loss {:.4f} grad norm {:.3f} lr {:.3g} {:.0f} tokens/s", result.step,
             result.loss, result.grad_norm, result.learning_rate,
             static_cast<double>(result.tokens) / result.times.total_seconds);
  }
  run.link.send(progress_of(run, result, checkpoint_seconds));
}

// Every rank has found the same; rank 0 says so. The coordinator ends the attempt, and starts the
// next one from before.
void await_rollback(const RankRun& run, int64_t step, const GuardFinding& finding) {
  if (run.options.rank.value == 0) {
    log_warning("step {}, policy rollback: {}", step, words_of(finding));
    run.link.send(StepReport{.job = run.options.job,
                             .epoch = run.options.epoch,
                             .step = step,
                             .loss = finding.value,
                             .finished_at_ns = wall_now().nanoseconds,
                             .guard = finding});
  }
  run.link.wait_stop();
}

void report_evaluation(const RankRun& run, int64_t step, const EvaluationResult& result) {
  if (run.options.rank.value != 0) return;
  log_info("step {} held-out loss {:.4f}", step, result.loss);
  run.link.send(EvaluationReport{.job = run.options.job,
                                 .epoch = run.options.epoch,
                                 .step = step,
                                 .loss = result.loss,
                                 .tokens = result.tokens});
}

// Sent before the segment is, so that the coordinator has it when the checkpoint is whole.
void report_expert_loads(const RankRun& run, int64_t step) {
  if (run.spec.parallelism.expert == 1 || !experts_can_move(run.spec.model)) return;
  ExpertLoads loads = run.engine->expert_loads();
  if (loads.empty()) return;
  run.link.send(ExpertLoadReport{run.options.job, run.options.epoch, run.options.rank, step,
                                 std::move(loads)});
}

void report_segment(const RankRun& run, int64_t step, const Result<SegmentSummary>& saved) {
  if (saved.ok()) {
    log_info("saved the checkpoint of step {}: {}, {} bytes", step, saved->file, saved->byte_count);
    SegmentSaved message =
        to_segment_saved({run.options.job, run.options.epoch, run.options.rank, step}, *saved);
    message.pauses = run.pause_step == step;
    run.link.send(std::move(message));
    return;
  }
  log_warning("could not save the checkpoint of step {}: {}", step, saved.status().to_string());
  run.link.send(SaveFailed{.job = run.options.job,
                           .epoch = run.options.epoch,
                           .rank = run.options.rank,
                           .step = step,
                           .reason = saved.status().to_string()});
}

// The coordinator ends the attempt when the checkpoint is committed. Orders that came meanwhile
// meant this pause.
bool await_pause_end(const RankRun& run, int64_t step) {
  const Status committed = run.link.wait_outcome(step);
  if (committed.ok()) run.link.wait_stop();
  if (run.link.stop_requested()) return true;
  log_warning("trains on after step {}: {}", step, committed.message());
  run.link.forget_pause();
  return false;
}

Status train_and_finish(RankRun& run) {
  run.link.send(RankReady{run.options.job, run.options.epoch, run.options.rank,
                          run.transport->address(), data_of(run)});
  run.flight.begin_phase(FlightPhase::kReady, run.engine->state().step());
  PENSTOCK_TRY_ASSIGN(const BeginTraining begin, run.link.wait_begin());
  run.flight.begin_phase(FlightPhase::kConnecting, run.engine->state().step());
  PENSTOCK_TRY(run.transport->connect(begin.addresses));
  PENSTOCK_TRY(run.engine->align_clock());
  if (run.start.from_memory || !run.start.restore_manifest.empty()) {
    PENSTOCK_TRY(run.engine->complete_restore());
  }
  log_info("every rank is ready; training from step {} to {}", run.engine->state().step() + 1,
           run.spec.training.steps);
  const TrainerHooks hooks{
      .on_step = [&](const StepResult& result, double saving) { report_step(run, result, saving); },
      .on_evaluation =
          [&](int64_t step, const EvaluationResult& result) {
            report_evaluation(run, step, result);
          },
      .before_save =
          [&](int64_t step, bool pauses) {
            if (pauses) run.pause_step = step;
            report_expert_loads(run, step);
          },
      .on_segment = [&](int64_t step,
                        const Result<SegmentSummary>& saved) { report_segment(run, step, saved); },
      .wait_for_commit = [&](int64_t step) { return run.link.wait_outcome(step); },
      .stop_requested = [&] { return run.link.stop_requested(); },
      .save_interval = [&] { return run.link.save_interval().value_or(run.start.save_interval); },
      .newest_outcome = [&] { return run.link.newest_outcome(); },
      .roll_back = [&](int64_t step,
                       const GuardFinding& finding) { await_rollback(run, step, finding); },
      .pause_requested = [&] { return run.link.pause_requested(); },
      .pause = [&](int64_t step) { return await_pause_end(run, step); }};
  PENSTOCK_TRY_ASSIGN(const TrainingEnd end,
                      train(run.spec, *run.engine,
                            {.job = run.options.job,
                             .epoch = run.options.epoch,
                             .first_unreported_step = run.start.first_unreported_step,
                             .saved_step = saved_step_of(run),
                             .checkpoint_dir = run.start.checkpoint_dir,
                             .left_out = run.start.left_out},
                            hooks));
  if (end == TrainingEnd::kStopped) return aborted("asked to stop");
  run.flight.begin_phase(FlightPhase::kFinishing, run.engine->state().step());
  PENSTOCK_TRY(run.engine->barrier());
  const Status closed = run.transport->close();  // peers may be gone: nobody needs anybody now
  if (!closed.ok()) log_debug("closing the data plane: {}", closed.to_string());
  run.link.send(RankFinished{run.options.job, run.options.epoch, run.options.rank,
                             run.engine->state().step()});
  log_info("finished: step {} of {} is trained and its checkpoint committed",
           run.engine->state().step(), run.spec.training.steps);
  return {};
}

}  // namespace

ExitCode exit_code_of(const Status& status, bool stop_requested) {
  if (status.ok()) return ExitCode::kOk;
  if (stop_requested) return ExitCode::kPreempted;
  switch (status.code()) {
    case Code::kOk:
      return ExitCode::kOk;
    case Code::kUnavailable:
    case Code::kDeadlineExceeded:  // a peer that is there but silent
      return ExitCode::kPeerLost;
    case Code::kDataLoss:
      return ExitCode::kDataCorrupt;
    case Code::kNotFound:
      return ExitCode::kNotFound;
    case Code::kInvalidArgument:
      return ExitCode::kUsage;
    case Code::kPermissionDenied:
      return ExitCode::kPermission;
    case Code::kAlreadyExists:
    case Code::kFailedPrecondition:
    case Code::kAborted:
    case Code::kResourceExhausted:
    case Code::kInternal:
      return ExitCode::kFailure;
  }
  return ExitCode::kFailure;
}

ExitCode run_rank_process(const RankProcessOptions& options) {
  const auto fail = [](const Status& status, ExitCode code) {
    // These are no faults of the program's, whatever the status is called.
    const bool by_itself = code == ExitCode::kDiverged || code == ExitCode::kMiscomputed;
    std::fprintf(stderr, "penstock-rank: %s\n",
                 (by_itself ? status.message() : status.to_string()).c_str());
    return code;
  };
  FlightRecorder flight;
  if (!options.flight_file.empty()) {
    const Status kept =
        flight.keep_in(options.flight_file, options.job, options.epoch, options.rank);
    if (!kept.ok()) log_warning("no flight record of this rank: {}", kept.to_string());
  }
  const RankHello hello{options.job, options.epoch, options.rank, ::getpid()};
  Result<std::unique_ptr<ControlLink>> link =
      ControlLink::open(options.daemon_endpoint, hello, options.lease_file);
  if (!link.ok()) return fail(link.status(), ExitCode::kUsage);
  Result<StartRank> start = (*link)->wait_start(kStartTimeout);
  if (!start.ok()) {
    const bool stopped = (*link)->stop_requested();
    return fail(start.status(), stopped ? ExitCode::kPreempted : ExitCode::kUnreachable);
  }
  flight.begin_phase(FlightPhase::kLoading, start->restore_step);
  RankRun run{.options = options, .link = **link, .flight = flight, .start = *std::move(start)};
  Status status = load(run);
  if (status.ok()) {
    status = train_and_finish(run);
  } else if (status.code() == Code::kUnavailable) {
    // No peer is involved yet, so none can be lost.
    return fail(status, ExitCode::kFailure);
  }
  ExitCode code = exit_code_of(status, (*link)->stop_requested());
  const bool diverged = !status.ok() && run.engine && run.engine->diverged();
  const bool miscomputed = !status.ok() && run.engine && run.engine->miscomputed();
  if (code != ExitCode::kPreempted) {
    if (diverged) code = ExitCode::kDiverged;
    if (miscomputed) code = ExitCode::kMiscomputed;
  }
  if (!status.ok()) fail(status, code);
  // Connections to peers that may be dead are not taken apart: UCX can take seconds to see that
  // what is under way to them never ends, and the next epoch waits for this process.
  link->reset();  // sends what is queued
  std::_Exit(static_cast<int>(code));
}

}  // namespace penstock
