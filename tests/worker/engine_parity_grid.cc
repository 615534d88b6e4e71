// penstock-parity: trains the parity grid's model in every layout and prints, as one JSON document
// per line, how far each ends from one rank. For ops/bench parity.
#include <CLI/CLI.hpp>

#include <cstdio>

#include "comm/base/clock.h"
#include "comm/base/log.h"
#include "tests/worker/engine_parity.h"

namespace penstock {
namespace {

Status run_grid(int64_t ranks_max) {
  ScratchDirectory directory;
  write_tiny_corpus(directory.path());
  PENSTOCK_TRY_ASSIGN(const ParityRun one_rank,
                      run_parity(parity_spec(directory.path(), {.sequences_per_step = 128})));
  for (const TinyLayout& layout : parity_grid()) {
    const JobSpec spec = parity_spec(directory.path(), layout);
    if (spec.parallelism.world_size() > ranks_max) continue;
    const int64_t begin = monotonic_ns();
    PENSTOCK_TRY_ASSIGN(const ParityRun run, run_parity(spec));
    const double seconds = to_seconds(Duration(monotonic_ns() - begin));
    PENSTOCK_TRY_ASSIGN(const ParityDifference difference, compare(run, one_rank));
    fmt::print(
        "{{\"schedule\": \"{}\", \"pipeline\": {}, \"expert\": {}, \"data\": {}, \"ranks\": {}, "
        "\"loss\": {:.3g}, \"grad_norm\": {:.3g}, \"gradients\": {:.3g}, \"weights\": {:.3g}, "
        "\"worst\": {:.3g}, \"worst_tensor\": \"{}\", \"seconds\": {:.3g}}}\n",
        to_string(layout.schedule), layout.pipeline, layout.expert, layout.data,
        spec.parallelism.world_size(), difference.loss, difference.grad_norm, difference.gradients,
        difference.weights, difference.worst(), difference.worst_tensor, seconds);
    std::fflush(stdout);
  }
  return {};
}

}  // namespace
}  // namespace penstock

int main(int argc, char** argv) {
  CLI::App app("Compares every layout of one small model with one rank.");
  int64_t ranks_max = 64;
  app.add_option("--ranks-max", ranks_max, "leave out layouts of more ranks");
  CLI11_PARSE(app, argc, argv);
  penstock::start_logging("parity");
  const penstock::Status status = penstock::run_grid(ranks_max);
  if (status.ok()) return 0;
  std::fprintf(stderr, "penstock-parity: %s\n", status.to_string().c_str());
  return 1;
}
