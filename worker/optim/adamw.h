// AdamW (Loshchilov & Hutter, 2019) over this rank's shards of flat parameter buffers (ZeRO-1): of
// every buffer the rank keeps moments for, and updates, only the range it owns; its replicas own
// the others.
#pragma once

#include <cstdint>
#include <vector>

#include "comm/run/job_spec.h"
#include "worker/optim/shard_state.h"

namespace penstock {

class Kernels;
struct AdamwStep;

// Not thread-safe. Moments are allocated, and zero, from construction: fp32, or bf16 rounded to
// nearest even after every update, as DeepSeek-V3 keeps them (DeepSeek-V3 report §3.3).
class AdamW {
 public:
  // Borrows `kernels`.
  AdamW(const OptimizerSpec& spec, std::vector<OptimizerShard> shards, Kernels& kernels);
  AdamW(AdamW&&) = default;  // a copy's pieces would point into the original
  AdamW& operator=(AdamW&&) = delete;

  // Sum of the squared gradients of the owned ranges, in double, in order. Summed over every rank
  // it counts each parameter of the model once.
  double gradient_square_sum() const;

  // Factor for gradients whose global L2 norm is `norm`: min(1, clip / (norm + 1e-6)); 1 when
  // clipping is off.
  double clip_factor(double norm) const;

  // One update of the owned ranges from their gradients times `gradient_factor`. `step` counts
  // from 1. Weight decay falls on Parameter::decays() alone, less what spec.no_decay exempts.
  void step(int64_t step, double learning_rate, double gradient_factor);

  // Weights and moments of the owned ranges, for saving and restoring: three slices per box. The
  // memory they point to stays where it is.
  std::vector<StateSlice> state();

 private:
  template <typename T>
  struct Moments {  // of element ShardPiece::begin
    T* exp_avg = nullptr;
    T* exp_avg_sq = nullptr;
  };
  struct Piece {
    ShardPiece piece;
    Moments<float> wide;       // null with bf16 moments
    Moments<uint16_t> narrow;  // null with fp32 moments
  };
  void step_narrow(const Piece& piece, const AdamwStep& update);

  const OptimizerSpec spec_;
  Kernels& kernels_;
  std::vector<OptimizerShard> shards_;
  // By shard: both moments, one behind the other. One of the two lists is empty.
  std::vector<std::vector<float>> moments_;
  std::vector<std::vector<uint16_t>> narrow_moments_;
  std::vector<float> expanded_;  // a chunk of both bf16 moments as fp32
  std::vector<Piece> pieces_;
};

}  // namespace penstock
