#include "kernels/cpu/gemm.h"

#include <algorithm>
#include <array>
#include <utility>

#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gemm.cc"
#include <hwy/cache_control.h>
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
constexpr int64_t kRowPanelsMax = 8;  // row panels packed at once: 128 KiB, in the second cache
// Up to this many row panels read a panel of B where it lies; more repay the packing, unless its
// rows are so near each other that prefetching keeps up.
constexpr int64_t kReadersInPlaceMax = 4;
constexpr int64_t kNearStride = 128;    // floats
constexpr int64_t kLine = 16;           // floats fetched together
constexpr int64_t kCachePeriod = 1024;  // floats after which the first cache's sets repeat

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
// 32 registers hold 12 x 2 accumulators, 16 hold 6 x 2, each beside two of B and one of A. Narrower
// targets: as many as a packed panel of A has room for.
constexpr int64_t kTileRows = kLanes == 16 ? 12 : std::min<int64_t>(6, kLanes);

// How a tile reads A, whose element (r, p) is at a[r + p * a_stride] or at a[r * a_stride + p].
enum class Layout : uint8_t { kRowsAdjacent, kDepthsAdjacent };

// C[kRows, kVectors * lanes] = (zero or C) + A B over `depth`.
template <Layout kLayout, int kRows, int kVectors>
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
  if (from_zero) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) hwy::Prefetch(c + r * c_stride + v * kLanes);
    }
  }
  // Rows of A that share a pointer: as many as an address can reach with one stride in a register.
  constexpr int kRowsPerBase = kLayout == Layout::kRowsAdjacent ? kRows : 3;
  constexpr int kBases = (kRows + kRowsPerBase - 1) / kRowsPerBase;
  const int64_t row_stride = kLayout == Layout::kRowsAdjacent ? 1 : a_stride;
  const int64_t depth_stride = kLayout == Layout::kRowsAdjacent ? a_stride : 1;
  const float* bases[kBases];
  for (int i = 0; i < kBases; ++i) bases[i] = a + i * kRowsPerBase * row_stride;
  for (int64_t p = 0; p < depth; ++p) {
    V right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = hn::LoadU(d, b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V left = hn::Set(d, bases[r / kRowsPerBase][(r % kRowsPerBase) * row_stride]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(left, right[v], sum[r][v]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kBases; ++i) bases[i] += depth_stride;
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

template <Layout kLayout, int kVectors, int... kRows>
constexpr auto tiles(std::integer_sequence<int, kRows...>) {
  return std::array<TileFunction, sizeof...(kRows)>{tile<kLayout, kRows + 1, kVectors>...};
}
template <Layout kLayout, int kVectors>
constexpr auto kTiles = tiles<kLayout, kVectors>(std::make_integer_sequence<int, kTileRows>());

TileFunction tile_of(Layout layout, int64_t rows, int64_t columns) {
  const auto index = static_cast<size_t>(rows - 1);
  if (layout == Layout::kRowsAdjacent) {
    return columns > kLanes ? kTiles<Layout::kRowsAdjacent, 2>[index]
                            : kTiles<Layout::kRowsAdjacent, 1>[index];
  }
  return columns > kLanes ? kTiles<Layout::kDepthsAdjacent, 2>[index]
                          : kTiles<Layout::kDepthsAdjacent, 1>[index];
}

#if HWY_TARGET != HWY_SCALAR
// The four floats at from[row(0)], from[row(4)], … side by side in one vector.
template <class Row>
HWY_INLINE V load_blocks(const Row& row, int64_t first) {
  const hn::FixedTag<float, 4> block;
#if HWY_MAX_BYTES == 64
  const hn::FixedTag<float, 8> half;
  const auto low =
      hn::Combine(half, hn::LoadU(block, row(first + 4)), hn::LoadU(block, row(first)));
  const auto high =
      hn::Combine(half, hn::LoadU(block, row(first + 12)), hn::LoadU(block, row(first + 8)));
  return hn::Combine(D(), high, low);
#elif HWY_MAX_BYTES == 32
  return hn::Combine(D(), hn::LoadU(block, row(first + 4)), hn::LoadU(block, row(first)));
#else
  return hn::LoadU(block, row(first));
#endif
}

// to[p * to_stride + i] = factor * row(i)[p] for i < kLanes, p < 4: 4 x 4 transposes in every block
// at once.
template <class Row>
HWY_INLINE void transpose_four(const Row& row, V factor, float* to, int64_t to_stride) {
  const D d;
  const hn::Repartition<double, D> pairs;
  const V r0 = load_blocks(row, 0);
  const V r1 = load_blocks(row, 1);
  const V r2 = load_blocks(row, 2);
  const V r3 = load_blocks(row, 3);
  const auto low01 = hn::BitCast(pairs, hn::InterleaveLower(d, r0, r1));
  const auto low23 = hn::BitCast(pairs, hn::InterleaveLower(d, r2, r3));
  const auto high01 = hn::BitCast(pairs, hn::InterleaveUpper(d, r0, r1));
  const auto high23 = hn::BitCast(pairs, hn::InterleaveUpper(d, r2, r3));
  const V c0 = hn::BitCast(d, hn::InterleaveLower(pairs, low01, low23));
  const V c1 = hn::BitCast(d, hn::InterleaveUpper(pairs, low01, low23));
  const V c2 = hn::BitCast(d, hn::InterleaveLower(pairs, high01, high23));
  const V c3 = hn::BitCast(d, hn::InterleaveUpper(pairs, high01, high23));
  hn::StoreU(hn::Mul(factor, c0), d, to);
  hn::StoreU(hn::Mul(factor, c1), d, to + to_stride);
  hn::StoreU(hn::Mul(factor, c2), d, to + 2 * to_stride);
  hn::StoreU(hn::Mul(factor, c3), d, to + 3 * to_stride);
}
#endif

// to[p * to_stride + i] = factor * from[i * from_stride + p] for i < count <= kLanes, p < depth.
// The other lanes get copies of the last row: their products are never stored.
void pack_transposed(int64_t count, int64_t depth, const float* from, int64_t from_stride,
                     float factor, float* to, int64_t to_stride) {
  int64_t p = 0;
#if HWY_TARGET != HWY_SCALAR
  for (; p + 4 <= depth; p += 4) {
    if (p % kLine == 0) {  // the rows that are likely next: weights come from far away
      for (int64_t i = 0; i < count; ++i) hwy::Prefetch(from + (i + count) * from_stride + p);
    }
    const auto row = [&](int64_t i)
                         HWY_ATTR { return from + std::min(i, count - 1) * from_stride + p; };
    transpose_four(row, hn::Set(D(), factor), to + p * to_stride, to_stride);
  }
#endif
  for (; p < depth; ++p) {
    for (int64_t i = 0; i < count; ++i) to[p * to_stride + i] = factor * from[i * from_stride + p];
  }
}

// to[p * to_stride + i] = factor * from[p * from_stride + i] for i < count <= kLanes, p < depth.
void pack_straight(int64_t count, int64_t depth, const float* from, int64_t from_stride,
                   float factor, float* to, int64_t to_stride) {
  const D d;
  const V scale = hn::Set(d, factor);
  const auto real = hn::FirstN(d, static_cast<size_t>(count));
  for (int64_t p = 0; p < depth; ++p) {
    const float* const row = from + p * from_stride;
    // Masked, because the row may be the last of its mapping.
    const V v = count == kLanes ? hn::LoadU(d, row) : hn::MaskedLoad(real, d, row);
    hn::StoreU(hn::Mul(scale, v), d, to + p * to_stride);
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

// Rows [begin, end) of C: one register tile high.
struct RowPanel {
  int64_t begin;
  int64_t end;
};

// Even shares: 32 rows are 11 + 11 + 10, not 12 + 12 + 8, whose last tile would starve.
RowPanel row_panel(const GemmArguments& g, int64_t panel, int64_t panel_count) {
  return {g.m * panel / panel_count, g.m * (panel + 1) / panel_count};
}

// One operand's panel as the tile reads it.
struct Panel {
  const float* data;
  int64_t stride;                         // between depths; of A also between rows
  Layout layout = Layout::kRowsAdjacent;  // of A
};

// Whether the rows of A are so far apart that those of one tile would drive each other out of the
// first cache: at these strides they fall into one or two of its sets.
bool rows_collide(int64_t row_stride) {
  return row_stride % (kCachePeriod / 2) == 0;
}

// Depths [first, first + depth) of one row panel of A, where it lies unless it must be scaled or
// its rows collide: measured faster even when it is read many times.
Panel panel_of_a(const GemmArguments& g, RowPanel rows, int64_t first, int64_t depth,
                 float* packed) {
  const float* const from = g.a + rows.begin * g.a_row_stride + first * g.a_depth_stride;
  const int64_t count = rows.end - rows.begin;
  const bool adjacent = g.a_row_stride == 1;
  if (g.alpha == 1.0F) {
    if (adjacent) return {from, g.a_depth_stride};
    if (!rows_collide(g.a_row_stride)) return {from, g.a_row_stride, Layout::kDepthsAdjacent};
  }
  if (adjacent) {
    pack_straight(count, depth, from, g.a_depth_stride, g.alpha, packed, kLanes);
  } else {
    pack_transposed(count, depth, from, g.a_row_stride, g.alpha, packed, kLanes);
  }
  return {packed, kLanes};
}

// Asks for what the next tile reads first: its rows of A, when no tile has read them yet, and what
// it adds to. They lie far away and come in too few lines in a row for the processor to foresee.
void prefetch_next(const GemmArguments& g, RowPanel rows, int64_t column, int64_t columns,
                   int64_t first, int64_t depth, bool a_too) {
  for (int64_t r = rows.begin; r < rows.end && (g.accumulate || first > 0); ++r) {
    for (int64_t j = 0; j < columns; j += kLine) hwy::Prefetch(g.c + r * g.c_stride + column + j);
  }
  if (!a_too) return;
  const float* const from = g.a + rows.begin * g.a_row_stride + first * g.a_depth_stride;
  if (g.a_row_stride == 1) {
    for (int64_t p = 0; p < depth; ++p) hwy::Prefetch(from + p * g.a_depth_stride);
    return;
  }
  for (int64_t r = 0; r < rows.end - rows.begin; ++r) {
    for (int64_t p = 0; p < depth; p += kLine) hwy::Prefetch(from + r * g.a_row_stride + p);
  }
}

// Depths [first, first + depth) of `columns` columns of B from `column`, packed into `packed`
// unless few row panels will read it. Lanes past the end hold anything: their products are never
// stored.
Panel panel_of_b(const GemmArguments& g, int64_t column, int64_t columns, int64_t first,
                 int64_t depth, int64_t panel_count, float* packed) {
  const float* const from = g.b + first * g.b_depth_stride + column * g.b_column_stride;
  const bool straight = g.b_column_stride == 1;
  if (straight && columns % kLanes == 0 &&
      (panel_count <= kReadersInPlaceMax || g.b_depth_stride <= kNearStride)) {
    return {from, g.b_depth_stride};
  }
  for (int64_t j = 0; j < columns; j += kLanes) {
    const int64_t width = std::min(kLanes, columns - j);
    if (straight) {
      pack_straight(width, depth, from + j, g.b_depth_stride, 1.0F, packed + j, kPanel);
    } else {
      pack_transposed(width, depth, from + j * g.b_column_stride, g.b_column_stride, 1.0F,
                      packed + j, kPanel);
    }
  }
  return {packed, kPanel};
}

// Columns [column, column + count), depths [first, first + depth): every row panel times every
// column panel. A column panel is packed just before its first use and then stays in the first
// cache while the row panels of a block pass by.
void multiply_block(const GemmArguments& g, int64_t column, int64_t count, int64_t first,
                    int64_t depth, float* packed_a, float* packed_b) {
  const bool from_zero = first == 0 && !g.accumulate;
  const int64_t panel_count = (g.m + kTileRows - 1) / kTileRows;
  std::array<Panel, kRowPanelsMax> left;
  std::array<Panel, kColumnsMax / kPanel> right;
  for (int64_t block = 0; block < panel_count; block += kRowPanelsMax) {
    const int64_t block_end = std::min(block + kRowPanelsMax, panel_count);
    for (int64_t p = block; p < block_end; ++p) {
      left[p - block] = panel_of_a(g, row_panel(g, p, panel_count), first, depth,
                                   packed_a + (p - block) * kDepthMax * kLanes);
    }
    for (int64_t j = 0; j < count; j += kPanel) {
      const int64_t columns = std::min(kPanel, count - j);
      Panel& b = right[j / kPanel];
      if (block == 0) {
        b = panel_of_b(g, column + j, columns, first, depth, panel_count, packed_b + j * kDepthMax);
      }
      for (int64_t p = block; p < block_end; ++p) {
        const RowPanel rows = row_panel(g, p, panel_count);
        const Panel& a = left[p - block];
        if (p + 1 < block_end) {
          prefetch_next(g, row_panel(g, p + 1, panel_count), column + j, columns, first, depth,
                        j == 0);
        }
        float* const c = g.c + rows.begin * g.c_stride + column + j;
        const TileFunction tile = tile_of(a.layout, rows.end - rows.begin, columns);
        if (columns % kLanes == 0) {
          tile(depth, a.data, a.stride, b.data, b.stride, c, g.c_stride, from_zero);
        } else {
          edge_tile(tile, rows.end - rows.begin, columns, depth, a.data, a.stride, b.data, c,
                    g.c_stride, from_zero);
        }
      }
    }
  }
}

void gemm(const GemmArguments& g, float* workspace) {
  float* const packed_a = workspace;
  float* const packed_b = workspace + kDepthMax * kRowPanelsMax * kLanesMax;
  for (int64_t column = 0; column < g.n; column += kColumnsMax) {
    const int64_t count = std::min(kColumnsMax, g.n - column);
    for (int64_t first = 0; first < g.k; first += kDepthMax) {
      multiply_block(g, column, count, first, std::min(kDepthMax, g.k - first), packed_a, packed_b);
    }
  }
}

void transpose(int64_t rows, int64_t columns, const float* from, int64_t from_stride, float* to,
               int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    pack_transposed(std::min(kLanes, rows - r), columns, from + r * from_stride, from_stride, 1.0F,
                    to + r, to_stride);
  }
}

}  // namespace penstock::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace penstock::cpu {

HWY_EXPORT(gemm);
HWY_EXPORT(transpose);

void transpose(int64_t rows, int64_t columns, const float* from, int64_t from_stride, float* to,
               int64_t to_stride) {
  HWY_DYNAMIC_DISPATCH(transpose)(rows, columns, from, from_stride, to, to_stride);
}

int64_t gemm_workspace_floats() {
  return kDepthMax * (kColumnsMax + kRowPanelsMax * kLanesMax);
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
