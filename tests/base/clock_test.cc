#include "comm/base/clock.h"

#include <gtest/gtest.h>

namespace penstock {
namespace {

TEST(ClockTest, UtcTextIsIso8601WithMilliseconds) {
  EXPECT_EQ(format_utc({0}), "1970-01-01T00:00:00.000Z");
  EXPECT_EQ(format_utc({1'700'000'001'250'000'000}), "2023-11-14T22:13:21.250Z");
}

TEST(ClockTest, InstantsSubtractToDurations) {
  const Instant start{5};
  EXPECT_EQ((start + Duration(10)) - start, Duration(10));
  EXPECT_DOUBLE_EQ(to_seconds(Duration(1'500'000'000)), 1.5);
}

}  // namespace
}  // namespace penstock
