#include "comm/data/reduce.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <atomic>

#include "comm/base/random.h"
#include "tests/support/allocation_counter.h"
#include "tests/data/rank_harness.h"

namespace penstock {
namespace {

constexpr uint64_t kSmallScratch = Reducer::kScratchBytesMin;

// Values whose sum depends on the order of addition.
template <typename T>
std::vector<T> contribution(int32_t rank, int64_t count) {
  Random random(5, static_cast<uint64_t>(rank));
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) {
    value = static_cast<T>(random.normal() * (random.below(2) == 0 ? 1e-4 : 1e4));
  }
  return values;
}

template <typename T>
std::vector<T> sum_in_order(const std::vector<Rank>& ranks, int64_t count) {
  std::vector<T> sum = contribution<T>(ranks[0].value, count);
  for (size_t i = 1; i < ranks.size(); ++i) {
    const std::vector<T> addend = contribution<T>(ranks[i].value, count);
    for (size_t j = 0; j < sum.size(); ++j) sum[j] += addend[j];
  }
  return sum;
}

// Reduce-scatter then all-gather over `ranks`, which together make every member hold the whole sum.
void expect_sum_everywhere(TransportKind kind, int32_t world_size, const std::vector<Rank>& ranks,
                           int64_t count, uint64_t scratch_bytes) {
  run_ranks(kind, {.world_size = world_size}, [&](RankContext& context) {
    const Rank self = context.transport.rank();
    const auto place = std::find(ranks.begin(), ranks.end(), self);
    if (place == ranks.end()) return;
    Reducer reducer(&context.transport, scratch_bytes);
    std::vector<float> values = contribution<float>(self.value, count);
    const std::vector<float> before = values;
    const std::vector<float> expected = sum_in_order<float>(ranks, count);
    const Status reduced = reducer.reduce_scatter_sum(ranks, {3}, values);
    ASSERT_TRUE(reduced.ok()) << reduced.to_string();
    const ShardRange mine = shard_range(count, std::ssize(ranks), place - ranks.begin());
    for (int64_t i = 0; i < count; ++i) {
      const bool in_shard = i >= mine.begin && i < mine.end;
      ASSERT_EQ(values[static_cast<size_t>(i)],
                (in_shard ? expected : before)[static_cast<size_t>(i)])
          << "element " << i << " on rank " << self.value;
    }
    const Status gathered = reducer.all_gather(ranks, {3}, values);
    ASSERT_TRUE(gathered.ok()) << gathered.to_string();
    EXPECT_EQ(values, expected);
    ASSERT_TRUE(reducer.barrier(ranks, {4}).ok());
  });
}

std::vector<Rank> first_ranks(int32_t count) {
  std::vector<Rank> ranks;
  for (int32_t i = 0; i < count; ++i) ranks.push_back({i});
  return ranks;
}

TEST(ShardRangeTest, ShardsTileTheRangeAsEvenlyAsCanBe) {
  EXPECT_TRUE(rc::check("tiles", [] {
    const auto count = *rc::gen::inRange<int64_t>(0, 10000);
    const auto shards = *rc::gen::inRange<int64_t>(1, 40);
    int64_t end = 0;
    int64_t previous_size = count;
    for (int64_t i = 0; i < shards; ++i) {
      const ShardRange range = shard_range(count, shards, i);
      RC_ASSERT(range.begin == end);
      RC_ASSERT(range.size() == count / shards || range.size() == count / shards + 1);
      RC_ASSERT(range.size() <= previous_size);
      previous_size = range.size();
      end = range.end;
    }
    RC_ASSERT(end == count);
  }));
}

TEST(ReducerTest, SumOfOneRankIsItsOwnValuesWithoutATransport) {
  Reducer reducer(nullptr);
  const std::vector<Rank> self = {Rank{5}};
  std::vector<float> values = {1.0f, 2.0f};
  std::vector<double> numbers = {3.0};
  EXPECT_TRUE(reducer.reduce_scatter_sum(self, {1}, values).ok());
  EXPECT_TRUE(reducer.all_gather(self, {1}, values).ok());
  EXPECT_TRUE(reducer.all_reduce_sum(self, {1}, numbers).ok());
  EXPECT_TRUE(reducer.barrier(self, {1}).ok());
  EXPECT_EQ(values, (std::vector<float>{1.0f, 2.0f}));
  EXPECT_EQ(numbers, std::vector<double>{3.0});
}

TEST(ReducerTest, SumsAreTakenInRankOrderWhateverTheChunking) {
  for (const uint64_t scratch : {kSmallScratch, uint64_t{16} << 20}) {
    expect_sum_everywhere(TransportKind::kLoopback, 4, first_ranks(4), 100'003, scratch);
  }
}

TEST(ReducerTest, ListOrderCountsNotRankOrderAndOthersStayOut) {
  expect_sum_everywhere(TransportKind::kLoopback, 5, {Rank{4}, Rank{0}, Rank{2}}, 1001,
                        kSmallScratch);
}

TEST(ReducerTest, FewerElementsThanMembersAndNoneAtAllWork) {
  expect_sum_everywhere(TransportKind::kLoopback, 4, first_ranks(4), 3, kSmallScratch);
  expect_sum_everywhere(TransportKind::kLoopback, 4, first_ranks(4), 0, kSmallScratch);
}

TEST(ReducerTest, RandomSizesAndListsSumInOrder) {
  EXPECT_TRUE(rc::check("sums in order", [] {
    const auto world = *rc::gen::inRange(1, 6);
    std::vector<Rank> ranks = first_ranks(world);
    for (size_t i = ranks.size(); i > 1; --i) {
      std::swap(ranks[i - 1], ranks[*rc::gen::inRange<size_t>(0, i)]);
    }
    const auto count = *rc::gen::inRange<int64_t>(0, 12'000);
    expect_sum_everywhere(TransportKind::kLoopback, world, ranks, count, kSmallScratch);
    RC_ASSERT(!testing::Test::HasFailure());
  }));
}

TEST(ReducerTest, SmallSumsAreTheSameBitsOnEveryMember) {
  run_ranks(TransportKind::kLoopback, {.world_size = 4}, [](RankContext& context) {
    const std::vector<Rank> ranks = {Rank{2}, Rank{0}, Rank{3}, Rank{1}};
    Reducer reducer(&context.transport);
    std::vector<double> values = contribution<double>(context.transport.rank().value, 300);
    ASSERT_TRUE(reducer.all_reduce_sum(ranks, {1}, values).ok());
    EXPECT_EQ(values, sum_in_order<double>(ranks, 300));
  });
}

TEST(ReducerTest, NobodyLeavesABarrierBeforeEverybodyEntered) {
  std::atomic<int> entered{0};
  run_ranks(TransportKind::kLoopback, {.world_size = 4}, [&](RankContext& context) {
    Reducer reducer(&context.transport);
    for (int round = 1; round <= 20; ++round) {
      ++entered;
      ASSERT_TRUE(reducer.barrier(first_ranks(4), {1}).ok());
      EXPECT_GE(entered.load(), 4 * round);
    }
  });
}

TEST(ReducerTest, SteadyStateAllocatesNothing) {
  run_ranks(TransportKind::kLoopback, {.world_size = 4}, [](RankContext& context) {
    const std::vector<Rank> ranks = first_ranks(4);
    Reducer reducer(&context.transport, kSmallScratch);
    std::vector<float> values(50'000);
    std::vector<double> numbers(10);
    const uint64_t before = allocations_of_this_thread();
    bool all_ran = true;
    for (int i = 0; i < 5; ++i) {
      all_ran = reducer.reduce_scatter_sum(ranks, {1}, values).ok() && all_ran;
      all_ran = reducer.all_gather(ranks, {1}, values).ok() && all_ran;
      all_ran = reducer.all_reduce_sum(ranks, {2}, numbers).ok() && all_ran;
      all_ran = reducer.barrier(ranks, {3}).ok() && all_ran;
    }
    EXPECT_EQ(allocations_of_this_thread() - before, 0u);
    EXPECT_TRUE(all_ran);
  });
}

TEST(ReducerTest, MemberThatDiesFailsTheCollectiveOnTheOthers) {
  run_ranks(TransportKind::kLoopback, {.world_size = 3, .killed = {1}}, [](RankContext& context) {
    if (context.transport.rank() == Rank{1}) {
      context.die();
      return;
    }
    Reducer reducer(&context.transport, kSmallScratch);
    std::vector<float> values(100'000);
    EXPECT_EQ(reducer.reduce_scatter_sum(first_ranks(3), {1}, values).code(), Code::kUnavailable);
    EXPECT_EQ(reducer.barrier(first_ranks(3), {2}).code(), Code::kAborted);
  });
}

TEST(ReducerTest, MembersThatDisagreeAboutSizesAreToldSo) {
  run_ranks(TransportKind::kLoopback, {.world_size = 2}, [](RankContext& context) {
    Reducer reducer(&context.transport);
    std::vector<double> values(context.transport.rank() == Rank{0} ? 10 : 9);
    const Status status = reducer.all_reduce_sum(first_ranks(2), {1}, values);
    if (context.transport.rank() == Rank{0}) {
      EXPECT_EQ(status.code(), Code::kDataLoss) << status.to_string();
    } else {
      EXPECT_FALSE(status.ok());
    }
  });
}

TEST(ReducerDeathTest, RankOutsideTheListIsAFailedCheck) {
  Reducer reducer(nullptr);
  std::vector<double> values(1);
  EXPECT_DEATH((void)reducer.all_reduce_sum(first_ranks(2), {1}, values), "ranks.size");
}

}  // namespace
}  // namespace penstock
