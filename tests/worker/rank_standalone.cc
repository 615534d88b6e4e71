// penstock-standalone: trains a whole job on this machine without coordinator or daemons, for
// benchmarks and for looking at a run. Every rank is a thread, or (--processes) a process on UCX as
// in production.
#include <CLI/CLI.hpp>

#include <cstdio>

#include "comm/base/log.h"
#include "coordinator/plan/schedule.h"
#include "ops/cli/spec_file.h"
#include "worker/model/linear.h"
#include "worker/rank/standalone.h"

namespace penstock {
namespace {

struct Flags {
  std::string spec;
  int64_t steps = 0;
  bool processes = false;
  bool json = false;
  bool evaluate = false;
  std::string checkpoint_dir;
  std::string restore;
  int64_t restore_step = 0;
  bool round_start = false;
  bool record_odd_steps = false;
};

// A start that differs from the seed's by roundings: a run like any other, on another path. How far
// its loss ends from the first one's is chance.
void round_weights(Engine& engine) {
  const std::unique_ptr<Kernels> kernels = make_kernels(Precision::kFp32);
  for (const std::unique_ptr<Stage>& stage : engine.stages()) {
    for (const ParameterKind kind : kParameterKinds) {
      const std::span<float> values = stage->parameters().values(kind);
      const Matrix column = {values.data(), 1};  // there may be none
      kernels->round_rows(RowFormat::kBf16, std::ssize(values), 1, column, column);
    }
  }
}

// Records every other step only, so that neighbouring steps differ in nothing else. Lives where its
// rank does: the engine it steers is the one that was loaded on its thread.
class RecordingProbe final : public RankProbe {
 public:
  static void use(Engine& engine) {
    engine_ = &engine;
    engine.recorder().set_enabled(true);
  }
  void on_step(const StepResult& step) override {
    engine_->recorder().set_enabled(step.step % 2 == 0);  // for the next one
  }

 private:
  static thread_local Engine* engine_;
};
thread_local Engine* RecordingProbe::engine_ = nullptr;

void print_step(const StepResult& step, bool json) {
  const StepTimes& times = step.times;
  const double rate = static_cast<double>(step.tokens) / times.total_seconds;
  if (json) {
    fmt::print(
        "{{\"step\": {}, \"loss\": {:.9g}, \"grad_norm\": {:.9g}, \"tokens_per_second\": {:.6g}, "
        "\"seconds\": {:.6g}, \"compute_seconds\": {:.6g}, \"expert_wait_seconds\": {:.6g}, "
        "\"pipeline_wait_seconds\": {:.6g}, \"reduce_seconds\": {:.6g}, \"optimizer_seconds\": "
        "{:.6g}}}\n",
        step.step, step.loss, step.grad_norm, rate, times.total_seconds, times.compute_seconds,
        times.expert_wait_seconds, times.pipeline_wait_seconds, times.reduce_seconds,
        times.optimizer_seconds);
  } else {
    fmt::print("step {:<6} loss {:<8.4f} grad norm {:<8.3f} {:>9.0f} tokens/s\n", step.step,
               step.loss, step.grad_norm, rate);
  }
  std::fflush(stdout);
}

void print_evaluation(int64_t step, const EvaluationResult& result, bool json) {
  if (json) {
    fmt::print("{{\"step\": {}, \"held_out_loss\": {:.9g}}}\n", step, result.loss);
  } else {
    fmt::print("step {:<6} held-out loss {:.4f}\n", step, result.loss);
  }
}

Status run(const Flags& flags) {
  StandaloneOptions options;
  PENSTOCK_TRY_ASSIGN(options.spec, load_spec_file(flags.spec, ""));
  PENSTOCK_TRY_ASSIGN(options.programs, make_programs(options.spec.parallelism));
  options.stop_after = flags.steps;
  options.evaluate = flags.evaluate;
  options.checkpoint_dir = flags.checkpoint_dir;
  options.restore_manifest = flags.restore;
  options.restore_step = flags.restore_step;
  if (flags.round_start) options.on_loaded = round_weights;
  if (flags.record_odd_steps) {
    options.on_loaded = RecordingProbe::use;
    options.make_probe = [](Rank) -> Result<std::unique_ptr<RankProbe>> {
      return std::unique_ptr<RankProbe>(std::make_unique<RecordingProbe>());
    };
  }
  if (flags.json) {
    options.on_end = [](const Engine& engine) {
      fmt::print("{{\"rank\": {}, \"memory_bytes\": {}}}\n", engine.layout().rank,
                 engine.memory_bytes());
    };
  }
  options.on_step = [&](const StepResult& step) { print_step(step, flags.json); };
  options.on_evaluation = [&](int64_t step, const EvaluationResult& result) {
    print_evaluation(step, result, flags.json);
  };
  PENSTOCK_TRY_ASSIGN(const StandaloneReport report, flags.processes
                                                         ? run_standalone_processes(options)
                                                         : run_standalone_threads(options));
  if (flags.json) {
    fmt::print("{{\"weights_digest\": \"{}\"}}\n", report.weights_digest);
  } else {
    fmt::print("weights {}\n", report.weights_digest);
  }
  return {};
}

}  // namespace
}  // namespace penstock

int main(int argc, char** argv) {
  CLI::App app("Trains a whole job on this machine, without coordinator or daemons.");
  penstock::Flags flags;
  app.add_option("--spec", flags.spec, "job spec (YAML)")->required();
  app.add_option("--steps", flags.steps, "end after this step; 0: as the spec says")
      ->check(CLI::NonNegativeNumber);
  app.add_flag("--processes", flags.processes, "one process per rank on UCX, instead of threads");
  app.add_flag("--json", flags.json, "one JSON document per line");
  app.add_flag("--evaluate", flags.evaluate, "held-out loss where the spec asks for it");
  app.add_option("--checkpoint-dir", flags.checkpoint_dir,
                 "save there as the spec says (threads only)");
  app.add_option("--restore", flags.restore,
                 "checkpoint of any precision to go on from, by its manifest; at the spec's last "
                 "step only the evaluation is left")
      ->check(CLI::ExistingFile);
  app.add_option("--restore-step", flags.restore_step, "of that checkpoint");
  CLI::Option* const round =
      app.add_flag("--round-start", flags.round_start, "round the first weights to bf16");
  app.add_flag("--record-odd-steps", flags.record_odd_steps, "keep the trace of odd steps only")
      ->excludes(round);
  CLI11_PARSE(app, argc, argv);
  penstock::start_logging("standalone");
  const penstock::Status status = penstock::run(flags);
  if (status.ok()) return 0;
  std::fprintf(stderr, "penstock-standalone: %s\n", status.to_string().c_str());
  return 1;
}
