// From the sums of a tensor core to C. Device code only.
//
// mma.m16n8 and, for each of its warps, wgmma.m64 leave a block of 8 columns to a warp so: lane l
// has sums 0, 1 in row l / 4 and sums 2, 3 in row l / 4 + 8, in columns 2 (l % 4) and the one
// behind it.
#pragma once

#include "kernels/cuda/gemm_tiles.h"
#include "kernels/cuda/lanes.cuh"

namespace penstock::cuda {

inline constexpr int kStripColumns = 32;  // four blocks of 8 columns, 16 sums of a lane

// A tile of C, of which the first rows and columns exist.
template <typename T>
struct CTile {
  T* data = nullptr;
  int64_t stride = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  bool accumulate = false;
};

template <GemmForm kForm>
__device__ inline auto c_tile(const GemmProblem& problem, const GemmTile& tile) {
  if constexpr (kForm == GemmForm::kWeightGradient) {
    float* const c = static_cast<float*>(problem.c) + tile.group * problem.c_group_stride;
    return CTile<float>{c + tile.row * problem.c_stride + tile.column, problem.c_stride,
                        problem.m - tile.row, problem.n - tile.column, true};
  } else {
    Bf16* const c = static_cast<Bf16*>(problem.c) + (tile.first + tile.row) * problem.c_stride;
    return CTile<Bf16>{c + tile.column, problem.c_stride, tile.last - tile.first - tile.row,
                       problem.n - tile.column, problem.accumulate};
  }
}

__device__ inline void prefetch_line(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

// Begins to fetch what will be added to, while the sums are computed. `thread`: of `threads` that
// share the work.
template <typename T>
__device__ inline void prefetch(const CTile<T>& c, int thread, int threads) {
  constexpr int kLine = 128 / static_cast<int>(sizeof(T));
  constexpr int kLines = kTileColumns / kLine;
  for (int i = thread; i < kTileRows * kLines; i += threads) {
    const int row = i / kLines;
    const int column = i % kLines * kLine;
    if (row < c.rows && column < c.columns) prefetch_line(c.data + row * c.stride + column);
  }
}

// Word w of lane q of four neighbours becomes word q of lane w. Its own inverse.
__device__ inline void transpose_quad(uint32_t (&words)[4]) {
  const bool odd = (threadIdx.x & 1) != 0;
  const bool high = (threadIdx.x & 2) != 0;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(kAllLanes, odd ? words[i] : words[i + 1], 1);
    words[i] = odd ? got : words[i];
    words[i + 1] = odd ? words[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(kAllLanes, high ? words[i] : words[i + 2], 2);
    words[i] = high ? got : words[i];
    words[i + 2] = high ? words[i + 2] : got;
  }
}

// The 32 columns from `column` of 16 rows; `row`: this lane's upper one. All lanes of a warp call
// it. Pairs of columns are exchanged among four lanes, so that each moves 8 columns at a time.
__device__ inline void store_strip(const CTile<Bf16>& c, int row, int column, const float* sums) {
  const int own_column = column + 8 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own_row = row + 8 * half;
    Bf16* const at = c.data + own_row * c.stride + own_column;
    const bool there = own_row < c.rows && own_column < c.columns;
    uint32_t words[4] = {};
    if (c.accumulate) {
      if (there) {
        const Packed<Bf16> before = load(at);
        words[0] = before.bits.x;
        words[1] = before.bits.y;
        words[2] = before.bits.z;
        words[3] = before.bits.w;
      }
      transpose_quad(words);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = pack_pair(__uint_as_float(words[i] << 16) + sums[4 * i + 2 * half],
                           __uint_as_float(words[i] & 0xffff0000U) + sums[4 * i + 2 * half + 1]);
    }
    transpose_quad(words);
    if (there) put(at, {{words[0], words[1], words[2], words[3]}});
  }
}

__device__ inline void store_strip(const CTile<float>& c, int row, int column, const float* sums) {
  const int own_column = column + 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own_row = row + 8 * half;
    float* const at = c.data + own_row * c.stride + own_column;
    const auto there = [&](int i) { return own_row < c.rows && own_column + 8 * i < c.columns; };
    float2 values[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (there(i)) values[i] = *reinterpret_cast<const float2*>(at + 8 * i);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i].x += sums[4 * i + 2 * half];
      values[i].y += sums[4 * i + 2 * half + 1];
      if (there(i)) *reinterpret_cast<float2*>(at + 8 * i) = values[i];
    }
  }
}

}  // namespace penstock::cuda
