// optimizer_bench: what an optimizer step costs that leaves the state it starts from whole, beside
// one in place and beside a copy of the state. Prints one JSON document; for ops/bench checkpoint.
#include <CLI/CLI.hpp>

#include <cstring>
#include <nlohmann/json.hpp>

#include "comm/base/clock.h"
#include "kernels/cpu/cpu_kernels.h"
#include "worker/engine/state_memory.h"
#include "worker/optim/adamw.h"

namespace penstock {
namespace {

using nlohmann::json;

// A model whose one expert layer makes nearly all of `mib` MiB of weights and moments.
ModelConfig model_of(int64_t mib) {
  ModelConfig model;
  model.vocab_size = 64;
  model.num_hidden_layers = 1;
  model.first_k_dense_replace = 1;
  model.hidden_size = 512;
  constexpr int64_t kStateBytes = 3 * sizeof(float);
  model.intermediate_size = (mib << 20) / kStateBytes / (3 * model.hidden_size);
  return model;
}

Result<json> measure(int64_t mib, int64_t rounds) {
  ParameterSet set(model_of(mib), {.layers = {0, 1}, .experts = {0, 0}});
  set.initialize(1, 0.02);
  const int64_t size = std::ssize(set.values(ParameterKind::kDense));
  const OptimizerSpec spec;
  const StateLayout layout(spec, {{&set, ParameterKind::kDense, {0, size}}});
  const std::unique_ptr<Kernels> kernels = make_cpu_kernels();
  AdamW adamw(spec, layout, *kernels);
  kernels->fill(size, 0.01F, set.gradients(ParameterKind::kDense).data());
  PENSTOCK_TRY_ASSIGN(const StateMemory memory, StateMemory::make({}, layout.byte_count()));
  adamw.take_weights(memory.generation(0));
  json out = {{"payload_bytes", layout.byte_count()}};
  int64_t step = 0;
  const auto timed = [&](const char* name, const auto& work) {
    const int64_t begin = monotonic_ns();
    work();
    out[name].push_back(static_cast<double>(monotonic_ns() - begin) * 1e-9);
  };
  for (int64_t round = 0; round < rounds; ++round) {
    timed("in_place_seconds",
          [&] { adamw.step(++step, 1e-4, 1.0, memory.generation(0), memory.generation(0)); });
    timed("copy_seconds",
          [&] { std::memcpy(memory.generation(2), memory.generation(0), layout.byte_count()); });
    timed("to_the_other_seconds",
          [&] { adamw.step(++step, 1e-4, 1.0, memory.generation(0), memory.generation(1)); });
    adamw.take_weights(memory.generation(0));
  }
  return out;
}

}  // namespace
}  // namespace penstock

int main(int argc, char** argv) {
  CLI::App app("Measures optimizer steps; prints JSON.");
  int64_t mib = 512;
  int64_t rounds = 5;
  app.add_option("--mib", mib, "of weights and moments")->check(CLI::Range(1, 1 << 16));
  app.add_option("--rounds", rounds, "how often each")->check(CLI::Range(1, 1000));
  CLI11_PARSE(app, argc, argv);
  const auto result = penstock::measure(mib, rounds);
  if (result.ok()) {
    fmt::print("{}\n", result->dump());
    return 0;
  }
  std::fprintf(stderr, "optimizer_bench: %s\n", result.status().to_string().c_str());
  return 1;
}
