// Which tokens a sequence of a step holds. A pure function of (seed, step, sequence index): the
// data cursor needs no state, so a resumed run reads exactly what the undisturbed one would have.
//
//   n        = sequences of the steps before + index         the n-th sequence of the run
//   source   = pattern[n mod P]                              P = 65,536 places shared out by
//   weight, each source's
//                                                            share spread evenly; ordinal = how
//                                                            many n took it before
//   windows  = (tokens - 1) / seq_length                     of seq_length + 1 tokens, neighbours
//   share one token epoch, k = ordinal / windows, ordinal mod windows start    = offset(epoch) +
//   permutation(epoch)(k) · seq_length
//
// So every epoch of a source visits each of its windows once, in an order of its own, and the
// offset (random below the tail that does not fill a window) lets later epochs see the tail and cut
// windows elsewhere.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "comm/base/status.h"
#include "comm/run/job_spec.h"
#include "worker/data/indexed_dataset.h"

namespace penstock {

// A bijection of [0, count) chosen by (seed, stream); the image of `index`. O(1) expected, no
// table: a four-round Feistel network over the next even number of bits, walked until it lands
// inside. REQUIRES: 0 <= index < count.
uint64_t permute(uint64_t seed, uint64_t stream, uint64_t index, uint64_t count);

struct SamplerSource {
  std::shared_ptr<const IndexedDataset> data;
  double weight = 1.0;
};

struct SamplerOptions {
  std::vector<SamplerSource> sources;  // at least one
  int64_t seq_length = 0;
  int64_t sequences_per_step = 0;
  std::vector<StepLevel<int64_t>> sequence_levels = {};  // the same from given steps on
  int64_t vocab_size = 0;  // of the model; a token at or above it is kDataLoss when it is read
  uint64_t seed = 0;
};

// Thread-safe: constant after construction. Movable.
class Sampler {
 public:
  // kInvalidArgument when a source is shorter than one window or its weight is too small to get a
  // place.
  static Result<Sampler> create(SamplerOptions options);

  // Where a sequence comes from.
  struct Window {
    int64_t source = 0;
    int64_t epoch = 0;        // of that source, from 0
    int64_t first_token = 0;  // in the source's packed stream
    bool operator==(const Window&) const = default;
  };
  // REQUIRES: step >= 1, 0 <= index < sequences of that step.
  Window window(int64_t step, int64_t index) const;

  // The window's seq_length + 1 tokens: inputs are [0, seq_length), targets [1, seq_length + 1).
  // REQUIRES: as window(), and into.size() == seq_length + 1.
  Status sequence(int64_t step, int64_t index, std::span<int32_t> into) const;

  const std::vector<SamplerSource>& sources() const { return options_.sources; }
  int64_t seq_length() const { return options_.seq_length; }
  int64_t sequences_per_step() const { return options_.sequences_per_step; }

 private:
  struct Place {  // one of P places of the pattern
    int32_t source = 0;
    int32_t earlier = 0;  // places before this one that belong to the same source
  };
  explicit Sampler(SamplerOptions options) : options_(std::move(options)) {}

  SamplerOptions options_;
  std::vector<Place> pattern_;
  std::vector<int64_t> places_of_source_;
};

// Opens the spec's training sources.
Result<Sampler> open_training_sampler(const JobSpec& spec);
// Opens the spec's validation sources; "step" counts the batches of one evaluation from 1, so that
// every evaluation reads the same windows. kFailedPrecondition when the spec has no validation
// data.
Result<Sampler> open_validation_sampler(const JobSpec& spec);

// The sequence index, within a step, of position `position` (0 … micro_batch_size - 1) of
// micro-batch `microbatch` (0 … microbatches - 1, direction 0's first, then direction 1's) of
// pipeline replica `replica` (data_index · expert + expert_index).
int64_t sequence_index(const ParallelismSpec& parallelism, int64_t replica, int64_t microbatch,
                       int64_t position);

}  // namespace penstock
