// What the attention kernels are made of: tiles of rows in shared memory, products of them by one
// warp, and the order in which blocks take their work.
//
// A tile of kRows x kWidth bf16 lies in slabs of 64 columns, 128 bytes to a row, so that the 8
// chunks of 16 bytes of a row cover all banks; chunk c of row r lies at place c xor (r mod 8) of
// its slab, so that 8 rows of one chunk column, what ldmatrix reads at a time, cover them, too.
#pragma once

#include "kernels/cuda/attention.h"
#include "kernels/cuda/lanes.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/warp_matrix.cuh"

namespace penstock::cuda {

inline constexpr float kLog2E = 1.44269504088896340736F;
inline constexpr int kSlabChunks = 8;
inline constexpr int kSlabColumns = kSlabChunks * kVector;
inline constexpr int kSlabRowBytes = 128;
inline constexpr int kChunkBytes = 16;

template <int kRows>
constexpr int tile_offset(int row, int chunk) {
  return chunk / kSlabChunks * (kRows * kSlabRowBytes) + row * kSlabRowBytes +
         ((chunk ^ row) & (kSlabChunks - 1)) * kChunkBytes;
}

// Every chunk of a tile has a place of its own, and 8 rows of a chunk column cover all banks.
template <int kRows, int kWidth>
constexpr bool places_are_right() {
  bool taken[kRows * kWidth / kVector] = {};
  for (int chunk = 0; chunk < kWidth / kVector; ++chunk) {
    for (int row = 0; row < kRows; row += 8) {
      unsigned banks = 0;
      for (int i = row; i < row + 8; ++i) {
        const int place = tile_offset<kRows>(i, chunk) / kChunkBytes;
        if (place < 0 || place >= kRows * kWidth / kVector || taken[place]) return false;
        taken[place] = true;
        banks |= 1U << (place % kSlabChunks);
      }
      if (banks != 0xffU) return false;
    }
  }
  return true;
}
static_assert(places_are_right<64, 192>() && places_are_right<128, 128>());

// Where in a block of 16 x 16 elements (rows x 2 chunks) a lane points ldmatrix to get
struct Place {
  int row;
  int chunk;
};
// - words 0..3 of A: matrices (0, 0), (8, 0), (0, 8), (8, 8) of the block;
constexpr Place left_place(int lane) {
  return {lane % 16, lane / 16};
}
// - b0, b1 of two B whose columns are the block's rows: matrices (0, 0), (0, 8), (8, 0), (8, 8);
constexpr Place right_place(int lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2};
}
// - b0, b1 of two B whose depth is the block's rows, transposed: (0, 0), (8, 0), (0, 8), (8, 8).
constexpr Place transposed_place(int lane) {
  return {lane % 16, lane / 16};
}

template <int kRowCount, int kColumnCount>
struct SharedTile {
  static constexpr int kRows = kRowCount;
  static constexpr int kWidth = kColumnCount;
  static constexpr int kBytes = kRows * kWidth * 2;
  static_assert(kRows % 16 == 0 && kWidth % kSlabColumns == 0);

  __device__ explicit SharedTile(char* at) : bytes(at), base(shared_address(at)) {}
  __device__ uint32_t address(int row, int chunk) const {
    return base + tile_offset<kRows>(row, chunk);
  }
  // address(row + rows, chunk + even) from that of (row, chunk), when `rows` is a multiple of 8,
  // `even` is even and chunk mod 8 is 0 or 1: one xor and, both being known, an immediate. A tile
  // begins at a multiple of 128, so that bits 4..6 of an address are those that are xored.
  static __device__ uint32_t moved(uint32_t address, int rows, int even) {
    const int slab = even / kSlabChunks;
    return (address ^ static_cast<uint32_t>(even % kSlabChunks * kChunkBytes)) +
           static_cast<uint32_t>((slab * kRows + rows) * kSlabRowBytes);
  }
  char* bytes;
  uint32_t base;
};

// The rows of one head of one sequence: columns [0, first_width) come from `first`, those behind
// them from `second`.
struct RowSource {
  const Bf16* first = nullptr;
  int first_stride = 0;  // 32 bits: an address is then one multiplication
  int first_width = 0;
  const Bf16* second = nullptr;
  int second_stride = 0;
  int width = 0;
};

