#include "comm/data/expert_exchange.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <set>

#include "comm/base/random.h"
#include "tests/data/expert_problem.h"
#include "tests/data/rank_harness.h"
#include "tests/support/allocation_counter.h"

namespace penstock {
namespace {

std::unique_ptr<ExpertExchange> make_exchange(Transport& transport, const ExpertProblem& problem,
                                              int32_t slot_count = 1) {
  auto exchange =
      ExpertExchange::create(&transport, problem.config(transport.rank().value, slot_count));
  PENSTOCK_CHECK(exchange.ok(), exchange.status().message());
  return std::move(exchange).value();
}

HarnessOptions world_of(const ExpertProblem& problem) {
  return {.world_size = problem.group_size};
}

// Runs the layer on every rank of the problem and compares with the plain computation, bit by bit.
void expect_layer_matches(TransportKind kind, const ExpertProblem& problem) {
  run_ranks(kind, world_of(problem), [&](RankContext& rank) {
    const int32_t self = rank.transport.rank().value;
    const auto exchange = make_exchange(rank.transport, problem);
    ExchangedLayer layer(problem, self, *exchange, 0, {64});
    const Status status = layer.run();
    ASSERT_TRUE(status.ok()) << status.to_string();
    const RankOutput expected = expected_output(problem, self);
    EXPECT_EQ(layer.output().out, expected.out);
    EXPECT_EQ(layer.output().dx, expected.dx);
    EXPECT_EQ(layer.output().d_topk_weight, expected.d_topk_weight);
  });
}

TEST(ExpertExchangeTest, GroupOfOneNeedsNoTransport) {
  const ExpertProblem problem{.group_size = 1, .experts_per_rank = 4, .top_k = 3};
  const auto exchange = ExpertExchange::create(nullptr, problem.config(0));
  ASSERT_TRUE(exchange.ok()) << exchange.status().to_string();
  ExchangedLayer layer(problem, 0, **exchange, 0, {0});
  ASSERT_TRUE(layer.run().ok());
  EXPECT_EQ(layer.output(), expected_output(problem, 0));
}

TEST(ExpertExchangeTest, TwoRanksMatchOneProcessBitForBit) {
  expect_layer_matches(TransportKind::kLoopback, {.group_size = 2, .top_k = 3});
}

TEST(ExpertExchangeTest, FourRanksMatchOneProcessBitForBit) {
  expect_layer_matches(TransportKind::kLoopback, {.group_size = 4, .top_k = 4, .tokens_max = 50});
}

TEST(ExpertExchangeTest, EveryTokenMayChooseTheSameRank) {
  expect_layer_matches(TransportKind::kLoopback,
                       {.group_size = 4, .top_k = 2, .skew = Skew::kOneRank});
}

TEST(ExpertExchangeTest, EveryTokenMayChooseTheSameExpertLeavingTheOthersEmpty) {
  expect_layer_matches(TransportKind::kLoopback,
                       {.group_size = 4, .top_k = 2, .skew = Skew::kOneExpert});
}

TEST(ExpertExchangeTest, TokensMayChooseFewerExpertsThanTopKOrNone) {
  expect_layer_matches(TransportKind::kLoopback,
                       {.group_size = 4, .top_k = 3, .skew = Skew::kSomeNone});
}

TEST(ExpertExchangeTest, ExpertsMayHaveOtherSeatsThanTheirNumbers) {
  expect_layer_matches(TransportKind::kLoopback,
                       {.group_size = 4, .top_k = 3, .skew = Skew::kSomeNone, .renumbered = true});
}

TEST(ExpertExchangeTest, RandomShapesAndRoutingsMatchOneProcess) {
  EXPECT_TRUE(rc::check("exchange equals plain computation", [] {
    ExpertProblem problem;
    problem.group_size = *rc::gen::element(1, 2, 3, 4);
    problem.experts_per_rank = *rc::gen::inRange(1, 6);
    problem.top_k = *rc::gen::inRange(1, problem.expert_count() + 1);
    problem.hidden_size = *rc::gen::inRange(1, 40);
    problem.tokens_max = *rc::gen::inRange(1, 60);
    problem.skew =
        *rc::gen::element(Skew::kUniform, Skew::kOneRank, Skew::kOneExpert, Skew::kSomeNone);
    problem.seed = *rc::gen::arbitrary<uint64_t>();
    problem.renumbered = *rc::gen::arbitrary<bool>();
    expect_layer_matches(TransportKind::kLoopback, problem);
    RC_ASSERT(!testing::Test::HasFailure());
  }));
}

TEST(ExpertExchangeTest, RowsAreSentOncePerRankAndSortedBySourceTokenAndExpert) {
  const ExpertProblem problem{.group_size = 4, .experts_per_rank = 3, .top_k = 5, .tokens_max = 40};
  run_ranks(TransportKind::kLoopback, world_of(problem), [&](RankContext& rank) {
    const int32_t self = rank.transport.rank().value;
    const auto exchange = make_exchange(rank.transport, problem);
    ExchangedLayer layer(problem, self, *exchange, 0, {0});
    ASSERT_TRUE(layer.run().ok());
    const DispatchedRows rows = exchange->dispatched(0);
    ASSERT_EQ(rows.source_offset.size(), 5u);
    ASSERT_EQ(rows.source_offset[4], rows.row_count);
    for (int32_t source = 0; source < problem.group_size; ++source) {
      const RankInput input = input_of(problem, source);
      std::set<int32_t> expected_tokens;  // that chose at least one expert of this rank
      for (size_t i = 0; i < input.expert.size(); ++i) {
        if (input.expert[i] / problem.experts_per_rank == self) {
          expected_tokens.insert(static_cast<int32_t>(i) / problem.top_k);
        }
      }
      const auto first = rows.source_token.begin();
      EXPECT_EQ(std::vector<int32_t>(expected_tokens.begin(), expected_tokens.end()),
                std::vector<int32_t>(first + rows.source_offset[source],
                                     first + rows.source_offset[source + 1]));
    }
    ASSERT_EQ(rows.expert_offset.back(), rows.assignment_count);
    std::vector<bool> seen(static_cast<size_t>(rows.assignment_count));
    for (int32_t expert = 0; expert < problem.experts_per_rank; ++expert) {
      for (int32_t at = rows.expert_offset[expert]; at < rows.expert_offset[expert + 1]; ++at) {
        const int32_t assignment = rows.expert_assignment[at];
        const int32_t row = rows.expert_row[at];
        EXPECT_EQ(rows.assignment_expert[assignment], expert);
        EXPECT_GE(assignment, rows.assignment_offset[row]);
        EXPECT_LT(assignment, rows.assignment_offset[row + 1]);
        EXPECT_TRUE(at == rows.expert_offset[expert] || row > rows.expert_row[at - 1]);
        seen[static_cast<size_t>(assignment)] = true;
      }
    }
    EXPECT_EQ(std::count(seen.begin(), seen.end(), true), rows.assignment_count);
  });
}

double dot(std::span<const float> a, std::span<const float> b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

std::vector<float> random_values(uint64_t stream, size_t count) {
  Random random(99, stream);
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(random.normal());
  return values;
}

// <dispatch(x), g> = <x, dispatch_backward(g)> and <combine(y), d> = <y, combine_backward(d)>,
// summed over the ranks: backward is the transpose of forward, whatever the experts do.
TEST(ExpertExchangeTest, BackwardIsTheTransposeOfForward) {
  const ExpertProblem problem{.group_size = 4, .experts_per_rank = 4, .top_k = 6, .tokens_max = 30};
  std::vector<std::array<double, 4>> products(4);
  run_ranks(TransportKind::kLoopback, world_of(problem), [&](RankContext& rank) {
    const auto self = static_cast<uint64_t>(rank.transport.rank().value);
    const RankInput input = input_of(problem, static_cast<int32_t>(self));
    const auto exchange = make_exchange(rank.transport, problem);
    exchange->start_dispatch(0, {8}, input.x, input.expert, input.weight);
    const auto rows = exchange->finish_dispatch(0);
    ASSERT_TRUE(rows.ok());
    const std::vector<float> g = random_values(self, rows->rows.size());
    const std::vector<float> no_weights(static_cast<size_t>(rows->assignment_count));
    std::vector<float> out(input.x.size()), dx(input.x.size()), d_weight(input.weight.size());
    exchange->start_combine(0, g);
    ASSERT_TRUE(exchange->finish_combine(0, out).ok());
    exchange->start_combine_backward(0, input.dy);
    const auto d_rows = exchange->finish_combine_backward(0);
    ASSERT_TRUE(d_rows.ok());
    exchange->start_dispatch_backward(0, g, no_weights);
    ASSERT_TRUE(exchange->finish_dispatch_backward(0, dx, d_weight).ok());
    products[self] = {dot(rows->rows, g), dot(input.x, dx), dot(out, input.dy), dot(g, *d_rows)};
  });
  std::array<double, 4> sum = {};
  for (const auto& product : products) {
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += product[i];
  }
  EXPECT_NE(sum[0], 0.0);
  EXPECT_NEAR(sum[0], sum[1], 1e-4 * std::abs(sum[0]) + 1e-3);
  EXPECT_NEAR(sum[2], sum[3], 1e-4 * std::abs(sum[2]) + 1e-3);
}

TEST(ExpertExchangeTest, StepsOfSeveralSlotsInterleave) {
  const ExpertProblem first{.group_size = 3, .top_k = 4, .seed = 1};
  const ExpertProblem second{.group_size = 3, .top_k = 4, .seed = 2};
  run_ranks(TransportKind::kLoopback, world_of(first), [&](RankContext& rank) {
    const int32_t self = rank.transport.rank().value;
    const auto exchange = make_exchange(rank.transport, first, 2);
    ExchangedLayer a(first, self, *exchange, 0, {0});
    ExchangedLayer b(second, self, *exchange, 1, {4});
    a.start_dispatch();
    b.start_dispatch();
    ASSERT_TRUE(b.experts_forward().ok());
    ASSERT_TRUE(a.experts_forward().ok());
    ASSERT_TRUE(a.finish_forward().ok());
    a.start_backward();
    ASSERT_TRUE(b.finish_forward().ok());
    ASSERT_TRUE(a.experts_backward().ok());
    b.start_backward();
    ASSERT_TRUE(b.experts_backward().ok());
    ASSERT_TRUE(a.finish_backward().ok());
    ASSERT_TRUE(b.finish_backward().ok());
    EXPECT_EQ(a.output(), expected_output(first, self));
    EXPECT_EQ(b.output(), expected_output(second, self));
  });
}

TEST(ExpertExchangeTest, RepeatedStepsGiveTheSameBitsAndAllocateNothing) {
  const ExpertProblem problem{.group_size = 4, .top_k = 4, .tokens_max = 64};
  run_ranks(TransportKind::kLoopback, world_of(problem), [&](RankContext& rank) {
    const int32_t self = rank.transport.rank().value;
    const auto exchange = make_exchange(rank.transport, problem);
    const RankOutput expected = expected_output(problem, self);
    std::vector<std::unique_ptr<ExchangedLayer>> steps;
    for (int i = 0; i < 8; ++i) {
      steps.push_back(std::make_unique<ExchangedLayer>(problem, self, *exchange, 0, Tag{12}));
    }
    const uint64_t allocations_before = allocations_of_this_thread();
    bool all_ran = true;
    for (auto& step : steps) all_ran = step->run().ok() && all_ran;
    EXPECT_EQ(allocations_of_this_thread() - allocations_before, 0u);
    EXPECT_TRUE(all_ran);
    for (auto& step : steps) EXPECT_EQ(step->output(), expected);
  });
}

TEST(ExpertExchangeTest, LocalRowsNeverPassThroughTheTransport) {
  const ExpertProblem problem{.group_size = 2, .experts_per_rank = 2, .top_k = 2, .hidden_size = 4};
  run_ranks(TransportKind::kLoopback, world_of(problem), [&](RankContext& rank) {
    const int32_t self = rank.transport.rank().value;
    const auto exchange = make_exchange(rank.transport, problem);
    // Two tokens; only the second has an expert on the other rank, and both of its experts are
    // there.
    const std::vector<float> x(8, 1.0f), weight(4, 0.5f);
    const std::vector<int32_t> expert = {2 * self, 2 * self + 1, 2 - 2 * self, 3 - 2 * self};
    exchange->start_dispatch(0, {0}, x, expert, weight);
    const auto rows = exchange->finish_dispatch(0);
    ASSERT_TRUE(rows.ok());
    EXPECT_EQ(rows->row_count, 2);
    EXPECT_EQ(rows->assignment_count, 4);
    // One row of 4 values, its token, 2 experts, 2 weights.
    EXPECT_EQ(rank.transport.bytes_sent(), (4 + 1 + 2 + 2) * sizeof(float));
  });
}

TEST(ExpertExchangeTest, MemberThatDiesMakesTheStepFailAndAbortsTheTransport) {
  const ExpertProblem problem{.group_size = 3, .top_k = 3, .tokens_max = 20};
  HarnessOptions options = world_of(problem);
  options.killed = {2};
  run_ranks(TransportKind::kLoopback, options, [&](RankContext& rank) {
    if (rank.transport.rank() == Rank{2}) {
      rank.die();
      return;
    }
    const auto exchange = make_exchange(rank.transport, problem);
    ExchangedLayer layer(problem, rank.transport.rank().value, *exchange, 0, {16});
    const Status status = layer.run();
    EXPECT_EQ(status.code(), Code::kUnavailable) << status.to_string();
    EXPECT_NE(status.message().find("expert dispatch, tag base 0x10"), std::string::npos)
        << status.message();
    const TransferHandle later = rank.transport.send(Rank{2}, {1}, {});
    EXPECT_EQ(rank.transport.wait(later).status().code(), Code::kAborted);
  });
}

// Rank 1 speaks the transport but not the protocol.
void expect_dispatch_refuses(const std::vector<int32_t>& message_words, size_t bytes) {
  const ExpertProblem problem{
      .group_size = 2, .experts_per_rank = 2, .top_k = 2, .hidden_size = 1, .tokens_max = 4};
  run_ranks(TransportKind::kLoopback, world_of(problem), [&](RankContext& rank) {
    if (rank.transport.rank() == Rank{1}) {
      std::vector<std::byte> ignored(4096);
      const TransferHandle receive = rank.transport.receive(Rank{0}, {0}, ignored);
      (void)rank.transport.wait(
          rank.transport.send(Rank{0}, {0}, std::as_bytes(std::span(message_words)).first(bytes)));
      (void)rank.transport.wait(receive);
      return;
    }
    const auto exchange = make_exchange(rank.transport, problem);
    const std::vector<float> x(1), weight(2);
    const std::vector<int32_t> expert = {0, 2};
    exchange->start_dispatch(0, {0}, x, expert, weight);
    const Status status = exchange->finish_dispatch(0).status();
    EXPECT_EQ(status.code(), Code::kDataLoss) << status.to_string();
    EXPECT_NE(status.message().find("rank 1"), std::string::npos) << status.message();
  });
}

TEST(ExpertExchangeTest, DispatchOfBrokenLengthIsRefused) {
  expect_dispatch_refuses(std::vector<int32_t>(6), 23);
}

TEST(ExpertExchangeTest, DispatchOfMoreRowsThanAgreedIsRefused) {
  expect_dispatch_refuses(std::vector<int32_t>(5 * 6), 5 * 6 * 4);
}

TEST(ExpertExchangeTest, DispatchWithAnExpertOutOfRangeIsRefused) {
  expect_dispatch_refuses({0, 0, 2, -1, 0, 0}, 24);
}

TEST(ExpertExchangeTest, DispatchOfARowWithoutAnExpertIsRefused) {
  expect_dispatch_refuses({0, 0, -1, -1, 0, 0}, 24);
}

TEST(ExpertExchangeTest, DispatchWithATokenOutOfRangeIsRefused) {
  expect_dispatch_refuses({0, 4, 0, -1, 0, 0}, 24);
}

TEST(ExpertExchangeTest, DispatchOfOneTokenTwiceIsRefused) {
  expect_dispatch_refuses({0, 0, 1, 0, -1, 0, 0, 1, 0, -1, 0, 0}, 48);
}

TEST(ExpertExchangeTest, SenselessConfigurationsAreRefused) {
  const ExpertExchangeConfig good = ExpertProblem{}.config(0);
  ASSERT_TRUE(ExpertExchange::create(nullptr, good).ok());
  const auto expect_refused = [&](auto change) {
    ExpertExchangeConfig config = good;
    change(config);
    EXPECT_EQ(ExpertExchange::create(nullptr, config).status().code(), Code::kInvalidArgument);
  };
  expect_refused([](ExpertExchangeConfig& c) { c.group.clear(); });
  expect_refused([](ExpertExchangeConfig& c) { c.group_index = 1; });
  expect_refused([](ExpertExchangeConfig& c) { c.experts_per_rank = 0; });
  expect_refused([](ExpertExchangeConfig& c) { c.top_k = 0; });
  expect_refused([](ExpertExchangeConfig& c) { c.hidden_size = 0; });
  expect_refused([](ExpertExchangeConfig& c) {
    c.tokens_max = INT32_MAX;
    c.top_k = 2;
  });
  expect_refused([](ExpertExchangeConfig& c) { c.slot_count = 0; });
  expect_refused([](ExpertExchangeConfig& c) { c.group.push_back(Rank{1}); });  // no transport
}

TEST(ExpertExchangeDeathTest, FinishingWhatWasNotStartedIsAFailedCheck) {
  const auto exchange = ExpertExchange::create(nullptr, ExpertProblem{}.config(0));
  EXPECT_DEATH((void)(*exchange)->finish_dispatch(0), "under_way");
}

}  // namespace
}  // namespace penstock
