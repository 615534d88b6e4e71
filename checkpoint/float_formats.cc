#include "checkpoint/float_formats.h"

#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "comm/base/check.h"

namespace penstock {
namespace {

// Sign, exponent and fraction bits of a small format, as the value they stand for. `special`: the
// largest exponent means infinity or NaN.
float decode(uint32_t bits, int exponent_bits, int fraction_bits, bool special) {
  const uint32_t fraction = bits & ((1U << fraction_bits) - 1);
  const int exponent = static_cast<int>(bits >> fraction_bits & ((1U << exponent_bits) - 1));
  const bool negative = (bits >> (exponent_bits + fraction_bits) & 1) != 0;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  float value = 0.0F;
  if (special && exponent == (1 << exponent_bits) - 1) {
    value = fraction == 0 ? std::numeric_limits<float>::infinity()
                          : std::numeric_limits<float>::quiet_NaN();
  } else {
    const uint32_t significand = exponent == 0 ? fraction : fraction | 1U << fraction_bits;
    value = std::ldexp(static_cast<float>(significand),
                       (exponent == 0 ? 1 : exponent) - bias - fraction_bits);
  }
  return negative ? -value : value;
}

const std::array<float, 256>& e4m3_values() {
  static const std::array<float, 256> values = [] {
    std::array<float, 256> table = {};
    for (uint32_t bits = 0; bits < table.size(); ++bits) {
      table[bits] = (bits & 0x7f) == 0x7f ? std::numeric_limits<float>::quiet_NaN()
                                          : decode(bits, 4, 3, false);
    }
    return table;
  }();
  return values;
}

template <typename Word, typename Convert>
void convert(Bytes from, std::span<float> into, const Convert& value_of) {
  PENSTOCK_CHECK(from.size() == into.size() * sizeof(Word), from.size(), into.size());
  for (size_t i = 0; i < into.size(); ++i) {
    Word word;
    std::memcpy(&word, from.data() + i * sizeof(Word), sizeof(Word));
    into[i] = value_of(word);
  }
}

}  // namespace

bool converts_to_float(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBf16 || dtype == DType::kF16 ||
         dtype == DType::kF8E4m3;
}

void to_floats(DType dtype, Bytes from, std::span<float> into) {
  PENSTOCK_CHECK(converts_to_float(dtype), dtype_name(dtype));
  if (dtype == DType::kF32) {
    convert<float>(from, into, [](float value) { return value; });
  } else if (dtype == DType::kBf16) {
    convert<uint16_t>(from, into,
                      [](uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); });
  } else if (dtype == DType::kF16) {
    convert<uint16_t>(from, into, [](uint16_t bits) { return decode(bits, 5, 10, true); });
  } else {
    const std::array<float, 256>& values = e4m3_values();
    convert<uint8_t>(from, into, [&](uint8_t bits) { return values[bits]; });
  }
}

uint16_t bf16_of(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  // Rounding could carry a NaN's fraction away, or into infinity.
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace penstock
