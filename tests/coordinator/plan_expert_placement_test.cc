#include "coordinator/plan/expert_placement.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace penstock {
namespace {

constexpr double kTolerance = 1e-9;

std::vector<int32_t> in_order(int64_t count) {
  std::vector<int32_t> seats(static_cast<size_t>(count));
  std::iota(seats.begin(), seats.end(), 0);
  return seats;
}

std::vector<int32_t> experts_on(std::span<const int32_t> seats, int64_t ranks, int64_t rank) {
  const int64_t each = std::ssize(seats) / ranks;
  std::vector<int32_t> experts(seats.begin() + rank * each, seats.begin() + (rank + 1) * each);
  std::sort(experts.begin(), experts.end());
  return experts;
}

double imbalance(std::span<const double> loads, std::span<const int32_t> seats, int64_t ranks) {
  double largest = 0.0;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    double sum = 0.0;
    for (const int32_t expert : experts_on(seats, ranks, rank)) sum += loads[expert];
    largest = std::max(largest, sum);
  }
  const double mean = std::accumulate(loads.begin(), loads.end(), 0.0) / static_cast<double>(ranks);
  return mean > 0.0 ? largest / mean : 1.0;
}

LayerBalance balanced(std::span<const double> loads, std::span<const int32_t> present,
                      const ExpertGrid& grid) {
  Result<LayerBalance> balance = balance_layer(loads, present, grid);
  EXPECT_TRUE(balance.ok()) << balance.status().message();
  return balance.ok() ? *balance : LayerBalance{};
}

// ---- EPLB itself

TEST(PackExpertsTest, GivesThePublishedCheckVector) {
  const std::vector<double> loads = {90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86};
  const auto packed = pack_experts(loads, 16, {.groups = 4, .nodes = 2, .ranks = 8});
  ASSERT_TRUE(packed.ok()) << packed.status().message();
  EXPECT_EQ(packed->expert,
            (std::vector<int32_t>{5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1}));
  EXPECT_EQ(packed->slots[5], (std::vector<int32_t>{0, 2}));
  EXPECT_EQ(packed->slots[7], (std::vector<int32_t>{3}));
}

TEST(PackExpertsTest, LeavesExpertsInOrderWhenEachRankHasOneSlot) {
  const auto packed =
      pack_experts(std::vector<double>{1, 9, 5, 3}, 4, {.groups = 1, .nodes = 1, .ranks = 4});
  ASSERT_TRUE(packed.ok());
  EXPECT_EQ(packed->expert, in_order(4));
}

TEST(PackExpertsTest, IgnoresNodesThatDoNotDivideTheGroups) {
  const std::vector<double> loads = {8, 7, 6, 5, 4, 3, 2, 1, 1};
  const auto odd = pack_experts(loads, 12, {.groups = 3, .nodes = 2, .ranks = 4});
  const auto global = pack_experts(loads, 12, {.groups = 1, .nodes = 1, .ranks = 4});
  ASSERT_TRUE(odd.ok() && global.ok());
  EXPECT_EQ(odd->expert, global->expert);
}

TEST(PackExpertsTest, RefusesLoadsThatAreNoLoads) {
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity(), -1.0}) {
    EXPECT_EQ(pack_experts(std::vector<double>{1, bad}, 2, {.ranks = 2}).status().code(),
              Code::kInvalidArgument);
  }
  const double huge = std::numeric_limits<double>::max();
  EXPECT_EQ(pack_experts(std::vector<double>{huge, huge}, 2, {.ranks = 2}).status().code(),
            Code::kInvalidArgument);
}

