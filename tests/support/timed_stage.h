// A stage whose compute is timed waits: what it sends and receives is real, what it computes is
// nothing. Everything around it (engine, lanes, interleaving, token exchange, reductions) is the
// product's own and cannot tell.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "tests/support/compute_clock.h"
#include "worker/model/stage.h"

namespace penstock {

// What each sub-operation takes. Those that start an exchange take nothing.
struct SubOpCosts {
  std::array<int64_t, kSubOpCount> ns = {};
  int64_t& operator[](SubOp op) { return ns[static_cast<size_t>(op)]; }
  int64_t operator[](SubOp op) const { return ns[static_cast<size_t>(op)]; }
};

struct TimedStageOptions {
  SubOpCosts costs;
  // Whether tokens go anywhere. If so, token t goes to the top_k members of the expert group that
  // follow t in the ring, itself included when its turn comes: every rank sends and receives the
  // same number of rows. If not, every exchange runs with nothing in it.
  bool exchange_tokens = true;
};

// The sub-operations that finish an exchange in the model finish it here, before their own time
// begins to run: where the model has something of its own to do first (the shared expert) it would
// wait later, never earlier.
class TimedStage final : public Stage {
 public:
  // Borrows all. The clock is shared by the stages of a rank, as its device is. REQUIRES: a model
  // whose layers all have experts.
  TimedStage(const StageOptions& options, const TimedStageOptions& timed, ComputeClock& clock,
             Kernels& kernels, ExpertExchange* exchange);

 protected:
  Status run_sub_op(SubOp op, int32_t layer, int32_t slot, int32_t gradient_slot) override;

 private:
  // The exchange that `op` needs the outcome of, and the one that it starts.
  Status finish_exchange(SubOp op, int32_t layer, int32_t slot);
  void start_exchange(SubOp op, int32_t layer, int32_t slot);
  int32_t exchange_slot(int32_t layer, int32_t slot) const { return slot * layer_count_ + layer; }
  void route_tokens();
  std::span<const float> rows(int64_t count) const;

  const TimedStageOptions timed_;
  ComputeClock& clock_;
  ExpertExchange* const exchange_;
  const int32_t layer_count_;
  const int64_t tokens_;
  const int64_t hidden_;
  // What travels: as many rows as can meet on one rank. Values never matter.
  const std::vector<float> rows_;
  std::vector<float> sums_;            // [tokens, hidden] where returning rows are added up
  std::vector<int32_t> experts_;       // [tokens, top_k]
  std::vector<float> gates_;           // [tokens, top_k]
  std::vector<float> gate_gradients_;  // [tokens, top_k]
};

}  // namespace penstock
