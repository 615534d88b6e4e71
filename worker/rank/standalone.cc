#include "worker/rank/standalone.h"

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>

#include "checkpoint/store.h"
#include "comm/base/check.h"
#include "comm/base/clock.h"
#include "comm/data/loopback_transport.h"
#include "worker/model/linear.h"
#include "worker/rank/standalone_rank.h"

namespace penstock {
namespace {

constexpr JobId kStandaloneJob{1};

// Does for the threads of one process what the coordinator does for a job: collects the segments of
// a step and commits the checkpoint when it has them all. Thread-safe.
class LocalCommitter {
 public:
  LocalCommitter(const JobSpec& spec, CheckpointStore store)
      : spec_(spec), store_(std::move(store)) {}

  void on_segment(int64_t step, Rank rank, const Result<SegmentSummary>& saved) {
    const std::lock_guard lock(mutex_);
    Attempt& attempt = attempts_[step];
    ++attempt.reported;
    if (saved.ok()) {
      attempt.segments.push_back({saved->file, rank, saved->byte_count, saved->footer_digest});
    } else if (attempt.outcome.ok()) {
      attempt.outcome = saved.status();
    }
    if (attempt.reported < spec_.parallelism.world_size()) return;
    if (attempt.outcome.ok()) attempt.outcome = commit(step, attempt);
    attempt.over = true;
    changed_.notify_all();
  }

  Status wait_for_commit(int64_t step) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return attempts_[step].over; });
    return attempts_[step].outcome;
  }

 private:
  struct Attempt {
    int64_t reported = 0;
    std::vector<CommitSegment> segments;
    Status outcome;
    bool over = false;
  };
  Status commit(int64_t step, const Attempt& attempt) {
    const Result<CommitReport> committed = store_.commit({.epoch = Epoch{1},
                                                          .step = step,
                                                          .created_at = wall_now(),
                                                          .spec_json = to_json(spec_),
                                                          .layout = "standalone",
                                                          .segments = attempt.segments});
    return committed.ok() ? Status() : committed.status();
  }

  const JobSpec& spec_;
  std::mutex mutex_;
  std::condition_variable changed_;
  CheckpointStore store_;                // guarded by mutex_
  std::map<int64_t, Attempt> attempts_;  // guarded by mutex_; by step
};

struct RankOutcome {
  Status status;
  std::vector<TrainingState::TensorDigest> digests;
};

}  // namespace