TEST(PackExpertsTest, RefusesCountsThatDoNotDivide) {
  const std::vector<double> loads(6, 1.0);
  const auto refused = [&](int64_t slots, const ExpertGrid& grid) {
    return pack_experts(loads, slots, grid).status().code() == Code::kInvalidArgument;
  };
  EXPECT_TRUE(refused(6, {.groups = 4, .nodes = 1, .ranks = 2}));  // experts by groups
  EXPECT_TRUE(refused(6, {.groups = 1, .nodes = 1, .ranks = 4}));  // slots by ranks
  EXPECT_TRUE(refused(6, {.groups = 2, .nodes = 2, .ranks = 3}));  // ranks by nodes
  EXPECT_TRUE(refused(4, {.groups = 1, .nodes = 1, .ranks = 2}));  // fewer slots than experts
  EXPECT_TRUE(refused(6, {.groups = 0, .nodes = 1, .ranks = 2}));
  EXPECT_TRUE(refused(6, {.groups = 1, .nodes = 0, .ranks = 2}));
  EXPECT_TRUE(refused(6, {.groups = 1, .nodes = 1, .ranks = -2}));
  EXPECT_TRUE(refused(int64_t{1} << 40, {.groups = 1, .nodes = 1, .ranks = 2}));
  EXPECT_EQ(pack_experts({}, 0, {}).status().code(), Code::kInvalidArgument);
}

TEST(PackExpertsTest, SpreadsSlotsEvenlyAndGivesMoreCopiesToMoreLoad) {
  EXPECT_TRUE(rc::check([] {
    const auto ranks = *rc::gen::inRange<int64_t>(1, 9);
    const auto each = *rc::gen::inRange<int64_t>(1, 5);
    const int64_t slots = ranks * each;
    const auto experts = *rc::gen::inRange<int64_t>(1, slots + 1);
    const auto loads = *rc::gen::container<std::vector<double>>(
        static_cast<size_t>(experts), rc::gen::map(rc::gen::inRange(0, 1000), [](int load) {
          return static_cast<double>(load);
        }));
    const auto packed = pack_experts(loads, slots, {.groups = 1, .nodes = 1, .ranks = ranks});
    RC_ASSERT(packed.ok());
    RC_ASSERT(std::ssize(packed->expert) == slots);
    std::vector<int64_t> found(loads.size(), 0);
    for (const int32_t expert : packed->expert) ++found[expert];
    for (size_t e = 0; e < loads.size(); ++e) {
      RC_ASSERT(found[e] >= 1);
      RC_ASSERT(std::ssize(packed->slots[e]) == found[e]);
      for (const int32_t slot : packed->slots[e]) RC_ASSERT(packed->expert[slot] == int32_t(e));
      for (size_t other = 0; other < loads.size(); ++other) {
        if (loads[e] > loads[other]) RC_ASSERT(found[e] >= found[other]);
      }
    }
  }));
}

// ---- what training makes of it

TEST(BalanceLayerTest, EvensOutAHotRank) {
  // Rank 0 has the two hot experts, rank 1 the two cold ones.
  const std::vector<double> loads = {10, 10, 1, 1};
  const LayerBalance balance = balanced(loads, in_order(4), {.ranks = 2});
  EXPECT_DOUBLE_EQ(balance.before, 20.0 / 11.0);
  EXPECT_DOUBLE_EQ(balance.after, 1.0);
  EXPECT_EQ(balance.moved, 2);
  EXPECT_DOUBLE_EQ(balance.mean, 11.0);
}

TEST(BalanceLayerTest, KeepsWhatIsAsGoodUnderOtherRankNumbers) {
  const std::vector<double> loads = {4, 1, 3, 2, 2, 3};
  const std::vector<int32_t> present = {4, 5, 2, 3, 0, 1};  // balanced already, out of order
  const LayerBalance balance = balanced(loads, present, {.ranks = 3});
  EXPECT_EQ(balance.seats, present);
  EXPECT_EQ(balance.moved, 0);
}

TEST(BalanceLayerTest, NamesRanksSoThatFewestExpertsMove) {
  // Any good packing pairs 0 with 5, 1 with 4 and 2 with 3; rank 2 has {2, 3} already.
  const std::vector<double> loads = {32, 16, 8, 8, 1, 0};
  const std::vector<int32_t> present = {0, 1, 4, 5, 2, 3};
  const LayerBalance balance = balanced(loads, present, {.ranks = 3});
  EXPECT_EQ(experts_on(balance.seats, 3, 2), (std::vector<int32_t>{2, 3}));
  EXPECT_EQ(balance.moved, 2);
}

