// The scale of a tile whose largest magnitude is `magnitude` (RowFormat in kernels.h), as every
// backend must give it. NaN stays NaN.
#pragma once

#include <bit>
#include <cstdint>

namespace penstock {

constexpr float kTileMagnitudeMin = 1e-4F;
constexpr float tile_scale(float magnitude, float largest_code, bool power_of_two) {
  const float scale =
      (magnitude <= kTileMagnitudeMin ? kTileMagnitudeMin : magnitude) / largest_code;
  const uint32_t bits = std::bit_cast<uint32_t>(scale);
  if (!power_of_two || bits > 0x7f800000U) return scale;
  return std::bit_cast<float>((bits + 0x7fffffU) & 0x7f800000U);  // any mantissa carries
}

}  // namespace penstock