std::string combined_digest(std::vector<TrainingState::TensorDigest> digests) {
  std::sort(digests.begin(), digests.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  DigestStream stream;
  for (const TrainingState::TensorDigest& tensor : digests) {
    stream.update(as_bytes(tensor.name));
    stream.update(as_bytes(to_hex(tensor.digest)));
  }
  return to_hex(stream.finish());
}

Status check_standalone(const StandaloneOptions& options) {
  if (std::ssize(options.programs) == options.spec.parallelism.pipeline) return {};
  return invalid_argument(fmt::format("{} programs for a pipeline of {} ranks",
                                      options.programs.size(), options.spec.parallelism.pipeline));
}

Result<std::unique_ptr<RankProbe>> make_probe(const StandaloneOptions& options, Rank rank) {
  if (!options.make_probe) return std::unique_ptr<RankProbe>();
  return options.make_probe(rank);
}

Result<StandaloneReport> run_standalone_threads(const StandaloneOptions& options) {
  PENSTOCK_TRY(check_standalone(options));
  const auto world_size = static_cast<int32_t>(options.spec.parallelism.world_size());
  std::unique_ptr<LocalCommitter> committer;
  if (!options.checkpoint_dir.empty()) {
    PENSTOCK_TRY_ASSIGN(CheckpointStore store,
                        CheckpointStore::open(options.checkpoint_dir, kStandaloneJob, nullptr));
    committer = std::make_unique<LocalCommitter>(options.spec, std::move(store));
  }
  StandaloneReport report;
  std::vector<RankOutcome> outcomes(static_cast<size_t>(world_size));
  std::vector<std::unique_ptr<LoopbackTransport>> transports = make_loopback(world_size);
  std::vector<std::thread> threads;
  for (int32_t r = 0; r < world_size; ++r) {
    threads.emplace_back([&, r] {
      RankOutcome& outcome = outcomes[static_cast<size_t>(r)];
      StandaloneRank rank{.job = kStandaloneJob, .rank = Rank{r}};
      rank.transport = world_size > 1 ? transports[static_cast<size_t>(r)].get() : nullptr;
      Result<std::unique_ptr<RankProbe>> probe = make_probe(options, Rank{r});
      outcome.status = probe.status();
      if (probe.ok()) rank.probe = probe->get();
      if (committer) {
        rank.on_segment = [&, r](int64_t step, const Result<SegmentSummary>& saved) {
          committer->on_segment(step, Rank{r}, saved);
        };
        rank.wait_for_commit = [&](int64_t step) { return committer->wait_for_commit(step); };
      }
      if (probe.ok()) {
        outcome.status =
            run_standalone_rank(options, rank, r == 0 ? &report : nullptr, &outcome.digests);
      }
      if (!outcome.status.ok()) transports[static_cast<size_t>(r)]->kill();
    });
  }
  for (std::thread& thread : threads) thread.join();
  // Of several failures the cause comes first: those of peers that only noticed are kUnavailable or
  // kAborted.
  Status first;
  std::vector<TrainingState::TensorDigest> digests;
  for (int32_t r = 0; r < world_size; ++r) {
    RankOutcome& outcome = outcomes[static_cast<size_t>(r)];
    const bool noticed =
        outcome.status.code() == Code::kUnavailable || outcome.status.code() == Code::kAborted;
    if (!outcome.status.ok() && (first.ok() || !noticed)) {
      first = outcome.status.with_context(fmt::format("rank {}", r));
    }
    std::move(outcome.digests.begin(), outcome.digests.end(), std::back_inserter(digests));
  }
  PENSTOCK_TRY(first);
  report.weights_digest = combined_digest(std::move(digests));
  return report;
}

Status run_standalone_rank(const StandaloneOptions& options, const StandaloneRank& self,
                           StandaloneReport* report,
                           std::vector<TrainingState::TensorDigest>* digests) {
  const std::unique_ptr<Kernels> kernels = make_kernels(options.spec.training.precision);
  PENSTOCK_TRY_ASSIGN(const Sampler training, open_training_sampler(options.spec));
  std::optional<Sampler> validation;
  if (!options.spec.data.validation.empty()) {
    PENSTOCK_TRY_ASSIGN(validation, open_validation_sampler(options.spec));
  }
  const GridPosition position = grid_position(options.spec.parallelism, self.rank);
  StateHome home{.job = self.job};
  if (options.state_file) home.file = options.state_file(self.rank);
  if (self.probe) home.before_publish = [&](int64_t step) { self.probe->before_publish(step); };
  PENSTOCK_TRY_ASSIGN(
      const std::unique_ptr<Engine> engine,
      Engine::create(
          options.spec, self.rank, options.programs[static_cast<size_t>(position.pipeline_index)],
          *kernels,
          self.probe && self.transport ? &self.probe->transport(*self.transport) : self.transport,
          training, validation ? &*validation : nullptr,
          self.probe ? self.probe->stage_factory() : StageFactory(), options.seats, nullptr, home));
  if (options.from_memory) {
    PENSTOCK_TRY(engine->restore_held(options.restore_step));
  } else if (options.restore_manifest.empty()) {
    PENSTOCK_TRY(engine->initialize());
  } else {
    const Result<LoadReport> restored =
        engine->restore(options.restore_manifest, self.job, options.restore_step);
    if (!restored.ok()) return restored.status();
  }
  if (options.on_loaded) options.on_loaded(*engine);
  if (self.connect) PENSTOCK_TRY(self.connect());
  PENSTOCK_TRY(engine->align_clock());
  if (options.from_memory || !options.restore_manifest.empty()) {
    PENSTOCK_TRY(engine->complete_restore());
  }
  if (report) report->steps.reserve(static_cast<size_t>(options.spec.training.steps));
  const TrainerOptions trainer{.job = self.job,
                               .epoch = Epoch{1},
                               .saved_step = options.restore_step,
                               .checkpoint_dir = self.on_segment ? options.checkpoint_dir : Path(),
                               .evaluate = options.evaluate,
                               .left_out = options.left_out,
                               .stop_after = options.stop_after};
  const TrainerHooks hooks{.on_step =
                               [&](const StepResult& result, double) {
                                 if (self.probe) self.probe->on_step(result);
                                 if (!report) return;
                                 report->steps.push_back(result);
                                 if (options.on_step) options.on_step(result);
                               },
                           .on_evaluation =
                               [&](int64_t step, const EvaluationResult& result) {
                                 if (!report) return;
                                 report->evaluations.push_back(result);
                                 if (options.on_evaluation) options.on_evaluation(step, result);
                               },
                           .before_save = [](int64_t, bool) {},
                           .on_segment = self.on_segment,
                           .wait_for_commit = self.wait_for_commit,
                           .stop_requested = [] { return false; }};
  const Result<TrainingEnd> end = train(options.spec, *engine, trainer, hooks);
  if (!end.ok()) return end.status();
  PENSTOCK_TRY(engine->barrier());
  if (options.on_end) options.on_end(*engine);
  *digests = engine->state().weight_digests();
  return {};
}

}  // namespace penstock