// Begins to copy rows [first_row, first_row + Tile::kRows) of `source`; zeros for rows from
// `row_count` on and columns from source.width on. By the whole block.
template <int kThreads, typename Tile>
__device__ void load_rows(const Tile& tile, const RowSource& source, int first_row, int row_count) {
  constexpr int kRowsAtOnce = kThreads / kSlabChunks;
  static_assert(Tile::kRows % kRowsAtOnce == 0);
  // Computed again at every call: the compiler would keep an address in registers for each copy.
  const int thread = opaque(static_cast<int>(threadIdx.x));
  const int chunk = thread % kSlabChunks;
  const int thread_row = thread / kSlabChunks;
#pragma unroll
  for (int slab = 0; slab < Tile::kWidth / kSlabColumns; ++slab) {
    const int column = slab * kSlabColumns + chunk * kVector;
    const bool in_first = column < source.first_width;
    const int64_t stride = in_first ? source.first_stride : source.second_stride;
    const Bf16* const from =
        in_first ? source.first + column : source.second + (column - source.first_width);
#pragma unroll 1  // one address at a time: there are sums in the other registers
    for (int i = 0; i < Tile::kRows / kRowsAtOnce; ++i) {
      const int row = thread_row + i * kRowsAtOnce;
      const bool valid = column < source.width && first_row + row < row_count;
      copy_async<kChunkBytes>(tile.address(row, slab * kSlabChunks + chunk),
                              valid ? from + (first_row + row) * stride : source.first, valid);
    }
  }
}

template <int kRowTiles, int kColumnTiles>
__device__ inline void clear(float (&values)[kRowTiles][kColumnTiles][4]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) values[r][n][e] = 0;
    }
  }
}

// products[r][n] += left rows [left_row + 16 r, …) times the transpose of right rows
// [right_row + 8 n, …), over the width of both. Row numbers are multiples of 16.
template <int kRowTiles, int kColumnTiles, typename Left, typename Right>
__device__ inline void multiply_rows(float (&products)[kRowTiles][kColumnTiles][4],
                                     const Left& left, int left_row, const Right& right,
                                     int right_row) {
  static_assert(Left::kWidth == Right::kWidth && kColumnTiles % 2 == 0);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Place a_place = left_place(lane);
  const Place b_place = right_place(lane);
  const uint32_t a_address = left.address(left_row + a_place.row, a_place.chunk);
  const uint32_t b_address = right.address(right_row + b_place.row, b_place.chunk);
#pragma unroll
  for (int chunk = 0; chunk < Left::kWidth / kVector; chunk += 2) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      load_matrices(Left::moved(a_address, 16 * r, chunk), a[r]);
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      uint32_t b[4];
      load_matrices(Right::moved(b_address, 8 * n, chunk), b);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        multiply_add(products[r][n], a[r], b[0], b[1]);
        multiply_add(products[r][n + 1], a[r], b[2], b[3]);
      }
    }
  }
}

// sums[r][n] += weights[r], rounded to bf16, times columns 8 (first_chunk + n), … of right rows
// [right_row, right_row + 8 kDepthTiles).
template <int kRowTiles, int kColumnTiles, int kDepthTiles, typename Right>
__device__ inline void add_weighted_rows(float (&sums)[kRowTiles][kColumnTiles][4],
                                         const float (&weights)[kRowTiles][kDepthTiles][4],
                                         const Right& right, int right_row, int first_chunk) {
  static_assert(kColumnTiles % 2 == 0 && kDepthTiles % 2 == 0);
  const Place place = transposed_place(static_cast<int>(threadIdx.x) % kWarp);
  const uint32_t address = right.address(right_row + place.row, first_chunk + place.chunk);
#pragma unroll
  for (int k = 0; k < kDepthTiles; k += 2) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      a[r][0] = pack_pair(weights[r][k][0], weights[r][k][1]);
      a[r][1] = pack_pair(weights[r][k][2], weights[r][k][3]);
      a[r][2] = pack_pair(weights[r][k + 1][0], weights[r][k + 1][1]);
      a[r][3] = pack_pair(weights[r][k + 1][2], weights[r][k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      uint32_t b[4];
      load_matrices_transposed(Right::moved(address, 8 * k, n), b);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        multiply_add(sums[r][n], a[r], b[0], b[1]);
        multiply_add(sums[r][n + 1], a[r], b[2], b[3]);
      }
    }
  }
}

// Where rows go: row i to data + i * stride, columns from `width` on nowhere.
struct RowTarget {
  Bf16* data = nullptr;
  int64_t stride = 0;
  int width = 0;
};

