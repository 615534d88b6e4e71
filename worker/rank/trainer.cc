#include "worker/rank/trainer.h"

#include <memory>

#include "comm/base/clock.h"
#include "worker/engine/segment_saver.h"

namespace penstock {

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
    saver = std::make_unique<SegmentSaver>(options.checkpoint_dir, identity,
                                           engine.state().to_save(), hooks.on_segment);
  }
  // From scratch, or from a checkpoint whose attempt may have died before it evaluated.
  if (options.first_unreported_step <= first_step) PENSTOCK_TRY(evaluate_if_due(first_step - 1));

  int64_t last_saved = first_step - 1;
  for (int64_t step = first_step; step <= last_step; ++step) {
    const bool stopped_early = options.stop_after > 0 && step > options.stop_after;
    if (stopped_early || hooks.stop_requested()) return TrainingEnd::kStopped;
    const int64_t interval = spec.checkpoint.automatic && counts_steps && hooks.save_interval
                                 ? hooks.save_interval()
                                 : 0;
    const bool due = interval > 0 && step - last_saved >= interval;
    PENSTOCK_TRY_ASSIGN(const StepResult result, engine.train_step(step, due));
    double stall_seconds = 0.0;
    if (saver && (is_checkpoint_step(spec, step) || result.save)) {
      const int64_t saving = monotonic_ns();
      engine.settle();
      hooks.before_save(step);
      saver->save(step);
      stall_seconds = to_seconds(Duration(monotonic_ns() - saving + 1));
      last_saved = step;
    }
    hooks.on_step(result, stall_seconds);
    PENSTOCK_TRY(evaluate_if_due(step));
  }
  if (saver) PENSTOCK_TRY(hooks.wait_for_commit(last_step));
  return TrainingEnd::kFinished;
}

}  // namespace penstock
