// The element types models travel in, against values worked out by hand and against each other.
#include "checkpoint/float_formats.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

namespace penstock {
namespace {

template <typename Word>
float value_of(DType dtype, Word bits) {
  float value = 0.0F;
  to_floats(dtype, std::as_bytes(std::span(&bits, 1)), {&value, 1});
  return value;
}

TEST(FloatFormatsTest, E4m3HasItsPublishedValues) {
  const auto e4m3 = [](uint8_t bits) { return value_of(DType::kF8E4m3, bits); };
  EXPECT_EQ(e4m3(0x00), 0.0F);
  EXPECT_EQ(e4m3(0x01), 0x1p-9F);  // least subnormal
  EXPECT_EQ(e4m3(0x07), 7 * 0x1p-9F);
  EXPECT_EQ(e4m3(0x08), 0x1p-6F);  // least normal
  EXPECT_EQ(e4m3(0x38), 1.0F);
  EXPECT_EQ(e4m3(0x3c), 1.5F);
  EXPECT_EQ(e4m3(0x7e), 448.0F);  // the largest: no infinities
  EXPECT_EQ(e4m3(0xfe), -448.0F);
  EXPECT_TRUE(std::signbit(e4m3(0x80)));
  EXPECT_TRUE(std::isnan(e4m3(0x7f)));
  EXPECT_TRUE(std::isnan(e4m3(0xff)));
}

TEST(FloatFormatsTest, F16HasItsPublishedValues) {
  const auto f16 = [](uint16_t bits) { return value_of(DType::kF16, bits); };
  EXPECT_EQ(f16(0x3c00), 1.0F);
  EXPECT_EQ(f16(0xc000), -2.0F);
  EXPECT_EQ(f16(0x7bff), 65504.0F);
  EXPECT_EQ(f16(0x0001), 0x1p-24F);
  EXPECT_EQ(f16(0x3555), 0x1.554p-2F);
  EXPECT_EQ(f16(0x7c00), std::numeric_limits<float>::infinity());
  EXPECT_EQ(f16(0xfc00), -std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(f16(0x7e00)));
}

TEST(FloatFormatsTest, Bf16IsTheUpperHalfOfF32) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const float value = value_of(DType::kBf16, static_cast<uint16_t>(bits));
    ASSERT_EQ(std::bit_cast<uint32_t>(value), bits << 16);
  }
}

TEST(FloatFormatsTest, OnlyRealNumbersConvert) {
  EXPECT_TRUE(converts_to_float(DType::kF32));
  EXPECT_FALSE(converts_to_float(DType::kI64));
  EXPECT_FALSE(converts_to_float(DType::kF8E5m2));
  EXPECT_FALSE(converts_to_float(DType::kBool));
}

}  // namespace
}  // namespace penstock
