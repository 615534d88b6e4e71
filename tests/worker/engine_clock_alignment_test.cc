#include "worker/engine/clock_alignment.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/data/rank_harness.h"

namespace penstock {
namespace {

// The clocks are one and the same, so what is measured is the error, which must be within what is
// claimed for it.
void expect_alignment(TransportKind kind) {
  run_ranks(kind, {.world_size = 3}, [](RankContext& context) {
    for (uint64_t tag : {1, 1, 2}) {  // it may be done again
      const Result<ClockOffset> clock = align_clock(context.transport, Tag{tag});
      ASSERT_TRUE(clock.ok()) << clock.status().to_string();
      EXPECT_LE(std::abs(clock->offset_ns), clock->uncertainty_ns);
      EXPECT_LT(clock->uncertainty_ns, 5'000'000'000);
      EXPECT_EQ(clock->uncertainty_ns == 0, context.transport.rank().value == 0);
    }
  });
}

TEST(ClockAlignmentTest, OffsetsAreWithinTheirUncertaintyOnLoopback) {
  expect_alignment(TransportKind::kLoopback);
}
TEST(ClockAlignmentTest, OffsetsAreWithinTheirUncertaintyOnUcx) {
  expect_alignment(TransportKind::kUcx);
}

TEST(ClockAlignmentTest, ADeadRankZeroEndsItAsUnavailable) {
  run_ranks(TransportKind::kLoopback, {.world_size = 2, .killed = {0}}, [](RankContext& context) {
    if (context.transport.rank().value == 0) return context.die();
    EXPECT_EQ(align_clock(context.transport, Tag{1}).status().code(), Code::kUnavailable);
  });
}

}  // namespace
}  // namespace penstock
