#include "kernels/cpu/gemm.h"

#include <algorithm>
#include <array>

#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gemm.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#ifndef PENSTOCK_KERNELS_CPU_GEMM_CONSTANTS
#define PENSTOCK_KERNELS_CPU_GEMM_CONSTANTS
namespace penstock::cpu {
namespace {

constexpr int64_t kDepthMax = 256;    // k per packed block: a panel of B is 32 KiB with 16 lanes
constexpr int64_t kColumnsMax = 512;  // n per packed block: 512 KiB, half of a common L2
constexpr int64_t kRowsMax = 12;      // of one register tile, on the widest target
constexpr int64_t kVectorsMax = 2;    // columns of one register tile, in vectors
constexpr int64_t kLanesMax = 16;

}  // namespace
}  // namespace penstock::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace penstock::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, kLanesMax>;
using V = hn::Vec<D>;
constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(D()));
constexpr int64_t kPanel = kVectorsMax * kLanes;
// 32 registers hold 12 x 2 accumulators, 16 hold 6 x 2, each beside two of B and one of A.
constexpr int kTileRows = kLanes == 16 ? 12 : 6;

// C[kRows, kVectors * lanes] = (zero or C) + A B over `depth`. A is [depth][a_stride], rows adjacent.
template <int kRows, int kVectors>
void tile(int64_t depth, const float* HWY_RESTRICT a, int64_t a_stride, const float* HWY_RESTRICT b,
          int64_t b_stride, float* HWY_RESTRICT c, int64_t c_stride, bool from_zero) {
  const D d;
  V sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = from_zero ? hn::Zero(d) : hn::LoadU(d, c + r * c_stride + v * kLanes);
    }
  }
  for (int64_t p = 0; p < depth; ++p) {
    V right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = hn::LoadU(d, b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V left = hn::Set(d, a[r]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(left, right[v], sum[r][v]);
    }
    a += a_stride;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[r][v], d, c + r * c_stride + v * kLanes);
  }
}

using TileFunction = void (*)(int64_t, const float*, int64_t, const float*, int64_t, float*,
                              int64_t, bool);

template <int kVectors>
TileFunction tile_of(int64_t rows) {
  static constexpr std::array<TileFunction, 12> kTiles = {
      tile<1, kVectors>, tile<2, kVectors>,  tile<3, kVectors>,  tile<4, kVectors>,
      tile<5, kVectors>, tile<6, kVectors>,  tile<7, kVectors>,  tile<8, kVectors>,
      tile<9, kVectors>, tile<10, kVectors>, tile<11, kVectors>, tile<12, kVectors>};
  return kTiles[static_cast<size_t>(rows - 1)];
}

#if HWY_TARGET != HWY_SCALAR
// to[p * to_stride + i] = factor * from[i * from_stride + p] for i, p < 4.
HWY_INLINE void transpose_four(const float* from, int64_t from_stride, float factor, float* to,
                               int64_t to_stride) {
  const hn::FixedTag<float, 4> d;
  const hn::FixedTag<double, 2> pairs;
  const auto scale = hn::Set(d, factor);
  const auto r0 = hn::LoadU(d, from);
  const auto r1 = hn::LoadU(d, from + from_stride);
  const auto r2 = hn::LoadU(d, from + 2 * from_stride);
  const auto r3 = hn::LoadU(d, from + 3 * from_stride);
  const auto low01 = hn::BitCast(pairs, hn::InterleaveLower(d, r0, r1));
  const auto low23 = hn::BitCast(pairs, hn::InterleaveLower(d, r2, r3));
  const auto high01 = hn::BitCast(pairs, hn::InterleaveUpper(d, r0, r1));
  const auto high23 = hn::BitCast(pairs, hn::InterleaveUpper(d, r2, r3));
  const auto c0 = hn::BitCast(d, hn::InterleaveLower(pairs, low01, low23));
  const auto c1 = hn::BitCast(d, hn::InterleaveUpper(pairs, low01, low23));
  const auto c2 = hn::BitCast(d, hn::InterleaveLower(pairs, high01, high23));
  const auto c3 = hn::BitCast(d, hn::InterleaveUpper(pairs, high01, high23));
  hn::StoreU(hn::Mul(scale, c0), d, to);
  hn::StoreU(hn::Mul(scale, c1), d, to + to_stride);
  hn::StoreU(hn::Mul(scale, c2), d, to + 2 * to_stride);
  hn::StoreU(hn::Mul(scale, c3), d, to + 3 * to_stride);
}
#endif

// to[p * to_stride + i] = factor * from[i * from_stride + p] for i < count, p < depth.
void pack_transposed(int64_t count, int64_t depth, const float* from, int64_t from_stride,
                     float factor, float* to, int64_t to_stride) {
  int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  for (; i + 4 <= count; i += 4) {
    int64_t p = 0;
    for (; p + 4 <= depth; p += 4) {
      transpose_four(from + i * from_stride + p, from_stride, factor, to + p * to_stride + i,
                     to_stride);
    }
    for (; p < depth; ++p) {
      for (int64_t q = i; q < i + 4; ++q) {
        to[p * to_stride + q] = factor * from[q * from_stride + p];
      }
    }
  }
#endif
  for (; i < count; ++i) {
    for (int64_t p = 0; p < depth; ++p) to[p * to_stride + i] = factor * from[i * from_stride + p];
  }
}