// Writes this warp's sums, the rows [warp_row, …) of `tile`, whose place they take on their way:
// so that lanes write 16 bytes, and rows whole sectors. Nobody else reads those rows any more.
template <int kRowTiles, int kColumnTiles, typename Tile>
__device__ inline void store_rows(const float (&sums)[kRowTiles][kColumnTiles][4], const Tile& tile,
                                  int warp_row, int first_chunk, const RowTarget& target,
                                  int first_row, int row_count) {
  static_assert(kColumnTiles * kVector <= Tile::kWidth);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + 16 * r + 8 * half + lane / 4;
        char* const chunk = tile.bytes + tile_offset<Tile::kRows>(row, first_chunk + n);
        reinterpret_cast<uint32_t*>(chunk)[lane % 4] =
            pack_pair(sums[r][n][2 * half], sums[r][n][2 * half + 1]);
      }
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * kRowTiles * kColumnTiles; i += kWarp) {
    const int row = warp_row + i / kColumnTiles;
    const int chunk = first_chunk + i % kColumnTiles;
    if (first_row + row >= row_count || chunk * kVector >= target.width) continue;
    const char* const from = tile.bytes + tile_offset<Tile::kRows>(row, chunk);
    *reinterpret_cast<uint4*>(target.data + (first_row + row) * target.stride + chunk * kVector) =
        *reinterpret_cast<const uint4*>(from);
  }
}

// Blocks take the heads of all sequences in groups whose keys and values stay in the L2 cache
// together; within a group the tiles with most work come first, those of all its heads in turn.
inline constexpr int kHeadsTogether = 8;
struct Work {
  int head = 0;  // sequence * heads + head
  int rank = 0;  // of the tile: 0 has most work
};
constexpr Work work_of(int block, int tiles, int heads) {
  const int first = block / (tiles * kHeadsTogether) * kHeadsTogether;
  const int members = heads - first < kHeadsTogether ? heads - first : kHeadsTogether;
  const int within = block - first * tiles;
  return {first + within % members, within / members};
}
constexpr bool work_is_done_once(int tiles, int heads) {
  constexpr int kMost = 256;
  bool done[kMost] = {};
  for (int block = 0; block < tiles * heads; ++block) {
    const Work work = work_of(block, tiles, heads);
    if (work.head < 0 || work.head >= heads || work.rank < 0 || work.rank >= tiles) return false;
    if (done[work.head * tiles + work.rank]) return false;
    done[work.head * tiles + work.rank] = true;
  }
  return true;
}
static_assert(work_is_done_once(1, 3) && work_is_done_once(7, 8) && work_is_done_once(5, 21));

// One head of one sequence. What is read is looked up again at every call, as an address costs two
// multiplications but two registers if it is kept.
struct Head {
  __device__ Head(const AttentionShape& shape, int of)
      : head(of % static_cast<int>(shape.heads)),
        first_token(of / static_cast<int>(shape.heads) * static_cast<int>(shape.seq_length)) {}

  __device__ RowSource rows(const HeadsView<const Bf16>& view, int64_t width) const {
    RowSource rows;
    rows.first =
        view.data + opaque(first_token) * view.token_stride + opaque(head) * view.head_stride;
    rows.first_stride = static_cast<int>(view.token_stride);
    rows.first_width = static_cast<int>(width);
    rows.width = static_cast<int>(width);
    return rows;
  }
  __device__ RowSource key(const AttentionShape& shape, const AttentionRows& in) const {
    RowSource key = rows(in.key_nope, shape.nope_dim);
    key.second = in.key_rope.data + first_token * in.key_rope.stride;
    key.second_stride = static_cast<int>(in.key_rope.stride);
    key.width += static_cast<int>(shape.rope_dim);
    return key;
  }
  __device__ RowTarget target(const HeadsView<Bf16>& view, int64_t width) const {
    return {view.data + first_token * view.token_stride + head * view.head_stride,
            view.token_stride, static_cast<int>(width)};
  }

  int head;
  int first_token;
};

// Whether a position of the sequence is hidden from another.
constexpr bool hidden(int query, int key) {
  return key > query;
}

// Calls launch(query, value) with std::integral_constants: the sizes of heads that kernels exist
// for, of which smaller ones are padded in shared memory.
template <typename Launch>
void for_head_sizes(const AttentionShape& shape, const Launch& launch) {
  const auto fits = [&](int64_t query, int64_t value) {
    return shape.query_dim() <= query && shape.value_dim <= value;
  };
  using std::integral_constant;
  if (fits(64, 64)) return launch(integral_constant<int, 64>(), integral_constant<int, 64>());
  if (fits(128, 128)) return launch(integral_constant<int, 128>(), integral_constant<int, 128>());
  if (fits(192, 128)) return launch(integral_constant<int, 192>(), integral_constant<int, 128>());
  launch(integral_constant<int, 256>(), integral_constant<int, 256>());
}

}  // namespace penstock::cuda
