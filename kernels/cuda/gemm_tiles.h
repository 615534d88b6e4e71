// What the kernels of grouped_gemm.h are given, and which tile of C comes when. Plain functions of
// numbers, for host and device alike.
#pragma once

#include <cstdint>

#include "kernels/cuda/stream.h"
#include "kernels/cuda/view.h"

namespace penstock::cuda {

enum class GemmForm : uint8_t {
  kForward,         // C_g[rows, n] = A_g[rows, k] B_g[n, k]^T
  kInputGradient,   // C_g[rows, n] = A_g[rows, k] B_g[k, n]
  kWeightGradient,  // C_g[m, n] += A_g[rows, m]^T B_g[rows, n]
};

// Sums run over what lies together in memory ("depth inner"), or over its lines.
constexpr bool a_depth_inner(GemmForm form) {
  return form != GemmForm::kWeightGradient;
}
constexpr bool b_depth_inner(GemmForm form) {
  return form == GemmForm::kForward;
}

struct GemmProblem {
  int group_count = 0;
  const int64_t* offsets = nullptr;  // null: one group of rows_most
  int64_t rows_most = 0;
  int64_t m = 0;  // of kWeightGradient alone
  int64_t n = 0;
  int64_t k = 0;  // of the others
  View<const Bf16> a = {};
  View<const Bf16> b = {};
  int64_t b_group_stride = 0;
  void* c = nullptr;  // bf16; float for kWeightGradient
  int64_t c_stride = 0;
  int64_t c_group_stride = 0;
  bool accumulate = false;
};

inline constexpr int kTileRows = 128;
inline constexpr int kTileColumns = 256;
// Tiles are taken down the rows, then to the next columns, within a band of so many rows: what is
// in flight is then about as high as wide, and needs the least of A and B.
inline constexpr int kBandRows = 2048;

constexpr int64_t tiles_of(int64_t extent, int64_t tile) {
  return (extent + tile - 1) / tile;
}

struct TileAt {
  int row = 0;
  int column = 0;
};
// Tile `index` of a matrix of `rows` by `columns` tiles, in bands of `band` rows of tiles.
constexpr TileAt banded_tile(int index, int rows, int columns, int band) {
  const int bands = index / (band * columns);
  const int within = index - bands * band * columns;
  const int left = rows - bands * band;
  const int height = left < band ? left : band;
  return {bands * band + within % height, within / height};
}

constexpr bool bands_cover(int rows, int columns) {
  bool seen[32][8] = {};
  for (int i = 0; i < rows * columns; ++i) {
    const TileAt tile = banded_tile(i, rows, columns, 8);
    if (tile.row >= rows || tile.column >= columns || seen[tile.row][tile.column]) return false;
    seen[tile.row][tile.column] = true;
  }
  return true;
}
static_assert(bands_cover(1, 1) && bands_cover(8, 3) && bands_cover(9, 8) && bands_cover(31, 5));

struct GemmTile {
  int group = 0;
  int first = 0;  // the group's rows are [first, last)
  int last = 0;
  int row = 0;  // where the tile begins in C_g: counted from `first`, for weights from 0
  int column = 0;
};

// Finds the tiles that a block is to compute, or kPair blocks together, one below the other; `row`
// is then that of the first. All threads that work on a tile walk alike.
template <GemmForm kForm, int kPair = 1>
class TileWalk {
 public:
  constexpr explicit TileWalk(const GemmProblem& problem)
      : problem_(problem), columns_(static_cast<int>(tiles_of(problem.n, kTileColumns))) {}

  // Tile `index` of the whole product; false: it has fewer, and the walk is over. REQUIRES: `index`
  // does not fall from one call to the next.
  constexpr bool find(int index, GemmTile& tile) {
    while (index >= end_) {
      if (++group_ >= problem_.group_count) return false;
      begin_ = end_;
      const bool counted = problem_.offsets != nullptr;
      first_ = static_cast<int>(counted ? problem_.offsets[group_] : 0);
      last_ = static_cast<int>(counted ? problem_.offsets[group_ + 1] : problem_.rows_most);
      rows_ = static_cast<int>(
          tiles_of(kForm == GemmForm::kWeightGradient ? problem_.m : last_ - first_, kHeight));
      if (last_ > first_) end_ += rows_ * columns_;
    }
    const TileAt at = banded_tile(index - begin_, rows_, columns_, kBandRows / kHeight);
    tile = {group_, first_, last_, at.row * kHeight, at.column * kTileColumns};
    return true;
  }

 private:
  static constexpr int kHeight = kPair * kTileRows;

  const GemmProblem& problem_;
  int columns_;   // tiles across
  int rows_ = 0;  // and down the group that the walk is in, whose tiles are [begin_, end_)
  int group_ = -1;
  int begin_ = 0;
  int end_ = 0;
  int first_ = 0;
  int last_ = 0;
};

// How many values a sum of the tile is over.
template <GemmForm kForm>
constexpr int64_t depth_of(const GemmProblem& problem, const GemmTile& tile) {
  return kForm == GemmForm::kWeightGradient ? tile.last - tile.first : problem.k;
}

// Blocks that there can be work for, a multiple of `pair`. REQUIRES: pair <= multiprocessors.
constexpr int64_t blocks_for(GemmForm form, const GemmProblem& problem, int64_t multiprocessors,
                             int pair = 1) {
  const int64_t rows = form == GemmForm::kWeightGradient
                           ? tiles_of(problem.m, pair * kTileRows) * problem.group_count
                           : problem.rows_most / (pair * kTileRows) + problem.group_count;
  const int64_t tiles = rows * tiles_of(problem.n, kTileColumns);
  const int64_t at_once = multiprocessors / pair;
  return pair * (tiles < at_once ? tiles : at_once);
}

void launch_gemm_sm80(Stream& stream, GemmForm form, const GemmProblem& problem);
// REQUIRES: a device of compute capability 9.0. False: nothing was launched, because the driver
// knows no tensor maps or refuses these.
bool launch_gemm_sm90(Stream& stream, GemmForm form, const GemmProblem& problem);

}  // namespace penstock::cuda
