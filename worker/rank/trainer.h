// The training loop of one rank: steps, evaluations, saves, in an order that is the same on every
// rank. It knows neither daemon nor transport; what happens goes out through hooks.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "checkpoint/segment.h"
#include "comm/base/file.h"
#include "comm/base/ids.h"
#include "comm/base/status.h"
#include "comm/run/job_spec.h"
#include "worker/engine/engine.h"

namespace penstock {

struct TrainerOptions {
  JobId job;
  Epoch epoch;
  // Steps below were reported by an earlier attempt; the held-out loss of step k before step k + 1.
  int64_t first_unreported_step = 0;
  int64_t saved_step = 0;                // the newest whose state is on disk, when the loop begins
  Path checkpoint_dir;                   // which exists; empty: nothing is saved
  bool evaluate = true;                  // as the spec says; false: never
  std::vector<StepRange> left_out = {};  // steps that change nothing
  int64_t stop_after = 0;  // step after which the loop ends early, as if asked to; 0: never
};

// Called on the rank's compute thread but for on_segment. Those with a default may be empty.
struct TrainerHooks {
  // After each step. checkpoint_seconds: what saving made this step wait for; above 0 when the
  // state after it is saved.
  std::function<void(const StepResult&, double checkpoint_seconds)> on_step;
  std::function<void(int64_t step, const EvaluationResult&)> on_evaluation;
  // Before the state after `step` is saved; `pauses`: and pause() is called.
  std::function<void(int64_t step, bool pauses)> before_save;
  // On the saver's thread: this rank's part of the checkpoint of `step` is durable, or could not be
  // saved. The run goes on either way.
  std::function<void(int64_t step, const Result<SegmentSummary>&)> on_segment;
  // Blocks until the checkpoint of `step` is committed. An error: it never will be.
  std::function<Status(int64_t step)> wait_for_commit;
  // Asked before each step: true ends the loop there.
  std::function<bool()> stop_requested;
  // With `checkpoint.interval: auto`: steps from one saved state to the next, which may change at
  // any time; 0: only the last is saved. Rank 0's answer counts. Empty: as 0.
  std::function<int64_t()> save_interval = {};
  // The newest step whose checkpoint is committed or given up, -1: none; rank 0's answer counts.
  // Empty: nobody says, and saves are not bounded.
  std::function<int64_t()> newest_outcome = {};
  // A guard asks for a rollback at `step`, which has changed nothing. Returns when the rank is
  // asked to stop. Empty: nobody can roll back, and the run ends as diverged.
  std::function<void(int64_t step, const GuardFinding&)> roll_back = {};
  // Asked before each step: true ends the run after it with its state saved, on every rank, as soon
  // as one rank says so. Empty: never.
  std::function<bool()> pause_requested = {};
  // This rank's part of the checkpoint of `step` is written, or could not be. Returns true when the
  // rank is to end; false when the checkpoint failed: the run goes on. As pause_requested.
  std::function<bool(int64_t step)> pause = {};
};

// Checkpoints whose end is not known at a time. A save that is due beyond them is left out, on
// every rank, and rank 0's log says so: while nobody commits (the coordinator is gone, its disk
// hangs) a run goes on, as it must, but does not fill the disk with what nobody may delete yet. As
// few as cover one that is committed while the next is written, twice.
inline constexpr size_t kUncommittedMax = 4;

enum class TrainingEnd { kFinished, kStopped };

// Whether the spec alone asks for the state after `step` to be saved: at every fixed interval, and
// after the last step.
bool is_checkpoint_step(const JobSpec& spec, int64_t step);
bool is_evaluation_step(const JobSpec& spec, int64_t step);

// Trains from the engine's state to the last step. kFinished: every step is done and the last
// checkpoint is committed. kStopped: asked to stop or to pause, between two steps.
Result<TrainingEnd> train(const JobSpec& spec, Engine& engine, const TrainerOptions& options,
                          const TrainerHooks& hooks);

}  // namespace penstock