// to[p * to_stride + i] = factor * from[p * from_stride + i] for i < count, p < depth.
void pack_straight(int64_t count, int64_t depth, const float* from, int64_t from_stride,
                   float factor, float* to, int64_t to_stride) {
  const D d;
  const V scale = hn::Set(d, factor);
  for (int64_t p = 0; p < depth; ++p) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      hn::StoreU(hn::Mul(scale, hn::LoadU(d, from + p * from_stride + i)), d,
                 to + p * to_stride + i);
    }
    for (; i < count; ++i) to[p * to_stride + i] = factor * from[p * from_stride + i];
  }
}

// Columns [column, column + count) and depths [first, first + depth) of B as panels of kPanel columns,
// each [depth][kPanel], the last filled up with zeros.
void pack_b(const GemmArguments& g, int64_t first, int64_t depth, int64_t column, int64_t count,
            float* packed) {
  for (int64_t j = 0; j < count; j += kPanel) {
    const int64_t width = std::min(kPanel, count - j);
    const float* const from = g.b + first * g.b_depth_stride + (column + j) * g.b_column_stride;
    float* const to = packed + j * depth;
    if (width < kPanel) std::fill(to, to + depth * kPanel, 0.0F);
    if (g.b_column_stride == 1) {
      pack_straight(width, depth, from, g.b_depth_stride, 1.0F, to, kPanel);
    } else {
      pack_transposed(width, depth, from, g.b_column_stride, 1.0F, to, kPanel);
    }
  }
}

// One tile whose columns end inside a vector: computed beside C, then the real columns copied.
void edge_tile(TileFunction function, int64_t rows, int64_t columns, int64_t depth, const float* a,
               int64_t a_stride, const float* b, float* c, int64_t c_stride, bool from_zero) {
  alignas(64) float beside[kRowsMax * kPanel] = {};
  if (!from_zero) {
    for (int64_t r = 0; r < rows; ++r) std::copy_n(c + r * c_stride, columns, beside + r * kPanel);
  }
  function(depth, a, a_stride, b, kPanel, beside, kPanel, from_zero);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(beside + r * kPanel, columns, c + r * c_stride);
}

// One packed block of B against all rows of A.
void multiply_block(const GemmArguments& g, int64_t first, int64_t depth, int64_t column,
                    int64_t count, const float* packed_b, float* packed_a) {
  const bool from_zero = first == 0 && !g.accumulate;
  const bool direct = g.a_row_stride == 1 && g.alpha == 1.0F;
  const int64_t panel_count = (g.m + kTileRows - 1) / kTileRows;
  for (int64_t panel = 0; panel < panel_count; ++panel) {
    // Even shares: 32 rows are 11 + 11 + 10, not 12 + 12 + 8, whose last tile would starve.
    const int64_t row = g.m * panel / panel_count;
    const int64_t rows = g.m * (panel + 1) / panel_count - row;
    const float* a = g.a + row * g.a_row_stride + first * g.a_depth_stride;
    int64_t a_stride = g.a_depth_stride;
    if (!direct) {
      if (g.a_row_stride == 1) {
        pack_straight(rows, depth, a, a_stride, g.alpha, packed_a, kRowsMax);
      } else {
        pack_transposed(rows, depth, a, g.a_row_stride, g.alpha, packed_a, kRowsMax);
      }
      a = packed_a;
      a_stride = kRowsMax;
    }
    const TileFunction wide = tile_of<2>(rows);
    const TileFunction narrow = tile_of<1>(rows);
    for (int64_t j = 0; j < count; j += kPanel) {
      const int64_t columns = std::min(kPanel, count - j);
      float* const c = g.c + row * g.c_stride + column + j;
      const float* const b = packed_b + j * depth;
      const TileFunction function = columns > kLanes ? wide : narrow;
      if (columns % kLanes == 0) {
        function(depth, a, a_stride, b, kPanel, c, g.c_stride, from_zero);
      } else {
        edge_tile(function, rows, columns, depth, a, a_stride, b, c, g.c_stride, from_zero);
      }
    }
  }
}

void gemm(const GemmArguments& g, float* workspace) {
  float* const packed_b = workspace;
  float* const packed_a = workspace + kDepthMax * kColumnsMax;
  for (int64_t column = 0; column < g.n; column += kColumnsMax) {
    const int64_t count = std::min(kColumnsMax, g.n - column);
    for (int64_t first = 0; first < g.k; first += kDepthMax) {
      const int64_t depth = std::min(kDepthMax, g.k - first);
      pack_b(g, first, depth, column, count, packed_b);
      multiply_block(g, first, depth, column, count, packed_b, packed_a);
    }
  }
}

}  // namespace penstock::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace penstock::cpu {

HWY_EXPORT(gemm);

int64_t gemm_workspace_floats() {
  return kDepthMax * kColumnsMax + kDepthMax * kRowsMax;
}

void gemm(const GemmArguments& arguments, float* workspace) {
  if (arguments.k == 0 && !arguments.accumulate) {
    for (int64_t i = 0; i < arguments.m; ++i) {
      std::fill_n(arguments.c + i * arguments.c_stride, arguments.n, 0.0F);
    }
  }
  HWY_DYNAMIC_DISPATCH(gemm)(arguments, workspace);
}

}  // namespace penstock::cpu
#endif  // HWY_ONCE
