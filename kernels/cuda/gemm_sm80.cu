// Grouped products on every device from sm_80 on: cp.async into four stages of shared memory,
// ldmatrix, mma.sync. A block of 8 warps computes 128 x 256 of C, a warp 64 x 64.
#include "kernels/cuda/gemm_sm80_layout.h"
#include "kernels/cuda/gemm_store.cuh"
#include "kernels/cuda/gemm_tiles.h"
#include "kernels/cuda/launch.cuh"

namespace penstock::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kStages = 4;
constexpr int kWarpExtent = 64;  // rows and columns of a warp: 2 x 4 warps
constexpr int kBlocks16 = kWarpExtent / 16;

template <GemmForm kForm>
using ATile = StageTile<kTileRows, a_depth_inner(kForm)>;
template <GemmForm kForm>
using BTile = StageTile<kTileColumns, b_depth_inner(kForm)>;
constexpr int kStageBytes = (kTileRows + kTileColumns) * kDepth80 * 2;

// `bytes`: 16, or 0 for zeros, when nothing is read.
__device__ inline void copy_async(uint32_t to, const Bf16* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ inline void end_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// All but the newest kPending groups of this thread's copies have arrived.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <bool kTranspose>
__device__ inline void load_matrices(uint32_t from, uint32_t (&words)[4]) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
  }
}

__device__ inline void multiply(float* sums, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One factor of a tile in memory: how many lines there are from `from` on, and values in each.
// Beyond them there are zeros, so that neither what is not the factor's nor NaN in it gets into a
// sum.
struct Factor {
  const Bf16* from = nullptr;
  int64_t stride = 0;
  int lines = 0;
  int width = 0;
};

template <GemmForm kForm>
__device__ Factor a_factor(const GemmProblem& problem, const GemmTile& tile) {
  const View<const Bf16>& a = problem.a;
  const int rows = tile.last - tile.first;
  if constexpr (a_depth_inner(kForm)) {
    return {a.data + (tile.first + tile.row) * a.stride, a.stride, rows - tile.row,
            static_cast<int>(problem.k)};
  } else {
    return {a.data + tile.first * a.stride + tile.row, a.stride, rows,
            static_cast<int>(problem.m) - tile.row};
  }
}

template <GemmForm kForm>
__device__ Factor b_factor(const GemmProblem& problem, const GemmTile& tile) {
  const View<const Bf16>& b = problem.b;
  const Bf16* const group = b.data + tile.group * problem.b_group_stride;
  const int columns = static_cast<int>(problem.n) - tile.column;
  const int depth = static_cast<int>(problem.k);
  if constexpr (kForm == GemmForm::kForward) {
    return {group + tile.column * b.stride, b.stride, columns, depth};
  } else if constexpr (kForm == GemmForm::kInputGradient) {
    return {group + tile.column, b.stride, depth, columns};
  } else {
    return {b.data + tile.first * b.stride + tile.column, b.stride, tile.last - tile.first,
            columns};
  }
}

// Stage `step` of a factor, which holds the depth [step * kDepth80, …). There is some of it.
template <bool kDepthInner, typename Tile>
__device__ void copy_stage(uint32_t to, const Factor& factor, int step) {
  // A thread copies the same chunk of every kLineStep-th line.
  constexpr int kLineStep = kThreads / Tile::kChunks;
  const int chunk = static_cast<int>(threadIdx.x) % Tile::kChunks;
  const int line_first = static_cast<int>(threadIdx.x) / Tile::kChunks;
  const int column = (kDepthInner ? step * kDepth80 : 0) + chunk * 8;
  int line = (kDepthInner ? 0 : step * kDepth80) + line_first;
  const Bf16* from = factor.from + line * factor.stride + column;
  if (column >= factor.width) line = factor.lines;
#pragma unroll
  for (int i = 0; i < Tile::kLines / kLineStep; ++i) {
    const bool there = line + i * kLineStep < factor.lines;
    copy_async(to + Tile::offset(line_first + i * kLineStep, chunk), there ? from : factor.from,
               there ? 16 : 0);
    from += kLineStep * factor.stride;
  }
}

// The sums of a warp: blocks of 16 rows, of 8 columns, and what a lane has of them
// (gemm_store.cuh).
using Sums = float[kBlocks16][2 * kBlocks16][4];

template <GemmForm kForm>
__device__ void multiply_stage(uint32_t a_stage, uint32_t b_stage, Sums& sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int row = warp % 2 * kWarpExtent;
  const int column = warp / 2 * kWarpExtent;
#pragma unroll
  for (int depth = 0; depth < kDepth80; depth += 16) {
    uint32_t a[kBlocks16][4];
    uint32_t b[kBlocks16][4];
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
      load_matrices<!a_depth_inner(kForm)>(
          a_stage + ATile<kForm>::lane_offset(row + 16 * i, depth, lane), a[i]);
      load_matrices<!b_depth_inner(kForm)>(
          b_stage + BTile<kForm>::lane_offset(column + 16 * i, depth, lane), b[i]);
    }
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int j = 0; j < kBlocks16; ++j) {
        multiply(sums[i][2 * j], a[i], b[j][0], b[j][2]);
        multiply(sums[i][2 * j + 1], a[i], b[j][1], b[j][3]);
      }
    }
  }
}

