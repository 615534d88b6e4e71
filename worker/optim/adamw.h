// AdamW (Loshchilov & Hutter, 2019) over this rank's shards of flat parameter buffers (ZeRO-1): of
// every buffer the rank keeps moments for, and updates, only the range it owns; its replicas own
// the others. An update reads one generation of the owned state (state_layout.h) and writes
// another, so that the first stays whole, and can be saved or gone back to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "comm/run/job_spec.h"
#include "worker/optim/state_layout.h"

namespace penstock {

class Kernels;
struct AdamwStep;

// Not thread-safe. Moments are fp32, or bf16 rounded to nearest even after every update, as
// DeepSeek-V3 keeps them (DeepSeek-V3 report §3.3). A generation is borrowed for a call: at least
// layout.byte_count() bytes, aligned to a cache line; its moments are zero before the first step.
class AdamW {
 public:
  // Borrows all, and what the layout's shards point to.
  AdamW(const OptimizerSpec& spec, const StateLayout& layout, Kernels& kernels);

  // Sum of the squared gradients of the owned ranges, in double, in order. Summed over every rank
  // it counts each parameter of the model once.
  double gradient_square_sum() const;

  // Factor for gradients whose global L2 norm is `norm`: min(1, clip / (norm + 1e-6)); 1 when
  // clipping is off.
  double clip_factor(double norm) const;

  // One update from their gradients times `gradient_factor`: reads the moments of `previous` and
  // the owned weights of the model, which are those of `previous`; writes all three to `next`, and
  // the weights to the model. `step` counts from 1. Weight decay falls on Parameter::decays()
  // alone, less what spec.no_decay exempts. `previous` and `next` may be the same.
  void step(int64_t step, double learning_rate, double gradient_factor, const std::byte* previous,
            std::byte* next);

  // The owned weights, from the model to a generation and back.
  void take_weights(std::byte* generation) const;
  void put_weights(const std::byte* generation) const;
  // Whether they have the same bits in both.
  bool has_weights(const std::byte* generation) const;

  // Weights and moments of the owned ranges in a generation, for saving and restoring: three slices
  // per box.
  std::vector<StateSlice> state(std::byte* generation) const;

 private:
  struct Piece {
    ShardPiece piece;
    // Byte offsets in a generation, of element piece.begin.
    uint64_t weights = 0;
    uint64_t exp_avg = 0;
    uint64_t exp_avg_sq = 0;
  };
  void step_wide(const Piece& piece, const AdamwStep& update, const std::byte* previous,
                 std::byte* next);
  void step_narrow(const Piece& piece, const AdamwStep& update, const std::byte* previous,
                   std::byte* next);

  const OptimizerSpec spec_;
  const StateLayout& layout_;
  Kernels& kernels_;
  std::vector<float> expanded_;  // a chunk of both bf16 moments as fp32
  std::vector<Piece> pieces_;
};

}  // namespace penstock
