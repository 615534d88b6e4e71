#include "comm/base/random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace penstock {
namespace {

// Known answers of Philox4x32-10 for all-zero and all-one input, as published with the generator
// (Random123).
TEST(RandomTest, PhiloxMatchesThePublishedVectors) {
  const auto zeros = philox(0, 0, 0);
  EXPECT_EQ(zeros, (std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const auto ones = philox(UINT64_MAX, UINT64_MAX, UINT64_MAX);
  EXPECT_EQ(ones, (std::array<uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

TEST(RandomTest, EqualStateGivesEqualDrawsAndStreamsDiffer) {
  Random a(1, 2), b(1, 2), other_stream(1, 3), other_seed(2, 2);
  for (int i = 0; i < 100; ++i) {
    const uint64_t draw = a.next();
    EXPECT_EQ(draw, b.next());
    EXPECT_NE(draw, other_stream.next());
    EXPECT_NE(draw, other_seed.next());
  }
}

TEST(RandomTest, BelowCoversItsRangeEvenly) {
  Random random(7, 0);
  std::vector<int> counts(6);
  for (int i = 0; i < 60'000; ++i) ++counts[random.below(6)];
  for (const int count : counts) EXPECT_NEAR(count, 10'000, 500);  // over five standard deviations
}

TEST(RandomTest, NormalHasMeanZeroAndVarianceOne) {
  Random random(7, 1);
  double sum = 0.0, square_sum = 0.0;
  constexpr int kDraws = 100'000;
  for (int i = 0; i < kDraws; ++i) {
    const double draw = random.normal();
    ASSERT_TRUE(std::isfinite(draw));
    sum += draw;
    square_sum += draw * draw;
  }
  EXPECT_NEAR(sum / kDraws, 0.0, 0.02);
  EXPECT_NEAR(square_sum / kDraws, 1.0, 0.03);
}

}  // namespace
}  // namespace penstock
