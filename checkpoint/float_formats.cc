#include "checkpoint/float_formats.h"

#include <array>
#include <bit>

#include "comm/base/check.h"
#include "comm/base/minifloat.h"

namespace penstock {
namespace {

constexpr std::array<float, 256> kE4m3Values = [] {
  std::array<float, 256> values = {};
  for (uint32_t code = 0; code < values.size(); ++code) values[code] = E4m3::decode(code);
  return values;
}();

// IEEE 754: as Minifloat has it, but the largest exponent means infinity or NaN.
float half_value(uint16_t bits) {
  constexpr uint32_t kExponent = 0x7c00;
  if ((bits & kExponent) != kExponent) return Minifloat<5, 10>::decode(bits);
  return std::bit_cast<float>((bits & 0x8000U) << 16 | 0x7f800000U | (bits & 0x3ffU) << 13);
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
    convert<uint16_t>(from, into, decode_bf16);
  } else if (dtype == DType::kF16) {
    convert<uint16_t>(from, into, half_value);
  } else {
    convert<uint8_t>(from, into, [](uint8_t bits) { return kE4m3Values[bits]; });
  }
}

}  // namespace penstock
