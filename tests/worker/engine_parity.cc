#include "tests/worker/engine_parity.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>

#include "checkpoint/names.h"
#include "coordinator/plan/schedule.h"

namespace penstock {
namespace {

constexpr int64_t kMicrobatches = 8;  // the fewest that DualPipe over four ranks allows
constexpr int64_t kSequencesPerStep = 128;

// Router biases decide which experts a token's choice falls on and get no gradient.
void skew_routing(Engine& engine) {
  for (const std::unique_ptr<Stage>& stage : engine.stages()) {
    for (Router& router : stage->routers()) {
      const int64_t layer = std::atoll(router.bias_name.c_str() + std::strlen("model.layers."));
      const size_t experts = router.bias.size();
      for (size_t e = 0; e < experts; ++e) {
        if (layer % 3 == 0) router.bias[e] = e == 5 ? -10.0F : 0.0F;
        if (layer % 3 == 1) router.bias[e] = -0.05F * static_cast<float>(e);
        if (layer % 3 == 2) router.bias[e] = e < 2 ? 10.0F : 0.0F;
      }
    }
  }
}

// Puts what one rank would save into the whole tensors.
void gather(const Engine& engine, std::map<std::string, std::vector<float>>& state) {
  for (const SliceSource& source : engine.state().to_save()) {
    const TensorSlice& slice = source.slice;
    if (slice.dtype != DType::kF32) continue;  // the step
    const TensorSlice whole = whole_tensor(slice.name, slice.dtype, slice.shape);
    std::vector<float>& values = state[slice.name];
    values.resize(byte_count(whole) / sizeof(float),
                  NAN);  // what nobody saves never compares equal
    const auto* from = reinterpret_cast<const float*>(source.bytes.data());
    for_each_run(slice.box, slice.box, whole.box, dense_strides(whole.box.size),
                 [&](const Run& run) {
                   std::copy_n(from + run.source, run.count, values.data() + run.destination);
                 });
  }
}

// The larger; NaN is larger than everything.
double worse(double a, double b) {
  return std::isnan(a) || a > b ? a : b;
}

double relative(double a, double b) {
  return a == b ? 0.0 : std::abs(a - b) / std::abs(b);
}

double relative(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0.0;
  double norm = 0.0;
  for (size_t i = 0; i < b.size(); ++i) {
    difference += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    norm += static_cast<double>(b[i]) * b[i];
  }
  return difference == 0.0 ? 0.0 : std::sqrt(difference / norm);
}

}  // namespace

double ParityDifference::worst() const {
  return worse(worse(loss, grad_norm), worse(gradients, weights));
}

std::vector<TinyLayout> parity_grid() {
  std::vector<TinyLayout> grid;
  for (const Schedule schedule : {Schedule::kOneForwardOneBackward, Schedule::kZeroBubble,
                                  Schedule::kDualPipe, Schedule::kDualPipeV}) {
    for (const int64_t pipeline : {1, 2, 4}) {
      // DualPipe on one rank is 1F1B.
      if (pipeline == 1 && schedule == Schedule::kDualPipe) continue;
      for (const int64_t expert : {1, 2, 4, 8}) {
        for (const int64_t data : {1, 2}) {
          grid.push_back({pipeline, expert, data, schedule, kSequencesPerStep});
        }
      }
    }
  }
  return grid;
}

JobSpec parity_spec(const Path& directory, const TinyLayout& layout) {
  JobSpec spec = tiny_spec(directory, layout, kParitySteps);
  spec.model.num_hidden_layers = 9;  // DualPipeV over four ranks: eight stages, one of two layers
  spec.model.hidden_size = 16;
  spec.model.intermediate_size = 32;
  spec.model.moe_intermediate_size = 8;
  spec.model.topk_group = 2;
  spec.data.seq_length = 8;
  spec.parallelism.microbatches = kMicrobatches;
  spec.parallelism.micro_batch_size =
      layout.sequences_per_step / (kMicrobatches * layout.expert * layout.data);
  spec.optimizer.eps = 1e-2;
  spec.optimizer.warmup_steps = 0;
  return spec;
}

Result<ParityRun> run_parity(const JobSpec& spec, const ExpertSeats& seats) {
  PENSTOCK_TRY_ASSIGN(std::vector<Program> programs, make_programs(spec.parallelism));
  StandaloneOptions options;
  options.spec = spec;
  options.programs = std::move(programs);
  options.seats = seats;
  options.on_loaded = skew_routing;
  ParityRun run;
  std::mutex mutex;
  options.on_end = [&](const Engine& engine) {
    const std::lock_guard lock(mutex);
    gather(engine, run.state);
    for (auto& [layer, loads] : engine.expert_loads()) {
      PENSTOCK_CHECK(!run.loads.contains(layer), layer);
      run.loads[layer] = loads;
    }
  };
  PENSTOCK_TRY_ASSIGN(StandaloneReport report, run_standalone_threads(options));
  run.steps = std::move(report.steps);
  return run;
}

Result<ParityDifference> compare(const ParityRun& run, const ParityRun& one_rank) {
  if (run.steps.size() != one_rank.steps.size() || run.state.size() != one_rank.state.size()) {
    return failed_precondition(fmt::format("{} steps and {} tensors beside {} and {}",
                                           run.steps.size(), run.state.size(),
                                           one_rank.steps.size(), one_rank.state.size()));
  }
  ParityDifference difference;
  for (size_t i = 0; i < run.steps.size(); ++i) {
    const StepResult& step = run.steps[i];
    const StepResult& wanted = one_rank.steps[i];
    difference.loss = worse(relative(step.loss, wanted.loss), difference.loss);
    difference.grad_norm = worse(relative(step.grad_norm, wanted.grad_norm), difference.grad_norm);
  }
  double worst = -1.0;
  for (const auto& [name, values] : one_rank.state) {
    const auto found = run.state.find(name);
    if (found == run.state.end() || found->second.size() != values.size()) {
      return failed_precondition("no whole tensor " + name);
    }
    const double value = relative(found->second, values);
    const bool is_weight = parse_logical_name(name).kind == TensorKind::kWeight;
    double& kind = is_weight ? difference.weights : difference.gradients;
    kind = worse(value, kind);
    if (std::isnan(value) || value > worst) {
      worst = value;
      difference.worst_tensor = name;
    }
  }
  return difference;
}

}  // namespace penstock
