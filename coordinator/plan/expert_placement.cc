#include "coordinator/plan/expert_placement.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "comm/base/check.h"

namespace penstock {
namespace {

using Bins = std::vector<std::vector<int32_t>>;

// Items by bin, in the order they were put there; equally many in each.
Bins pack(const std::vector<double>& weights, int64_t bin_count) {
  const auto bins = static_cast<size_t>(bin_count);
  const size_t capacity = weights.size() / bins;
  PENSTOCK_CHECK(weights.size() % bins == 0, weights.size(), bins);
  std::vector<int32_t> order(weights.size());
  std::iota(order.begin(), order.end(), 0);
  Bins packed(bins);
  if (capacity == 1) {
    for (const int32_t item : order) packed[static_cast<size_t>(item)] = {item};
    return packed;
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return weights[a] > weights[b]; });
  std::vector<double> load(bins, 0.0);
  for (const int32_t item : order) {
    size_t best = bins;
    for (size_t bin = 0; bin < bins; ++bin) {
      const bool better = best == bins || load[bin] < load[best];
      if (packed[bin].size() < capacity && better) best = bin;
    }
    packed[best].push_back(item);
    load[best] += weights[item];
  }
  return packed;
}

struct Copies {
  std::vector<int32_t> item;   // [slots]
  std::vector<int32_t> count;  // [items]
};

Copies replicate(const std::vector<double>& weights, size_t slot_count) {
  Copies copies;
  copies.item.resize(weights.size());
  std::iota(copies.item.begin(), copies.item.end(), 0);
  copies.count.assign(weights.size(), 1);
  while (copies.item.size() < slot_count) {
    int32_t most = 0;
    for (int32_t i = 1; i < std::ssize(weights); ++i) {
      if (weights[i] / copies.count[i] > weights[most] / copies.count[most]) most = i;
    }
    copies.item.push_back(most);
    ++copies.count[most];
  }
  return copies;
}

Status check_packing(std::span<const double> loads, int64_t slot_count, const ExpertGrid& grid) {
  double sum = 0.0;
  for (const double load : loads) {
    if (!std::isfinite(load) || load < 0.0) {
      return invalid_argument("an expert's load must be a number of at least 0");
    }
    sum += load;
  }
  if (!std::isfinite(sum)) return invalid_argument("the experts' loads are too large to add up");
  const int64_t experts = std::ssize(loads);
  const auto divides = [](int64_t part, int64_t whole) { return part > 0 && whole % part == 0; };
  if (experts > 0 && divides(grid.groups, experts) && divides(grid.nodes, grid.ranks) &&
      divides(grid.ranks, slot_count) && slot_count >= experts && slot_count <= kSeatsMax) {
    return {};
  }
  return invalid_argument(
      fmt::format("{} experts in {} groups cannot be packed evenly into {} slots of {} ranks on {} "
                  "nodes",
                  experts, grid.groups, slot_count, grid.ranks, grid.nodes));
}

// Which row goes to which column so that the sum of the chosen `worth` is largest: the Hungarian
// method with potentials (Kuhn 1955, Munkres 1957). Rows and columns are counted from 1 inside, 0
// standing for none.
std::vector<size_t> best_assignment(const std::vector<std::vector<int64_t>>& worth) {
  const size_t n = worth.size();
  std::vector<int64_t> row_potential(n + 1, 0);
  std::vector<int64_t> column_potential(n + 1, 0);
  std::vector<size_t> row_of(n + 1, 0);
  std::vector<size_t> way(n + 1, 0);
  for (size_t row = 1; row <= n; ++row) {
    std::vector<int64_t> least(n + 1, std::numeric_limits<int64_t>::max());
    std::vector<bool> used(n + 1, false);
    size_t column = 0;
    row_of[0] = row;
    while (row_of[column] != 0) {
      used[column] = true;
      const size_t at = row_of[column];
      int64_t step = std::numeric_limits<int64_t>::max();
      size_t next = 0;
      for (size_t j = 1; j <= n; ++j) {
        if (used[j]) continue;
        const int64_t reduced = -worth[at - 1][j - 1] - row_potential[at] - column_potential[j];
        if (reduced < least[j]) {
          least[j] = reduced;
          way[j] = column;
        }
        if (least[j] < step) {
          step = least[j];
          next = j;
        }
      }
      for (size_t j = 0; j <= n; ++j) {
        if (used[j]) {
          row_potential[row_of[j]] += step;
          column_potential[j] -= step;
        } else if (j > 0) {
          least[j] -= step;
        }
      }
      column = next;
    }
    for (; column != 0; column = way[column]) row_of[column] = row_of[way[column]];
  }
  std::vector<size_t> column_of(n);
  for (size_t j = 1; j <= n; ++j) column_of[row_of[j] - 1] = j - 1;
  return column_of;
}

// Experts in common of packed ranks [a, a + n) and present ranks [b, b + n).
std::vector<std::vector<int64_t>> in_common(const Bins& packed, const std::vector<size_t>& rank_of,
                                            size_t a, size_t b, size_t n) {
  std::vector<std::vector<int64_t>> common(n, std::vector<int64_t>(n, 0));
  for (size_t bin = 0; bin < n; ++bin) {
    for (const int32_t expert : packed[a + bin]) {
      const size_t rank = rank_of[static_cast<size_t>(expert)];
      if (rank >= b && rank < b + n) ++common[bin][rank - b];
    }
  }
  return common;
}

// By packed rank, the rank that takes its place: nodes for nodes, and ranks for ranks inside.
std::vector<size_t> fewest_moves(const Bins& packed, const std::vector<size_t>& rank_of,
                                 size_t nodes) {
  const size_t each = packed.size() / nodes;
  std::vector<std::vector<int64_t>> stay(nodes, std::vector<int64_t>(nodes, 0));
  for (size_t from = 0; from < nodes; ++from) {
    for (size_t to = 0; to < nodes; ++to) {
      const auto common = in_common(packed, rank_of, from * each, to * each, each);
      const std::vector<size_t> best = best_assignment(common);
      for (size_t i = 0; i < each; ++i) stay[from][to] += common[i][best[i]];
    }
  }
  const std::vector<size_t> node_of = best_assignment(stay);
  std::vector<size_t> target(packed.size());
  for (size_t from = 0; from < nodes; ++from) {
    const size_t to = node_of[from];
    const std::vector<size_t> best =
        best_assignment(in_common(packed, rank_of, from * each, to * each, each));
    for (size_t i = 0; i < each; ++i) target[from * each + i] = to * each + best[i];
  }
  return target;
}

double largest_rank_load(std::span<const double> loads, std::span<const int32_t> seats,
                         size_t ranks) {
  const size_t each = seats.size() / ranks;
  double largest = 0.0;
  for (size_t rank = 0; rank < ranks; ++rank) {
    double sum = 0.0;
    for (const int32_t expert : seats.subspan(rank * each, each)) {
      sum += loads[static_cast<size_t>(expert)];
    }
    largest = std::max(largest, sum);
  }
  return largest;
}

double imbalance(std::span<const double> loads, std::span<const int32_t> seats, size_t ranks) {
  const double mean = std::accumulate(loads.begin(), loads.end(), 0.0) / static_cast<double>(ranks);
  return mean > 0.0 ? largest_rank_load(loads, seats, ranks) / mean : 1.0;
}

// Whole numbers of tokens differ by more; sums in another order do not.
constexpr double kSumTolerance = 1e-9;

}  // namespace

