// A representative part of the parity grid; `ops/bench parity` prints all of it.
#include "tests/worker/engine_parity.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "comm/base/random.h"

namespace penstock {
namespace {

constexpr double kBar = 1e-5;  // relative, fp32

class EngineParityTest : public ::testing::TestWithParam<TinyLayout> {
 protected:
  static void SetUpTestSuite() {
    directory_ = new ScratchDirectory;
    write_tiny_corpus(directory_->path());
    one_rank_ = new ParityRun(run({.sequences_per_step = 128}));
  }
  static void TearDownTestSuite() {
    delete one_rank_;
    delete directory_;
  }
  static ParityRun run(const TinyLayout& layout, const ExpertSeats& seats = {}) {
    Result<ParityRun> run = run_parity(parity_spec(directory_->path(), layout), seats);
    EXPECT_TRUE(run.ok()) << run.status().to_string();
    return run.ok() ? *std::move(run) : ParityRun{};
  }
  static ScratchDirectory* directory_;
  static ParityRun* one_rank_;
};
ScratchDirectory* EngineParityTest::directory_ = nullptr;
ParityRun* EngineParityTest::one_rank_ = nullptr;

// Of layers 1 … last_layer, each with 8 experts.
ExpertSeats any_seats(uint64_t seed, int64_t last_layer = 8) {
  ExpertSeats seats;
  for (int64_t layer = 1; layer <= last_layer; ++layer) {
    Random random(seed, static_cast<uint64_t>(layer));
    std::vector<int32_t>& experts = seats.layers[layer];
    for (int32_t e = 0; e < 8; ++e) {
      experts.push_back(e);
      std::swap(experts.back(), experts[random.below(static_cast<uint64_t>(e) + 1)]);
    }
  }
  return seats;
}

void expect_equal(const ParityRun& run, const ParityRun& wanted) {
  const Result<ParityDifference> difference = compare(run, wanted);
  ASSERT_TRUE(difference.ok()) << difference.status().to_string();
  EXPECT_LE(difference->loss, kBar);
  EXPECT_LE(difference->grad_norm, kBar);
  EXPECT_LE(difference->gradients, kBar) << difference->worst_tensor;
  EXPECT_LE(difference->weights, kBar) << difference->worst_tensor;
}

TEST_P(EngineParityTest, LossesGradientsAndWeightsAreThoseOfOneRank) {
  expect_equal(run(GetParam()), *one_rank_);
}

std::vector<TinyLayout> representatives() {
  std::vector<TinyLayout> layouts;
  for (const TinyLayout& layout : parity_grid()) {
    const auto is = [&](int64_t pipeline, int64_t expert, int64_t data) {
      return layout.pipeline == pipeline && layout.expert == expert && layout.data == data;
    };
    if (is(1, 8, 2) || is(2, 2, 2) || is(2, 4, 1) || is(4, 1, 1)) layouts.push_back(layout);
  }
  return layouts;
}
INSTANTIATE_TEST_SUITE_P(Grid, EngineParityTest, ::testing::ValuesIn(representatives()),
                         [](const auto& layout) {
                           std::string name = to_string(layout.param);
                           for (char& c : name) c = std::isalnum(c) ? c : '_';
                           return name;
                         });

TEST_F(EngineParityTest, SeatsOfExpertsChangeNothingButTheOrderOfSums) {
  for (const int64_t expert : {2, 4}) {
    for (const int64_t pipeline : {1, 2}) {
      for (const Schedule schedule : {Schedule::kOneForwardOneBackward, Schedule::kDualPipe}) {
        if (pipeline == 1 && schedule == Schedule::kDualPipe) continue;
        const TinyLayout layout{pipeline, expert, 1, schedule, 128};
        SCOPED_TRACE(to_string(layout));
        const ParityRun seated = run(layout, any_seats(static_cast<uint64_t>(expert + pipeline)));
        expect_equal(seated, run(layout));
        expect_equal(seated, *one_rank_);
      }
    }
  }
}

TEST_F(EngineParityTest, ExpertsOfMultiTokenPredictionHaveSeatsToo) {
  const auto run_with = [&](const TinyLayout& layout, const ExpertSeats& seats) {
    JobSpec spec = parity_spec(directory_->path(), layout);
    spec.model.num_nextn_predict_layers = 1;
    const Result<ParityRun> run = run_parity(spec, seats);
    EXPECT_TRUE(run.ok()) << run.status().to_string();
    return run.ok() ? *run : ParityRun{};
  };
  const ParityRun one_rank = run_with({.sequences_per_step = 128}, {});
  ASSERT_TRUE(one_rank.loads.contains(9));
  const ParityRun seated = run_with({2, 4, 1, Schedule::kDualPipe, 128}, any_seats(5, 9));
  expect_equal(seated, one_rank);
  EXPECT_TRUE(seated.loads.contains(9));
}

TEST_F(EngineParityTest, SeatsInTheOrderOfExpertsAreBitIdenticalToNone) {
  ExpertSeats in_order;
  for (int64_t layer = 1; layer <= 8; ++layer) in_order.layers[layer] = {0, 1, 2, 3, 4, 5, 6, 7};
  const TinyLayout layout{2, 4, 1, Schedule::kDualPipe, 128};
  EXPECT_EQ(run(layout, in_order).state, run(layout).state);
}

TEST_F(EngineParityTest, SeatsThatAreNotOfTheModelAreRefused) {
  const JobSpec spec = parity_spec(directory_->path(), {1, 2, 1, {}, 128});
  EXPECT_EQ(run_parity(spec, {{{0, {0, 1, 2, 3, 4, 5, 6, 7}}}}).status().code(),
            Code::kInvalidArgument);
  EXPECT_EQ(run_parity(spec, {{{1, {0, 1, 2, 3}}}}).status().code(), Code::kInvalidArgument);
}

TEST_F(EngineParityTest, LoadsOfExpertsAreThoseOfAStepWhateverTheLayoutAndTheSeats) {
  constexpr double kTokens = 128 * 8;  // of a step
  ASSERT_EQ(one_rank_->loads.size(), 8U);
  for (const auto& [layer, loads] : one_rank_->loads) {
    ASSERT_EQ(loads.size(), 8U);
    EXPECT_NEAR(std::accumulate(loads.begin(), loads.end(), 0.0), 2 * kTokens, 1e-6) << layer;
  }
  EXPECT_NEAR(one_rank_->loads.at(2)[0], kTokens, 1e-6);
  EXPECT_NEAR(one_rank_->loads.at(2)[1], kTokens, 1e-6);
  EXPECT_EQ(one_rank_->loads.at(3)[5], 0.0);
  const ParityRun seated = run({2, 2, 2, Schedule::kDualPipe, 128}, any_seats(9));
  ASSERT_EQ(seated.loads.size(), 8U);
  for (const auto& [layer, loads] : one_rank_->loads) {
    for (size_t e = 0; e < loads.size(); ++e) {
      // A score on the verge may fall to the other side.
      EXPECT_NEAR(seated.loads.at(layer)[e], loads[e], 2.0) << layer << " " << e;
    }
  }
}

// The model of the grid is what its header says, or it would prove less than it claims.
TEST_F(EngineParityTest, RoutingIsSkewedStarvedAndPiledOnOneRank) {
  JobSpec spec = parity_spec(directory_->path(), {.sequences_per_step = 128});
  const Result<ParityRun> got = run_parity(spec);
  ASSERT_TRUE(got.ok());
  const auto gradient_is_zero = [&](int layer, int expert) {
    const std::string name =
        fmt::format("model.layers.{}.mlp.experts.{}.up_proj.weight|exp_avg", layer, expert);
    const auto found = got->state.find(name);
    EXPECT_NE(found, got->state.end()) << name;
    if (found == got->state.end()) return false;
    return std::all_of(found->second.begin(), found->second.end(),
                       [](float value) { return value == 0.0F; });
  };
  EXPECT_TRUE(gradient_is_zero(3, 5));
  EXPECT_FALSE(gradient_is_zero(3, 4));
  for (int expert = 0; expert < 8; ++expert) {
    EXPECT_EQ(gradient_is_zero(2, expert), expert >= 2) << expert;
  }
  EXPECT_EQ(got->steps[0].expert_load_max_ratio, 4.0);  // both experts have every token, of eight
}

TEST_F(EngineParityTest, AnotherRunIsFoundToDiffer) {
  JobSpec spec = parity_spec(directory_->path(), {.sequences_per_step = 128});
  spec.training.seed += 1;
  const Result<ParityRun> other = run_parity(spec);
  ASSERT_TRUE(other.ok());
  const Result<ParityDifference> difference = compare(*other, *one_rank_);
  ASSERT_TRUE(difference.ok());
  EXPECT_GT(difference->gradients, 0.1);
  EXPECT_GT(difference->worst(), 0.1);
  ParityRun damaged = *one_rank_;
  damaged.state.begin()->second[0] = NAN;
  EXPECT_TRUE(std::isnan(compare(damaged, *one_rank_)->worst()));
  damaged.state.erase(damaged.state.begin());
  EXPECT_FALSE(compare(damaged, *one_rank_).ok());
}

}  // namespace
}  // namespace penstock
