// The parity grid: one model on one global batch, trained in every layout, compared with one rank.
//
// Nine layers of which eight route: in turn one expert that gets no token, weights that fall off
// steeply over the experts, and all tokens to experts 0 and 1, hence, with four expert ranks, one
// rank that gets every token. AdamW with a large epsilon stays smooth where gradients are near
// zero, so weights can be compared after several steps like the gradients they came from.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "comm/base/file.h"
#include "comm/base/status.h"
#include "tests/worker/engine_test_support.h"

namespace penstock {

// What a run of kParitySteps steps ends with.
struct ParityRun {
  std::vector<StepResult> steps;
  // By logical name, whole: weights, router biases, Adam's moments (sums of gradients).
  std::map<std::string, std::vector<float>> state;
  ExpertLoads loads;
};
inline constexpr int64_t kParitySteps = 3;

// Worst relative differences from the run of one rank. Of tensors: |a - b| / |b| in the L2 norm,
// the worst of all tensors.
struct ParityDifference {
  double loss = 0.0;
  double grad_norm = 0.0;
  double gradients = 0.0;  // first and second moments
  double weights = 0.0;
  std::string worst_tensor;  // of both kinds
  double worst() const;
};

// Pipeline 1, 2, 4 × expert 1, 2, 4, 8 × data 1, 2 × every schedule that allows the pipeline.
std::vector<TinyLayout> parity_grid();

// The corpus is in `directory`.
JobSpec parity_spec(const Path& directory, const TinyLayout& layout);
Result<ParityRun> run_parity(const JobSpec& spec, const ExpertSeats& seats = {});
// kFailedPrecondition when the runs do not hold the same tensors.
Result<ParityDifference> compare(const ParityRun& run, const ParityRun& one_rank);

}  // namespace penstock