Result<PackedExperts> pack_experts(std::span<const double> loads, int64_t slot_count,
                                   const ExpertGrid& asked) {
  PENSTOCK_TRY(check_packing(loads, slot_count, asked));
  ExpertGrid grid = asked;
  if (grid.groups % grid.nodes != 0) grid.groups = grid.nodes = 1;
  const auto group_size = static_cast<size_t>(std::ssize(loads) / grid.groups);
  std::vector<double> group_loads(static_cast<size_t>(grid.groups), 0.0);
  for (size_t e = 0; e < loads.size(); ++e) group_loads[e / group_size] += loads[e];

  PackedExperts result;
  result.slots.resize(loads.size());
  for (const std::vector<int32_t>& groups : pack(group_loads, grid.nodes)) {
    std::vector<int32_t> experts;  // of this node
    std::vector<double> weights;
    for (const int32_t group : groups) {
      for (size_t i = 0; i < group_size; ++i) {
        experts.push_back(static_cast<int32_t>(static_cast<size_t>(group) * group_size + i));
        weights.push_back(loads[static_cast<size_t>(experts.back())]);
      }
    }
    const Copies copies = replicate(weights, static_cast<size_t>(slot_count / grid.nodes));
    std::vector<double> shares;
    for (const int32_t item : copies.item) shares.push_back(weights[item] / copies.count[item]);
    std::vector<int32_t> slot_of_copy(shares.size());
    for (const std::vector<int32_t>& bin : pack(shares, grid.ranks / grid.nodes)) {
      for (const int32_t copy : bin) {
        slot_of_copy[copy] = static_cast<int32_t>(result.expert.size());
        result.expert.push_back(experts[copies.item[copy]]);
      }
    }
    for (size_t copy = 0; copy < slot_of_copy.size(); ++copy) {
      result.slots[static_cast<size_t>(experts[copies.item[copy]])].push_back(slot_of_copy[copy]);
    }
  }
  return result;
}

