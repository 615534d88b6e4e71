// Where the sm_80 kernel keeps its factors in shared memory, and which part of them a lane reads.
// Plain functions of numbers, for host and device alike.
#pragma once

namespace penstock::cuda {

inline constexpr int kDepth80 = 32;  // what a stage holds of the dimension that is summed over

// One stage of one factor: kExtent rows (columns for B) of C, each with kDepth80 values to sum
// over. It lies as in memory: by lines of 32 values of the depth (kDepthInner), or of kExtent, and
// lines by chunks of 16 bytes. A chunk is kept at the place of its number with bits of the line's
// flipped: eight lanes of ldmatrix read one chunk of eight neighbouring lines, and so never share a
// bank.
template <int kExtent, bool kDepthInner>
struct StageTile {
  static constexpr int kLines = kDepthInner ? kExtent : kDepth80;
  static constexpr int kChunks = (kDepthInner ? kDepth80 : kExtent) / 8;
  static constexpr int kBytes = kLines * kChunks * 16;

  static constexpr int offset(int line, int chunk) {
    const int flip = kDepthInner ? line / 2 % 4 : line % 8;
    return (line * kChunks + (chunk ^ flip)) * 16;
  }

  // Which 16 bytes lane `lane` names in ldmatrix.x4 for the 16 x 16 values from (x, depth), x along
  // the extent. Matrix i = lane / 8 is then x + 8 (i % 2) .. and depth + 8 (i / 2) ..: registers 0
  // to 3 are a0 to a3 of mma.m16n8k16, and as columns 0, 2 and 1, 3 are b0, b1 of two of its
  // neighbours. Where the extent is inner, a matrix is read as it lies and handed out transposed
  // (.trans).
  static constexpr int lane_offset(int x, int depth, int lane) {
    const int matrix = lane / 8;
    const int at_x = x + 8 * (matrix % 2);
    const int at_depth = depth + 8 * (matrix / 2);
    return kDepthInner ? offset(at_x + lane % 8, at_depth / 8)
                       : offset(at_depth + lane % 8, at_x / 8);
  }

  // No two chunks share a place, and no eight lanes of one matrix a bank.
  static constexpr bool sound() {
    bool taken[kLines * kChunks] = {};
    for (int line = 0; line < kLines; ++line) {
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        bool& place = taken[offset(line, chunk) / 16];
        if (place) return false;
        place = true;
      }
    }
    for (int x = 0; x < kExtent; x += 16) {
      for (int matrix = 0; matrix < 8; ++matrix) {  // of both halves of the depth
        unsigned banks = 0;
        for (int lane = 0; lane < 8; ++lane) {
          const int place = lane_offset(x, matrix / 4 * 16, matrix % 4 * 8 + lane);
          banks |= 1U << (place / 16 % 8);
        }
        if (banks != 0xff) return false;
      }
    }
    return true;
  }
};
static_assert(StageTile<128, true>::sound() && StageTile<128, false>::sound());
static_assert(StageTile<256, true>::sound() && StageTile<256, false>::sound());

}  // namespace penstock::cuda