template <GemmForm kForm>
__device__ void sum_tile(const GemmProblem& problem, const GemmTile& tile, uint32_t stages,
                         Sums& sums) {
  const Factor a = a_factor<kForm>(problem, tile);
  const Factor b = b_factor<kForm>(problem, tile);
  const int steps = static_cast<int>(tiles_of(depth_of<kForm>(problem, tile), kDepth80));
  const auto copy = [&](int step) {
    if (step < steps) {
      const uint32_t to = stages + step % kStages * kStageBytes;
      copy_stage<a_depth_inner(kForm), ATile<kForm>>(to, a, step);
      copy_stage<b_depth_inner(kForm), BTile<kForm>>(to + ATile<kForm>::kBytes, b, step);
    }
    end_copies();  // also of none: the count of groups below stays one for each step
  };
  // The tile before is still being read by slower warps.
  __syncthreads();
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  for (int step = 0; step < steps; ++step) {
    // kStages - 1 + step groups were ended: `step` of them and one more are to have arrived.
    wait_copies<kStages - 2>();
    // All copies of this stage are visible, and all warps are done with the one that is filled
    // next.
    __syncthreads();
    copy(step + kStages - 1);
    const uint32_t stage = stages + step % kStages * kStageBytes;
    multiply_stage<kForm>(stage, stage + ATile<kForm>::kBytes, sums);
  }
}

// One block on a multiprocessor: the sums alone are 128 registers of each of 256 threads, and on
// sm_86 and sm_89 four stages are the whole shared memory.
template <GemmForm kForm>
__global__ __launch_bounds__(kThreads, 1) void gemm_sm80(
    const __grid_constant__ GemmProblem problem) {
  extern __shared__ __align__(128) unsigned char shared[];
  const auto stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  TileWalk<kForm> walk(problem);
  GemmTile tile;
  const int stride = static_cast<int>(gridDim.x);
  for (int index = static_cast<int>(blockIdx.x); walk.find(index, tile); index += stride) {
    Sums sums = {};
    sum_tile<kForm>(problem, tile, stages, sums);
    const auto c = c_tile<kForm>(problem, tile);
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int strip = 0; strip < kWarpExtent / kStripColumns; ++strip) {
        store_strip(c, warp % 2 * kWarpExtent + 16 * i + lane / 4,
                    warp / 2 * kWarpExtent + strip * kStripColumns, &sums[i][4 * strip][0]);
      }
    }
  }
}

template <GemmForm kForm>
void launch_form(Stream& stream, const GemmProblem& problem) {
  const auto blocks = static_cast<unsigned>(blocks_for(kForm, problem, stream.multiprocessors()));
  launch(stream, "gemm_sm80", blocks, kThreads, kStages * kStageBytes, gemm_sm80<kForm>, problem);
}

}  // namespace

void launch_gemm_sm80(Stream& stream, GemmForm form, const GemmProblem& problem) {
  switch (form) {
    case GemmForm::kForward:
      return launch_form<GemmForm::kForward>(stream, problem);
    case GemmForm::kInputGradient:
      return launch_form<GemmForm::kInputGradient>(stream, problem);
    case GemmForm::kWeightGradient:
      return launch_form<GemmForm::kWeightGradient>(stream, problem);
  }
}

}  // namespace penstock::cuda
