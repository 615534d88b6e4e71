// Which rank should hold which expert, so that measured load is spread evenly: DeepSeek's expert
// parallelism load balancer (EPLB, https://github.com/deepseek-ai/EPLB), and what training makes of
// it. Pure.
//
// Training holds each expert once per group: no replicas, R = E slots. Time of a layer is that of
// its most loaded rank, hence
//   imbalance of a layer = largest rank load / mean rank load, 1 being perfect.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "comm/base/status.h"
#include "comm/run/expert_seats.h"

namespace penstock {

// Where the slots are: `ranks` in order, the same number on each of `nodes`. A router that limits
// the nodes of a token does it by `groups` of experts, so these are kept whole on a node where
// nodes divide them ("hierarchical"); else nodes are left out of account ("global").
struct ExpertGrid {
  int64_t groups = 1;
  int64_t nodes = 1;
  int64_t ranks = 1;
};
inline constexpr int64_t kBalancedRanksMax = 256;  // keeps balance_layer() short

struct PackedExperts {
  std::vector<int32_t> expert;              // [slots] in rank order, slots / ranks on each
  std::vector<std::vector<int32_t>> slots;  // [E] by copy: at least one each
};

// EPLB: groups packed onto nodes, the most loaded experts of a node copied into what slots are
// left, slots packed onto ranks; every packing greedy, largest first, equally many to each bin.
// loads: [E]. kInvalidArgument when a load is negative or not finite, or a count does not divide.
Result<PackedExperts> pack_experts(std::span<const double> loads, int64_t slot_count,
                                   const ExpertGrid& grid);

// Of one layer. Loads in tokens, or any unit.
struct LayerBalance {
  std::vector<int32_t> seats;  // [E] as to be: `present` itself unless another has less to wait for
  double mean = 0.0;           // of the ranks' loads
  double before = 1.0;         // imbalance; 1 without any load
  double after = 1.0;
  int64_t moved = 0;  // experts that change their rank
};

// The packing of `loads` on `present` [E]: it does not care which rank is which, so they are named
// such that the fewest experts move. Errors as pack_experts(), and kInvalidArgument for more than
// kBalancedRanksMax ranks or a `present` that is no permutation.
// Cost: O(ranks^3) per layer at worst. DeepSeek-V3's 58 layers of 256 experts on 64 ranks take 60
// ms, 58 layers of 512 experts on 256 ranks 180 ms.
Result<LayerBalance> balance_layer(std::span<const double> loads, std::span<const int32_t> present,
                                   const ExpertGrid& grid);

// Of a whole model: by layer number.
struct ExpertBalance {
  std::map<int64_t, LayerBalance> layers;
  double before() const;  // worst over the layers
  double after() const;
  int64_t moved() const;
  // Share of the time in experts that the new seats save: layers one after the other, each as long
  // as its most loaded rank.
  double gain() const;
  // `present` with the layers that change.
  ExpertSeats seats(const ExpertSeats& present) const;
};

Result<ExpertBalance> balance_experts(const ExpertLoads& loads, const ExpertSeats& present,
                                      const ExpertGrid& grid);

// The imbalance of the worst layer with its experts on `seats`; 1 without any load.
// REQUIRES: `ranks` divides the experts of every layer, and `seats` fit them.
double largest_imbalance(const ExpertLoads& loads, const ExpertSeats& seats, int64_t ranks);

// A restart costs seconds and measured load is noisy, so a move by itself (nobody asked for it)
// needs an imbalance of at least `threshold` somewhere and this gain.
inline constexpr double kRebalanceGainMin = 0.02;
bool worth_moving(const ExpertBalance& balance, double threshold);

}  // namespace penstock
