#include "comm/run/expert_seats.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "comm/base/check.h"

namespace penstock {

std::vector<int64_t> expert_layers(const ModelConfig& model) {
  const int64_t end = model.num_hidden_layers + model.num_nextn_predict_layers;
  std::vector<int64_t> layers;
  for (int64_t layer = 0; layer < end; ++layer) {
    if (model.is_moe(layer)) layers.push_back(layer);
  }
  return layers;
}

bool experts_can_move(const ModelConfig& model) {
  return std::ssize(expert_layers(model)) * model.n_routed_experts <= kSeatsMax;
}

bool is_permutation_of_experts(std::span<const int32_t> seats) {
  std::vector<bool> seen(seats.size(), false);
  for (const int32_t expert : seats) {
    if (expert < 0 || static_cast<size_t>(expert) >= seats.size()) return false;
    if (seen[static_cast<size_t>(expert)]) return false;
    seen[static_cast<size_t>(expert)] = true;
  }
  return true;
}

Status check_expert_seats(const ExpertSeats& seats, const ModelConfig& model) {
  const std::vector<int64_t> known = expert_layers(model);
  for (const auto& [layer, experts] : seats.layers) {
    if (!std::binary_search(known.begin(), known.end(), layer)) {
      return invalid_argument(fmt::format(
          "expert seats of layer {}, which has no routed experts in this model", layer));
    }
    if (std::ssize(experts) != model.n_routed_experts || !is_permutation_of_experts(experts)) {
      return invalid_argument(
          fmt::format("the expert seats of layer {} do not hold each of the {} "
                      "experts once",
                      layer, model.n_routed_experts));
    }
  }
  return {};
}

std::vector<int32_t> experts_by_seat(const ExpertSeats& seats, int64_t layer,
                                     int64_t expert_count) {
  if (const auto found = seats.layers.find(layer); found != seats.layers.end()) {
    PENSTOCK_CHECK(std::ssize(found->second) == expert_count, layer);
    return found->second;
  }
  std::vector<int32_t> experts(static_cast<size_t>(expert_count));
  std::iota(experts.begin(), experts.end(), 0);
  return experts;
}

std::vector<int32_t> seats_by_expert(const ExpertSeats& seats, int64_t layer,
                                     int64_t expert_count) {
  const std::vector<int32_t> experts = experts_by_seat(seats, layer, expert_count);
  std::vector<int32_t> result(experts.size());
  for (size_t seat = 0; seat < experts.size(); ++seat) {
    result[static_cast<size_t>(experts[seat])] = static_cast<int32_t>(seat);
  }
  return result;
}

}  // namespace penstock