Result<LayerBalance> balance_layer(std::span<const double> loads, std::span<const int32_t> present,
                                   const ExpertGrid& grid) {
  if (present.size() != loads.size() || !is_permutation_of_experts(present)) {
    return invalid_argument("the present seats do not hold each expert once");
  }
  if (grid.ranks > kBalancedRanksMax) {
    return invalid_argument(fmt::format("{} ranks share experts; at most {} can be balanced",
                                        grid.ranks, kBalancedRanksMax));
  }
  PENSTOCK_TRY_ASSIGN(const PackedExperts packing, pack_experts(loads, std::ssize(loads), grid));
  const auto ranks = static_cast<size_t>(grid.ranks);
  const size_t each = loads.size() / ranks;
  Bins packed(ranks);
  std::vector<size_t> rank_of(loads.size());
  for (size_t seat = 0; seat < loads.size(); ++seat) {
    packed[seat / each].push_back(packing.expert[seat]);
    rank_of[static_cast<size_t>(present[seat])] = seat / each;
  }
  LayerBalance balance;
  balance.seats.assign(present.begin(), present.end());
  balance.mean = std::accumulate(loads.begin(), loads.end(), 0.0) / static_cast<double>(ranks);
  balance.before = imbalance(loads, present, ranks);
  balance.after = imbalance(loads, packing.expert, ranks);
  if (balance.after >= balance.before * (1.0 - kSumTolerance)) {
    balance.after = balance.before;
    return balance;
  }

  const size_t nodes = grid.groups % grid.nodes == 0 ? static_cast<size_t>(grid.nodes) : 1;
  const std::vector<size_t> target = fewest_moves(packed, rank_of, nodes);
  for (size_t bin = 0; bin < ranks; ++bin) {
    std::sort(packed[bin].begin(), packed[bin].end());
    std::copy(packed[bin].begin(), packed[bin].end(),
              balance.seats.begin() + static_cast<ptrdiff_t>(target[bin] * each));
    balance.moved += std::count_if(packed[bin].begin(), packed[bin].end(), [&](int32_t expert) {
      return rank_of[static_cast<size_t>(expert)] != target[bin];
    });
  }
  return balance;
}

double ExpertBalance::before() const {
  double worst = 1.0;
  for (const auto& [layer, balance] : layers) worst = std::max(worst, balance.before);
  return worst;
}

double ExpertBalance::after() const {
  double worst = 1.0;
  for (const auto& [layer, balance] : layers) worst = std::max(worst, balance.after);
  return worst;
}

int64_t ExpertBalance::moved() const {
  int64_t sum = 0;
  for (const auto& [layer, balance] : layers) sum += balance.moved;
  return sum;
}

double ExpertBalance::gain() const {
  double before = 0.0;
  double after = 0.0;
  for (const auto& [layer, balance] : layers) {
    before += balance.before * balance.mean;
    after += balance.after * balance.mean;
  }
  return before > 0.0 ? 1.0 - after / before : 0.0;
}

ExpertSeats ExpertBalance::seats(const ExpertSeats& present) const {
  ExpertSeats result = present;
  for (const auto& [layer, balance] : layers) {
    if (balance.moved > 0) result.layers[layer] = balance.seats;
  }
  return result;
}

Result<ExpertBalance> balance_experts(const ExpertLoads& loads, const ExpertSeats& present,
                                      const ExpertGrid& grid) {
  ExpertBalance balance;
  for (const auto& [layer, of_layer] : loads) {
    const std::vector<int32_t> seats = experts_by_seat(present, layer, std::ssize(of_layer));
    Result<LayerBalance> balanced = balance_layer(of_layer, seats, grid);
    if (!balanced.ok()) return balanced.status().with_context(fmt::format("layer {}", layer));
    balance.layers.emplace(layer, *std::move(balanced));
  }
  return balance;
}

double largest_imbalance(const ExpertLoads& loads, const ExpertSeats& seats, int64_t ranks) {
  double worst = 1.0;
  for (const auto& [layer, of_layer] : loads) {
    const std::vector<int32_t> experts = experts_by_seat(seats, layer, std::ssize(of_layer));
    worst = std::max(worst, imbalance(of_layer, experts, static_cast<size_t>(ranks)));
  }
  return worst;
}

bool worth_moving(const ExpertBalance& balance, double threshold) {
  return balance.before() >= threshold && balance.gain() >= kRebalanceGainMin;
}

}  // namespace penstock
