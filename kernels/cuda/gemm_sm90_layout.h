// Where the Hopper kernel keeps its factors in shared memory, and how its tensor cores are told.
// Plain functions of numbers, for host and device alike.
#pragma once

#include <cstdint>

namespace penstock::cuda {

// The copy engine writes boxes of lines of 128 bytes, 64 values, and flips bits 4 to 6 of where it
// writes with bits 7 to 9 ("128-byte swizzle"); wgmma reads it back so. Boxes begin at multiples of
// 1024 bytes. A stage holds kDepth90 of the dimension that is summed over.
inline constexpr int kDepth90 = 64;
inline constexpr int kLineBytes90 = 128;
inline constexpr int kGroupBytes90 = 8 * kLineBytes90;         // lines after which the flips repeat
inline constexpr int kBlockBytes90 = kDepth90 * kLineBytes90;  // 64 lines

constexpr uint32_t swizzle_128(uint32_t offset) {
  return offset ^ ((offset >> 7 & 7) << 4);
}

// A factor's extent (rows of A, columns of B) is x, its depth k.
// - Depth inner: line x has the stage's 64 values of depth.
// - Extent inner: a box for every 64 of the extent, whose line k has them; boxes follow each other.
constexpr uint32_t factor_offset_90(bool depth_inner, int x, int k) {
  return depth_inner ? swizzle_128(static_cast<uint32_t>(x * kLineBytes90 + k * 2))
                     : static_cast<uint32_t>(x / 64 * kBlockBytes90) +
                           swizzle_128(static_cast<uint32_t>(k * kLineBytes90 + x % 64 * 2));
}

// The matrix descriptor of wgmma (PTX ISA, "Matrix descriptor format"), in units of 16 bytes: bits
// 0-13 the address, 16-29 the leading and 32-45 the stride byte offset; 62-63 = 1 for this swizzle.
// - Depth inner (K-major): the stride offset leads from 8 lines of the extent to the next 8. 16
//   values of depth lie within the 128 bytes, so the leading offset is not used.
// - Extent inner (MN-major): the stride offset leads from 8 lines of depth to the next 8, the
//   leading one from 64 of the extent to the next 64.
constexpr uint64_t matrix_descriptor(uint32_t address, bool depth_inner) {
  const uint64_t leading = depth_inner ? 16 : kBlockBytes90;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | leading >> 4 << 16 |
         static_cast<uint64_t>(kGroupBytes90 >> 4) << 32 | uint64_t{1} << 62;
}
// From the descriptor of 16 values of depth to that of the next 16: 32 bytes of each line, or 16
// lines. The bits that are flipped come of the address with all offsets added, so the pattern still
// begins where the stage does, and the descriptor's "base offset" stays 0.
constexpr uint64_t descriptor_step(bool depth_inner) {
  return static_cast<uint64_t>((depth_inner ? 32 : 16 * kLineBytes90) >> 4);
}

// Where wgmma looks for a value, by the canonical layouts of the PTX ISA: lines of 128 bytes in
// groups of eight, which the offsets lead on from.
constexpr uint32_t described_offset(bool depth_inner, int x, int k) {
  const uint64_t d = matrix_descriptor(0, depth_inner) +
                     static_cast<uint64_t>(k / 16) * descriptor_step(depth_inner);
  const auto field = [d](int bit) { return static_cast<int>((d >> bit & 0x3fff) << 4); };
  const int at = k % 16;
  const int group = depth_inner ? x / 8 * field(32) : x / 64 * field(16) + at / 8 * field(32);
  const int within =
      depth_inner ? x % 8 * kLineBytes90 + at * 2 : at % 8 * kLineBytes90 + x % 64 * 2;
  return swizzle_128(static_cast<uint32_t>(field(0) + group + within));
}

// The tensor cores find every value where the copy engine put it.
constexpr bool descriptors_fit(bool depth_inner) {
  for (int x = 0; x < 256; x += 3) {
    for (int k = 0; k < kDepth90; ++k) {
      if (described_offset(depth_inner, x, k) != factor_offset_90(depth_inner, x, k)) return false;
    }
  }
  return true;
}
static_assert(descriptors_fit(true) && descriptors_fit(false));

}  // namespace penstock::cuda
