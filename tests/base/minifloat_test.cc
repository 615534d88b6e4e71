#include "comm/base/minifloat.h"

#include <gtest/gtest.h>

#include <limits>

namespace penstock {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The value of a code from the definition of the format, in double.
double value_of(uint32_t code, int exponent_bits, int mantissa_bits) {
  const uint32_t mantissa = code & ((1U << mantissa_bits) - 1);
  const uint32_t field = (code >> mantissa_bits) & ((1U << exponent_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double fraction = mantissa / std::ldexp(1.0, mantissa_bits);
  const double magnitude = field == 0 ? std::ldexp(fraction, 1 - bias)
                                      : std::ldexp(1.0 + fraction, static_cast<int>(field) - bias);
  return code >> (exponent_bits + mantissa_bits) & 1 ? -magnitude : magnitude;
}

// Every code of the format decodes to its value and back; every halfway point goes to the even
// neighbour and the floats beside it to the nearer one.
template <typename Format>
void expect_nearest_even(int exponent_bits, int mantissa_bits) {
  for (const uint32_t sign : {0U, Format::kSign}) {
    for (uint32_t code = 0; code <= Format::kLargest; ++code) {
      const uint32_t signed_code = code | sign;
      const float value = Format::decode(signed_code);
      ASSERT_EQ(value, value_of(signed_code, exponent_bits, mantissa_bits)) << signed_code;
      ASSERT_EQ(std::signbit(value), sign != 0) << signed_code;
      ASSERT_EQ(Format::encode(value), signed_code);
      if (code == Format::kLargest) break;
      const double next = value_of((code + 1) | sign, exponent_bits, mantissa_bits);
      const auto halfway = static_cast<float>((static_cast<double>(value) + next) / 2);
      ASSERT_EQ(Format::encode(halfway), (code & 1 ? code + 1 : code) | sign) << halfway;
      const float away = sign ? -kInfinity : kInfinity;
      ASSERT_EQ(Format::encode(std::nextafterf(halfway, 0.0F)), signed_code) << halfway;
      ASSERT_EQ(Format::encode(std::nextafterf(halfway, away)), (code + 1) | sign) << halfway;
    }
  }
}

TEST(MinifloatTest, E4m3RoundsEveryCodeAndEveryHalfwayCaseToNearestEven) {
  EXPECT_EQ(E4m3::largest(), 448.0F);
  EXPECT_EQ(E4m3::decode(0x01), 0x1p-9F);
  EXPECT_EQ(E4m3::decode(0x08), 0x1p-6F);
  expect_nearest_even<E4m3>(4, 3);
}

TEST(MinifloatTest, E5m6RoundsEveryCodeAndEveryHalfwayCaseToNearestEven) {
  EXPECT_EQ(E5m6::largest(), 129024.0F);
  EXPECT_EQ(E5m6::decode(0x001), 0x1p-20F);
  expect_nearest_even<E5m6>(5, 6);
}

TEST(MinifloatTest, BeyondTheLargestValueIsTheLargestValue) {
  for (const float value : {448.1F, 464.0F, 480.0F, 1e30F, kInfinity}) {
    EXPECT_EQ(E4m3::encode(value), 0x7eU) << value;
    EXPECT_EQ(E4m3::encode(-value), 0xfeU) << value;
  }
  EXPECT_EQ(E5m6::round(1e30F), E5m6::largest());
}

TEST(MinifloatTest, NanStaysNanWithItsSign) {
  EXPECT_EQ(E4m3::encode(std::nanf("")), 0x7fU);
  EXPECT_EQ(E4m3::encode(-std::nanf("")), 0xffU);
  EXPECT_TRUE(std::isnan(E4m3::decode(0x7f)));
  EXPECT_TRUE(std::isnan(E4m3::decode(0xff)));
  EXPECT_TRUE(std::isnan(round_to_bf16(std::nanf(""))));
  for (const uint32_t bits : {0x7f800001U, 0x7fffffffU, 0xff800001U}) {
    EXPECT_TRUE(std::isnan(round_to_bf16(std::bit_cast<float>(bits))));
  }
}

TEST(MinifloatTest, ValuesBelowTheSmallestStepRoundToZeroOrIt) {
  EXPECT_EQ(E4m3::encode(1e-30F), 0x00U);
  EXPECT_EQ(E4m3::encode(-1e-30F), 0x80U);
  EXPECT_EQ(E4m3::encode(0x1p-10F), 0x00U);  // halfway, to even
  EXPECT_EQ(E4m3::encode(0x1.8p-10F), 0x01U);
}

TEST(MinifloatTest, Bf16RoundsEveryHalfwayCaseToEvenAndOverflowsToInfinity) {
  for (const uint32_t sign : {0U, 0x8000U}) {
    for (uint32_t code = sign; code < sign + 0x7f7fU; ++code) {
      const auto at = static_cast<uint16_t>(code);
      const float halfway = std::bit_cast<float>((code << 16) | 0x8000U);
      ASSERT_EQ(encode_bf16(decode_bf16(at)), at);
      ASSERT_EQ(encode_bf16(halfway), code & 1 ? code + 1 : code) << code;
      ASSERT_EQ(encode_bf16(std::nextafterf(halfway, sign ? -kInfinity : kInfinity)), code + 1)
          << code;
      ASSERT_EQ(encode_bf16(std::nextafterf(halfway, 0.0F)), code) << code;
    }
  }
  EXPECT_EQ(encode_bf16(kInfinity), 0x7f80);
  EXPECT_EQ(round_to_bf16(std::numeric_limits<float>::max()), kInfinity);
  EXPECT_EQ(round_to_bf16(-1.0F - 0x1p-9F), -1.0F);
}

}  // namespace
}  // namespace penstock
