// Number formats narrower than fp32: E4M3 (FP8 operands and published weights), E5M6 (the cached
// input of o_proj) and bf16. The scalar definition that every backend is tested against and that
// model files are read and written with.
//
// E4M3 is the "fn" variant of Micikevicius et al. 2022, "FP8 Formats for Deep Learning": bias 7,
// largest value 448, no infinities, one NaN per sign (0x7f, 0xff), subnormals in steps of 2^-9.
// DeepSeek-V3's report names E5M6 and gives no encoding; here it follows the same rules: bias 15,
// largest value 129024, no infinities, NaN with all bits set, subnormals in steps of 2^-20.
//
// Encoding rounds to the nearest, ties to even, and saturates: beyond the largest value, infinity
// included, it gives the largest value (as PTX cvt.rn.satfinite does). NaN stays NaN.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace penstock {

// A sign bit, kExponentBits and kMantissaBits, in the low bits of the code.
template <int kExponentBits, int kMantissaBits>
struct Minifloat {
  static constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  static constexpr int kMinExponent = 1 - kBias;                         // of normal values
  static constexpr int kMaxExponent = (1 << kExponentBits) - 1 - kBias;  // the NaN's, too
  static constexpr uint32_t kSign = 1U << (kExponentBits + kMantissaBits);
  static constexpr uint32_t kNan = kSign - 1;
  static constexpr uint32_t kLargest = kNan - 1;

  static constexpr float decode(uint32_t code) {
    const uint32_t magnitude = code & kNan;
    const uint32_t sign = code & kSign ? 0x80000000U : 0U;
    if (magnitude == kNan) return std::bit_cast<float>(0x7fc00000U | sign);
    const uint32_t field = magnitude >> kMantissaBits;
    const auto mantissa = static_cast<float>(magnitude & ((1U << kMantissaBits) - 1));
    const int exponent = field == 0 ? kMinExponent : static_cast<int>(field) - kBias;
    const float whole = mantissa + (field == 0 ? 0.0F : static_cast<float>(1 << kMantissaBits));
    const float value = whole * power_of_two(exponent - kMantissaBits);
    return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
  }

  static constexpr uint32_t encode(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t sign = bits >> 31 ? kSign : 0U;
    const uint32_t magnitude = bits & 0x7fffffffU;
    if (magnitude > 0x7f800000U) return sign | kNan;
    if (magnitude >= std::bit_cast<uint32_t>(largest())) return sign | kLargest;
    const int exponent = static_cast<int>(magnitude >> 23) - 127;
    if (exponent >= kMinExponent) {
      // Half of what is dropped, less one bit when the kept part is even, carries into it.
      constexpr int kDropped = 23 - kMantissaBits;
      const uint32_t odd = (magnitude >> kDropped) & 1U;
      const uint32_t rounded = magnitude + (1U << (kDropped - 1)) - 1U + odd;
      return sign | ((rounded >> kDropped) - (static_cast<uint32_t>(127 - kBias) << kMantissaBits));
    }
    // Subnormal: whole steps of the smallest value. nearbyint rounds to even in the default mode; a
    // carry out of the mantissa is the smallest normal code.
    const float steps =
        std::bit_cast<float>(magnitude) * power_of_two(kMantissaBits - kMinExponent);
    return sign | static_cast<uint32_t>(std::nearbyintf(steps));
  }

  static constexpr float largest() { return decode(kLargest); }
  static constexpr float round(float value) { return decode(encode(value)); }

 private:
  static constexpr float power_of_two(int exponent) {
    return std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23);
  }
};

using E4m3 = Minifloat<4, 3>;
using E5m6 = Minifloat<5, 6>;

// bf16 is fp32's upper half; infinity is kept and overflow rounds to it.
constexpr uint16_t encode_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>((bits >> 16) | 0x40U);
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}
constexpr float decode_bf16(uint16_t code) {
  return std::bit_cast<float>(static_cast<uint32_t>(code) << 16);
}
constexpr float round_to_bf16(float value) {
  return decode_bf16(encode_bf16(value));
}

}  // namespace penstock
