#include "worker/rank/trainer.h"

#include <deque>
#include <memory>

#include "comm/base/clock.h"
#include "comm/base/log.h"
#include "worker/engine/segment_saver.h"

namespace penstock {
namespace {

// Rank 0's view of the checkpoints whose end is not known.
class Uncommitted {
 public:
  explicit Uncommitted(const TrainerHooks& hooks) : hooks_(hooks) {}

  // Whether there is room for that of `step`, which then takes it.
  bool add(int64_t step) {
    if (!hooks_.newest_outcome) return true;
    const int64_t known = hooks_.newest_outcome();
    while (!steps_.empty() && steps_.front() <= known) steps_.pop_front();
    if (steps_.size() == kUncommittedMax) {
      log_warning(
          "the checkpoint of step {} is left out: those of {} earlier steps, {} to {}, are "
          "not committed yet",
          step, steps_.size(), steps_.front(), steps_.back());
      return false;
    }
    steps_.push_back(step);
    return true;
  }

 private:
  const TrainerHooks& hooks_;
  std::deque<int64_t> steps_;
};

}  // namespace

bool is_checkpoint_step(const JobSpec& spec, int64_t step) {
  if (step == spec.training.steps) return true;
  return spec.checkpoint.interval > 0 && step % spec.checkpoint.interval == 0;
}

bool is_evaluation_step(const JobSpec& spec, int64_t step) {
  if (spec.data.validation.empty()) return false;
  if (step == 0 || step == spec.training.steps) return true;
  return spec.training.evaluation_interval > 0 && step % spec.training.evaluation_interval == 0;
}

Result<TrainingEnd> train(const JobSpec& spec, Engine& engine, const TrainerOptions& options,
                          const TrainerHooks& hooks) {
  const auto evaluate_if_due = [&](int64_t step) -> Status {
    if (!options.evaluate || !is_evaluation_step(spec, step)) return {};
    engine.flight().begin_phase(FlightPhase::kEvaluating, step);
    PENSTOCK_TRY_ASSIGN(const EvaluationResult result, engine.evaluate());
    hooks.on_evaluation(step, result);
    return {};
  };
  const int64_t first_step = engine.state().step() + 1;
  const int64_t last_step = spec.training.steps;
  const bool saves = !options.checkpoint_dir.empty();
  const bool counts_steps = engine.layout().rank.value == 0;
  std::unique_ptr<SegmentSaver> saver;
  if (saves && first_step <= last_step) {
    const SegmentIdentity identity{options.job, options.epoch, engine.layout().rank, 0};
    saver = std::make_unique<SegmentSaver>(
        options.checkpoint_dir, identity, [&](int64_t step, const Result<SegmentSummary>& segment) {
          engine.state().release();
          hooks.on_segment(step, segment);
        });
  }
  // From scratch, or from a checkpoint whose attempt may have died before it evaluated.
  if (options.first_unreported_step <= first_step) PENSTOCK_TRY(evaluate_if_due(first_step - 1));

  const auto pause = [&](int64_t step) {
    engine.flight().begin_phase(FlightPhase::kSaving, step);
    saver->wait();
    engine.flight().begin_phase(FlightPhase::kCommitting, step);
    return hooks.pause(step);
  };
  Uncommitted uncommitted(hooks);
  int64_t last_due = options.saved_step;
  for (int64_t step = first_step; step <= last_step; ++step) {
    const bool stopped_early = options.stop_after > 0 && step > options.stop_after;
    if (stopped_early || hooks.stop_requested()) return TrainingEnd::kStopped;
    StepWishes
        wishes;  // to save: on rank 0, whose word counts, so that all do after the same steps
    wishes.pause = saver && hooks.pause_requested && hooks.pause_requested();
    const bool left_out = contains(options.left_out, step);
    if (saver && counts_steps && !left_out) {
      const int64_t interval = spec.checkpoint.automatic && hooks.save_interval
                                   ? hooks.save_interval()
                                   : spec.checkpoint.interval;
      if (is_checkpoint_step(spec, step) || (interval > 0 && step - last_due >= interval)) {
        wishes.save = uncommitted.add(step);
        last_due = step;
      }
    }
    const Result<StepResult> trained =
        left_out ? Result<StepResult>(engine.leave_out(step)) : engine.train_step(step, wishes);
    if (engine.finding().action == GuardPolicy::kRollback && hooks.roll_back) {
      engine.flight().begin_phase(FlightPhase::kCommitting, step);  // a wait for the coordinator
      hooks.roll_back(step, engine.finding());
      return TrainingEnd::kStopped;
    }
    PENSTOCK_TRY_ASSIGN(const StepResult result, trained);
    double stall_seconds = 0.0;
    const bool pauses = result.pause && step < last_step;
    if (saver && (result.save || pauses || step == last_step)) {
      engine.flight().begin_phase(FlightPhase::kSaving, step);
      const int64_t saving = monotonic_ns();
      engine.settle();
      hooks.before_save(step, pauses);
      saver->wait();  // a disk that is too slow slows the run down instead of filling the memory
      saver->save(step, engine.state().hold());
      stall_seconds = to_seconds(Duration(monotonic_ns() - saving + 1));
    }
    hooks.on_step(result, stall_seconds);
    if (pauses && pause(step)) return TrainingEnd::kStopped;
    if (pauses) last_due = step;
    PENSTOCK_TRY(evaluate_if_due(step));
  }
  if (saver) {
    engine.flight().begin_phase(FlightPhase::kSaving, last_step);
    saver->wait();  // what is left to wait for is the coordinator's work
    engine.flight().begin_phase(FlightPhase::kCommitting, last_step);
    PENSTOCK_TRY(hooks.wait_for_commit(last_step));
  }
  return TrainingEnd::kFinished;
}

}  // namespace penstock
