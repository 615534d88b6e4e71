// Which routed expert is where in an expert group. The E experts of a layer have E seats, E/D on
// each of D ranks: seat s is local expert s % (E/D) of rank s / (E/D), as local_experts() in
// layout.h has it. Every group of a job seats a layer alike, so that an expert's replicas are ranks
// of one expert index.
//
// Tensors are named by expert, never by seat: a checkpoint knows nothing of this.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "comm/base/status.h"
#include "comm/run/model_config.h"

namespace penstock {

// A layer that is not listed has expert e on seat e.
struct ExpertSeats {
  // By layer number as in model.layers.N; the block of multi-token prediction is num_hidden_layers.
  // [E] the expert of each seat: a permutation.
  std::map<int64_t, std::vector<int32_t>> layers;
  bool operator==(const ExpertSeats&) const = default;
};

// Tokens that chose each expert, [E], by layer number; any common factor may be left in.
using ExpertLoads = std::map<int64_t, std::vector<double>>;

// Layers · experts of one job whose seats can be other than those of their numbers.
inline constexpr int64_t kSeatsMax = 1 << 20;

// The layers of a model that have routed experts, the block of multi-token prediction included.
std::vector<int64_t> expert_layers(const ModelConfig& model);
// expert_layers() · E is at most kSeatsMax: experts of the model may be seated.
bool experts_can_move(const ModelConfig& model);

bool is_permutation_of_experts(std::span<const int32_t> seats);
// kInvalidArgument names the layer that the model does not have, or whose seats are no permutation
// of its experts.
Status check_expert_seats(const ExpertSeats& seats, const ModelConfig& model);

// By seat, the expert of a layer; and by expert, its seat. [expert_count]
std::vector<int32_t> experts_by_seat(const ExpertSeats& seats, int64_t layer, int64_t expert_count);
std::vector<int32_t> seats_by_expert(const ExpertSeats& seats, int64_t layer, int64_t expert_count);

}  // namespace penstock
