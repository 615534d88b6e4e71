// A whole job without a coordinator, for tests and benchmarks: every rank as a thread of this
// process on the loopback transport, or as a forked process on UCX. Real engines, real data, real
// checkpoints.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "comm/base/file.h"
#include "comm/base/status.h"
#include "comm/run/job_spec.h"
#include "comm/run/program.h"
#include "worker/engine/engine.h"

namespace penstock {

// What a measurement changes about one rank, and learns from it. Lives in the rank's own thread or
// process.
class RankProbe {
 public:
  virtual ~RankProbe() = default;
  // What the engine uses in place of `real`, which outlives it.
  virtual Transport& transport(Transport& real) { return real; }
  // Empty: the model's own stages.
  virtual StageFactory stage_factory() { return {}; }
  virtual void on_step(const StepResult& step) = 0;
  // As StateHome::before_publish.
  virtual void before_publish(int64_t /*step*/) {}
};

struct StandaloneOptions {
  JobSpec spec;
  std::vector<Program> programs;  // by pipeline index
  ExpertSeats seats = {};
  std::vector<StepRange> left_out = {};  // steps that change nothing
  int64_t stop_after = 0;                // end after this step; 0: run all of them
  bool evaluate = false;
  Path checkpoint_dir;  // threads only; empty: nothing is saved
  // Where each rank keeps its state (StateHome::file); empty: nowhere.
  std::function<Path(Rank)> state_file;
  bool from_memory = false;  // go on from what is there of restore_step
  Path restore_manifest;     // empty: initial weights
  int64_t restore_step = 0;
  // On rank 0's thread (or, with processes, in rank 0's process) as it happens. May be empty.
  std::function<void(const StepResult&)> on_step;
  std::function<void(int64_t step, const EvaluationResult&)> on_evaluation;
  // Called first of all on the rank's thread or in its process. May be empty.
  std::function<Result<std::unique_ptr<RankProbe>>(Rank)> make_probe;
  // On every rank's thread (or in its process), several at once: when its state is there, before
  // the first step; and after the last. May be empty.
  std::function<void(Engine&)> on_loaded;
  std::function<void(const Engine&)> on_end;
  std::string ucx_tls;  // processes only: UcxOptions::tls; empty: its default
};

struct StandaloneReport {
  std::vector<StepResult> steps;              // rank 0's; empty with processes (use on_step)
  std::vector<EvaluationResult> evaluations;  // the same
  std::string weights_digest;  // over every tensor, by name: equal for equal models in any layout
};

// The first error of any rank, named.
Result<StandaloneReport> run_standalone_threads(const StandaloneOptions& options);
// Must be called while the process has one thread: it forks.
Result<StandaloneReport> run_standalone_processes(const StandaloneOptions& options);

}  // namespace penstock