TEST(BalanceLayerTest, KeepsRoutingGroupsOnOneNode) {
  EXPECT_TRUE(rc::check([] {
    const auto nodes = *rc::gen::element<int64_t>(2, 4);
    const auto groups = nodes * *rc::gen::inRange<int64_t>(1, 3);
    const auto ranks = nodes * *rc::gen::inRange<int64_t>(1, 4);
    const int64_t experts = groups * ranks * *rc::gen::inRange<int64_t>(1, 3);
    const auto loads = *rc::gen::container<std::vector<double>>(
        static_cast<size_t>(experts),
        rc::gen::map(rc::gen::inRange(0, 50), [](int load) { return static_cast<double>(load); }));
    const LayerBalance balance = balanced(loads, in_order(experts), {groups, nodes, ranks});
    std::vector<int64_t> node_of_group(static_cast<size_t>(groups), -1);
    for (int64_t seat = 0; seat < experts; ++seat) {
      const int64_t group = balance.seats[seat] / (experts / groups);
      const int64_t node = seat / (experts / nodes);
      if (node_of_group[group] < 0) node_of_group[group] = node;
      RC_ASSERT(node_of_group[group] == node);
    }
  }));
}

// Nodes that changed places are the same to the packing; only two of the hot experts must part.
TEST(BalanceLayerTest, NamesWholeNodesSoThatFewestExpertsMove) {
  const std::vector<double> loads = {9, 9, 1, 1, 6, 3, 5, 4};
  const std::vector<int32_t> swapped = {4, 5, 6, 7, 0, 1, 2, 3};
  const LayerBalance balance = balanced(loads, swapped, {.groups = 2, .nodes = 2, .ranks = 4});
  EXPECT_EQ(experts_on(balance.seats, 2, 0), (std::vector<int32_t>{4, 5, 6, 7}));
  EXPECT_EQ(balance.moved, 2);
}

TEST(BalanceLayerTest, IsAPermutationNeverWorseAndMovesNothingForNothing) {
  EXPECT_TRUE(rc::check([] {
    const auto ranks = *rc::gen::inRange<int64_t>(1, 9);
    const int64_t experts = ranks * *rc::gen::inRange<int64_t>(1, 7);
    const auto loads = *rc::gen::container<std::vector<double>>(
        static_cast<size_t>(experts),
        rc::gen::weightedOneOf<double>(
            {{4, rc::gen::map(rc::gen::inRange(0, 1000),
                              [](int load) { return static_cast<double>(load); })},
             {1, rc::gen::just(0.0)},
             {1, rc::gen::just(1e300)}}));
    std::vector<int32_t> present = in_order(experts);
    for (size_t i = present.size(); i > 1; --i) {
      std::swap(present[i - 1], present[*rc::gen::inRange<size_t>(0, i)]);
    }
    const LayerBalance balance = balanced(loads, present, {.ranks = ranks});
    RC_ASSERT(balance.seats.size() == present.size());
    RC_ASSERT(is_permutation_of_experts(balance.seats));
    RC_ASSERT(std::abs(imbalance(loads, present, ranks) - balance.before) <= kTolerance);
    RC_ASSERT(std::abs(imbalance(loads, balance.seats, ranks) - balance.after) <= kTolerance);
    RC_ASSERT(balance.after <= balance.before);
    RC_ASSERT((balance.after < balance.before) == (balance.moved > 0));
    if (balance.moved == 0) RC_ASSERT(balance.seats == present);
    int64_t moved = 0;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      std::vector<int32_t> came;
      const auto before = experts_on(present, ranks, rank);
      const auto after = experts_on(balance.seats, ranks, rank);
      std::set_difference(after.begin(), after.end(), before.begin(), before.end(),
                          std::back_inserter(came));
      moved += std::ssize(came);
    }
    RC_ASSERT(moved == balance.moved);
  }));
}

// Against every naming of the packed ranks.
TEST(BalanceLayerTest, NoOtherNamingOfTheRanksMovesFewerExperts) {
  EXPECT_TRUE(rc::check([] {
    const auto ranks = *rc::gen::inRange<int64_t>(2, 6);
    const int64_t experts = ranks * *rc::gen::inRange<int64_t>(2, 5);
    const auto loads = *rc::gen::container<std::vector<double>>(
        static_cast<size_t>(experts),
        rc::gen::map(rc::gen::inRange(0, 9), [](int load) { return static_cast<double>(load); }));
    const std::vector<int32_t> present = in_order(experts);
    const LayerBalance balance = balanced(loads, present, {.ranks = ranks});
    RC_PRE(balance.moved > 0);
    std::vector<int64_t> naming(static_cast<size_t>(ranks));
    std::iota(naming.begin(), naming.end(), 0);
    do {
      int64_t stay = 0;
      for (int64_t rank = 0; rank < ranks; ++rank) {
        for (const int32_t expert : experts_on(balance.seats, ranks, rank)) {
          stay += expert / (experts / ranks) == naming[rank];
        }
      }
      RC_ASSERT(experts - stay >= balance.moved);
    } while (std::next_permutation(naming.begin(), naming.end()));
  }));
}

TEST(BalanceLayerTest, StaysAsItIsWithoutAnyLoad) {
  const LayerBalance balance = balanced(std::vector<double>(8, 0.0), in_order(8), {.ranks = 4});
  EXPECT_EQ(balance.seats, in_order(8));
  EXPECT_EQ(balance.before, 1.0);
  EXPECT_EQ(balance.after, 1.0);
}

TEST(BalanceLayerTest, RefusesSeatsThatAreNoPermutation) {
  const std::vector<double> loads(4, 1.0);
  for (const std::vector<int32_t>& bad :
       {std::vector<int32_t>{0, 1, 2}, {0, 1, 2, 2}, {0, 1, 2, 4}, {-1, 1, 2, 3}}) {
    EXPECT_EQ(balance_layer(loads, bad, {.ranks = 2}).status().code(), Code::kInvalidArgument);
  }
}

TEST(BalanceLayerTest, RefusesMoreRanksThanItCanNameInTime) {
  const int64_t experts = 2 * kBalancedRanksMax;
  EXPECT_EQ(balance_layer(std::vector<double>(static_cast<size_t>(experts), 1.0), in_order(experts),
                          {.ranks = experts})
                .status()
                .code(),
            Code::kInvalidArgument);
}

// ---- a whole model

TEST(BalanceExpertsTest, SumsUpLayersAndKeepsThoseThatDoNotChange) {
  const ExpertLoads loads = {{3, {10, 10, 1, 1}}, {5, {1, 1, 1, 1}}};
  const ExpertSeats present = {{{5, {3, 2, 1, 0}}}};
  const auto balance = balance_experts(loads, present, {.ranks = 2});
  ASSERT_TRUE(balance.ok());
  EXPECT_EQ(balance->moved(), 2);
  EXPECT_DOUBLE_EQ(balance->before(), 20.0 / 11.0);
  EXPECT_DOUBLE_EQ(balance->after(), 1.0);
  EXPECT_DOUBLE_EQ(balance->gain(), 1.0 - 13.0 / 22.0);  // 20 + 2 to wait for, then 11 + 2
  const ExpertSeats seats = balance->seats(present);
  EXPECT_DOUBLE_EQ(largest_imbalance(loads, present, 2), balance->before());
  EXPECT_DOUBLE_EQ(largest_imbalance(loads, seats, 2), balance->after());
  EXPECT_EQ(seats.layers.at(5), present.layers.at(5));
  EXPECT_EQ(seats.layers.at(3), balance->layers.at(3).seats);
}

TEST(BalanceExpertsTest, NamesTheLayerThatItRefuses) {
  const auto balance = balance_experts({{7, {1.0, std::nan("")}}}, {}, {.ranks = 2});
  EXPECT_NE(balance.status().message().find("layer 7"), std::string::npos);
}

TEST(BalanceExpertsTest, IsWorthAMoveFromThresholdAndGainOn) {
  const auto skewed = balance_experts({{0, {10, 10, 1, 1}}}, {}, {.ranks = 2});
  ASSERT_TRUE(skewed.ok());
  EXPECT_TRUE(worth_moving(*skewed, 1.2));
  EXPECT_TRUE(worth_moving(*skewed, skewed->before()));
  EXPECT_FALSE(worth_moving(*skewed, 2.0));
  // One expert is hotter than any other packing could make up for.
  const auto hopeless = balance_experts({{0, {100, 1.01, 1, 1}}}, {}, {.ranks = 2});
  ASSERT_TRUE(hopeless.ok());
  EXPECT_GT(hopeless->before(), 1.9);
  EXPECT_FALSE(worth_moving(*hopeless, 1.2));
}

}  // namespace
}  // namespace penstock
