// Grouped products on Hopper. A block has a multiprocessor to itself and three warpgroups: one
// whose single thread keeps the copy engine busy, four stages ahead and on into the next tile, and
// two that compute 64 x 256 of a 128 x 256 tile each, their sums in registers.
//
// A stage is passed to and fro by two barriers: "filled" ends when its bytes are there, "emptied"
// when the eight warps that compute are done with it. The n-th use of a stage is phase n of both:
// who computes waits for phase n of "filled", who copies for phase n - 1 of "emptied".
//
// Two blocks may form a pair, a cluster, for two tiles one below the other: they need the same
// columns of B, so each fetches half of them and the copy engine writes it to both. A stage is then
// emptied by the warps of both blocks. The second tile may lie behind the group's end: its block
// fetches B all the same.
//
// Boxes of A reach over the end of a group. For rows of C that is harmless: a row of C comes of its
// own row of A, and the others are not stored. Where rows are the depth (the weight gradient), the
// stage that holds the group's end is cleared from there on, in both factors, as 0 * NaN is NaN.
#include <cudaTypedefs.h>

#include <utility>

#include "kernels/cuda/gemm_sm90.cuh"
#include "kernels/cuda/gemm_sm90_layout.h"
#include "kernels/cuda/gemm_store.cuh"
#include "kernels/cuda/gemm_tiles.h"

namespace penstock::cuda {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kStages = 4;
constexpr int kStageBytes = (kTileRows + kTileColumns) * kDepth90 * 2;
constexpr int kAlignment = 1024;  // of the swizzle's pattern
constexpr int kSharedBytes = kStages * kStageBytes + kAlignment + 2 * kStages * 8;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int kComputeThreads = 2 * kWarpgroup;
constexpr int kABytes = kTileRows * kDepth90 * 2;
// 168 registers a thread, what 384 threads have at the launch, make 64,512: 40 and twice 232 are as
// many.
constexpr int kCopyRegisters = 40;
constexpr int kComputeRegisters = 232;

struct Shared {
  uint32_t stages = 0;
  uint32_t barriers = 0;
  __device__ uint32_t stage(int index) const { return stages + index * kStageBytes; }
  __device__ uint32_t filled(int index) const { return barriers + index * 8; }
  __device__ uint32_t emptied(int index) const { return barriers + (kStages + index) * 8; }
};

// Which stage is used next, and the parity of the phase that this use is.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

template <GemmForm kForm, int kPair>
__device__ void copy_stage(const CUtensorMap& a, const CUtensorMap& b, const GemmTile& tile,
                           int step, uint32_t stage, uint32_t barrier) {
  const int depth = step * kDepth90;
  if constexpr (a_depth_inner(kForm)) {
    copy_box(stage, a, depth, tile.first + tile.row, 0, barrier);
  } else {
#pragma unroll
    for (int i = 0; i < kTileRows / 64; ++i) {
      copy_box(stage + i * kBlockBytes90, a, tile.row + 64 * i, tile.first + depth, 0, barrier);
    }
  }
  // This block's share of the columns: 64 lines, or a box, for every 64 of them.
  constexpr int kBlocks = kTileColumns / kPair / 64;
  const int first = kPair == 1 ? 0 : static_cast<int>(blockIdx.x) % kPair * kBlocks;
  const auto copy_b = [&](int block, int x, int y, int z) {
    const uint32_t to = stage + kABytes + block * kBlockBytes90;
    if constexpr (kPair == 1) {
      copy_box(to, b, x, y, z, barrier);
    } else {
      copy_box_to((1 << kPair) - 1, to, b, x, y, z, barrier);
    }
  };
  if constexpr (kForm == GemmForm::kForward) {
    copy_b(first, depth, tile.column + 64 * first, tile.group);
  } else {
    const bool weights = kForm == GemmForm::kInputGradient;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      copy_b(first + i, tile.column + 64 * (first + i), weights ? depth : tile.first + depth,
             weights ? tile.group : 0);
    }
  }
}

// The tiles of this block, in turn.
template <GemmForm kForm, int kPair, typename Work>
__device__ void for_tiles(const GemmProblem& problem, const Work& work) {
  TileWalk<kForm, kPair> walk(problem);
  GemmTile tile;
  const int stride = static_cast<int>(gridDim.x) / kPair;
  for (int i = static_cast<int>(blockIdx.x) / kPair; walk.find(i, tile); i += stride) {
    tile.row += static_cast<int>(blockIdx.x) % kPair * kTileRows;
    work(tile);
  }
}

template <GemmForm kForm, int kPair>
__device__ void copy_tiles(const GemmProblem& problem, const CUtensorMap& a, const CUtensorMap& b,
                           const Shared& shared) {
  Turn turn;
  for_tiles<kForm, kPair>(problem, [&](const GemmTile& tile) {
    const int steps = static_cast<int>(tiles_of(depth_of<kForm>(problem, tile), kDepth90));
    for (int step = 0; step < steps; ++step) {
      wait(shared.emptied(turn.stage), turn.parity ^ 1);
      // The other block's half may come before this is said: a phase does not end without it.
      arrive_expecting(shared.filled(turn.stage), kStageBytes);
      copy_stage<kForm, kPair>(a, b, tile, step, shared.stage(turn.stage),
                               shared.filled(turn.stage));
      turn.next();
    }
  });
}

// A warp is done with a stage, as whoever fills it in either block is to know.
template <int kPair>
__device__ void release(uint32_t emptied) {
  const uint32_t lane = threadIdx.x % kWarp;
  if constexpr (kPair == 1) {
    if (lane == 0) arrive(emptied);
  } else {
    if (lane < kPair) arrive_in_block(emptied, lane);
  }
}

// Clears lines [first, kDepth90) of every box of a stage, both factors' extents being inner. All
// threads that compute call it.
__device__ inline void clear_lines(uint32_t stage, int first) {
  constexpr int kBoxes = kStageBytes / kBlockBytes90;
  constexpr int kChunks = kLineBytes90 / 16;
  const int chunks = (kDepth90 - first) * kChunks;
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
  for (int box = 0; box < kBoxes; ++box) {
    const uint32_t begin = stage + box * kBlockBytes90 + first * kLineBytes90;
    for (int chunk = thread; chunk < chunks; chunk += kComputeThreads) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(begin + chunk * 16), "r"(0)
                   : "memory");
    }
  }
  publish_stores();
  sync_threads<1, kComputeThreads>();
}

// The sums of this warpgroup's half of a tile.
template <GemmForm kForm, int kPair>
__device__ void sum_tile(const GemmProblem& problem, const GemmTile& tile, const Shared& shared,
                         Turn& turn, float (&sums)[128]) {
  constexpr bool kAInner = a_depth_inner(kForm);
  constexpr bool kBInner = b_depth_inner(kForm);
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  const int64_t depth = depth_of<kForm>(problem, tile);
  const int steps = static_cast<int>(tiles_of(depth, kDepth90));
  int before = 0;
  for (int step = 0; step < steps; ++step) {
    const uint32_t stage = shared.stage(turn.stage);
    wait(shared.filled(turn.stage), turn.parity);
    if constexpr (kForm == GemmForm::kWeightGradient) {
      const int left = static_cast<int>(depth) - step * kDepth90;
      if (left < kDepth90) clear_lines(stage, left);
    }
    // Rows 64 to 127 of A are 64 lines, or a box, behind the others.
    const uint64_t a = matrix_descriptor(stage + warpgroup * kBlockBytes90, kAInner);
    const uint64_t b = matrix_descriptor(stage + kABytes, kBInner);
    begin_products();
#pragma unroll
    for (int i = 0; i < kDepth90 / 16; ++i) {
      multiply_64x256<!kAInner, !kBInner>(sums, a + i * descriptor_step(kAInner),
                                          b + i * descriptor_step(kBInner), step > 0 || i > 0);
    }
    end_products();
    wait_products<1>();  // those of the step before: its stage is free
    if (step > 0) release<kPair>(shared.emptied(before));
    before = turn.stage;
    turn.next();
  }
  wait_products<0>();
  release<kPair>(shared.emptied(before));
}

// Whether a warpgroup's half of a tile has rows of C. Where stages are cleared, its warpgroups meet
// for it, and so are asked for the tile as one.
template <GemmForm kForm>
__device__ bool has_rows(const GemmProblem& problem, const GemmTile& tile, int warpgroup) {
  if constexpr (kForm == GemmForm::kWeightGradient) return tile.row < problem.m;
  return tile.row + warpgroup * 64 < tile.last - tile.first;
}

// Hands a tile's stages back without a product: the other warpgroup has the tensor cores to itself.
template <GemmForm kForm, int kPair>
__device__ void pass_tile(const GemmProblem& problem, const GemmTile& tile, const Shared& shared,
                          Turn& turn) {
  const int steps = static_cast<int>(tiles_of(depth_of<kForm>(problem, tile), kDepth90));
  for (int step = 0; step < steps; ++step) {
    wait(shared.filled(turn.stage), turn.parity);
    __syncwarp();  // a lane left behind here would wait for a phase that has gone by
    release<kPair>(shared.emptied(turn.stage));
    turn.next();
  }
}

template <GemmForm kForm, int kPair>
__device__ void compute_tiles(const GemmProblem& problem, const Shared& shared) {
  Turn turn;
  // Warp w of a warpgroup has rows 16 w to 16 w + 15 of its 64.
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row = (static_cast<int>(threadIdx.x) / kWarp - 4) * 16 + lane / 4;
  for_tiles<kForm, kPair>(problem, [&](const GemmTile& tile) {
    if (!has_rows<kForm>(problem, tile, static_cast<int>(threadIdx.x) / kWarpgroup - 1)) {
      pass_tile<kForm, kPair>(problem, tile, shared, turn);
      return;
    }
    const auto c = c_tile<kForm>(problem, tile);
    if (c.accumulate) {
      prefetch(c, static_cast<int>(threadIdx.x) - kWarpgroup, kComputeThreads);
    }
    float sums[128];
    sum_tile<kForm, kPair>(problem, tile, shared, turn, sums);
#pragma unroll
    for (int strip = 0; strip < kTileColumns / kStripColumns; ++strip) {
      store_strip(c, row, strip * kStripColumns, sums + 16 * strip);
    }
  });
}

// All threads of all blocks that are to see what was done before, or may not leave before it.
template <int kPair>
__device__ void sync_blocks() {
  if constexpr (kPair == 1) {
    __syncthreads();
  } else {
    sync_cluster();
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <GemmForm kForm, int kPair>
__global__ __launch_bounds__(kThreads, 1) void gemm_sm90(
    const __grid_constant__ GemmProblem problem, const __grid_constant__ CUtensorMap a,
    const __grid_constant__ CUtensorMap b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ unsigned char memory[];
  const auto begin = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  const uint32_t stages = (begin + kAlignment - 1) / kAlignment * kAlignment;
  const Shared shared{stages, stages + kStages * kStageBytes};
  if (threadIdx.x == 0) {
    prefetch_map(a);
    prefetch_map(b);
    for (int i = 0; i < kStages; ++i) {
      make_barrier(shared.filled(i), 1);
      make_barrier(shared.emptied(i), kPair * kComputeThreads / kWarp);
    }
    publish_barriers();
  }
  sync_blocks<kPair>();
  // At the end, too, blocks of a pair wait: the other writes here and arrives at barriers here.
  if (threadIdx.x < kWarpgroup) {
    give_up_registers<kCopyRegisters>();
    if (threadIdx.x == 0) copy_tiles<kForm, kPair>(problem, a, b, shared);
    if constexpr (kPair > 1) sync_cluster();
  } else {
    take_registers<kComputeRegisters>();
    compute_tiles<kForm, kPair>(problem, shared);
    if constexpr (kPair > 1) sync_cluster();
  }
#endif
}

// A tensor of lines of `width`, `depth` times so many; its boxes are 64 values of `box_lines`
// lines.
struct MapShape {
  View<const Bf16> view;
  int64_t width = 0;
  int64_t lines = 0;
  int64_t depth = 1;
  int64_t depth_stride = 0;
  int box_lines = 0;
};

using Encode = PFN_cuTensorMapEncodeTiled_v12000;

// Of the driver, which is not linked: where there is none, programs start all the same. Null: too
// old.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would be blamed for it
  const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return usable ? reinterpret_cast<Encode>(function) : nullptr;
}

bool make_map(const MapShape& shape, CUtensorMap* map) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return false;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(shape.width),
                               static_cast<cuuint64_t>(shape.lines),
                               static_cast<cuuint64_t>(shape.depth)};
  // In bytes. That of a dimension of one is not used, but is to be a possible one.
  const int64_t outer = shape.depth > 1 ? shape.depth_stride : shape.lines * shape.view.stride;
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(shape.view.stride * 2),
                                 static_cast<cuuint64_t>(outer * 2)};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(shape.box_lines), 1};
  const cuuint32_t every[3] = {1, 1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<Bf16*>(shape.view.data), sizes,
                strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <GemmForm kForm, int kPair>
bool launch(Stream& stream, const GemmProblem& problem) {
  const auto [n, k] = std::pair(problem.n, problem.k);
  constexpr int kShare = kTileColumns / kPair;  // columns of B that a block fetches
  MapShape a{problem.a, kForm == GemmForm::kWeightGradient ? problem.m : k, problem.rows_most};
  a.box_lines = a_depth_inner(kForm) ? kTileRows : kDepth90;
  MapShape b{problem.b, n, problem.rows_most};
  b.box_lines = b_depth_inner(kForm) ? kShare : kDepth90;
  if constexpr (kForm != GemmForm::kWeightGradient) {
    b.width = kForm == GemmForm::kForward ? k : n;
    b.lines = kForm == GemmForm::kForward ? n : k;
    b.depth = problem.group_count;
    b.depth_stride = problem.b_group_stride;
  }
  CUtensorMap a_map;
  CUtensorMap b_map;
  if (!make_map(a, &a_map) || !make_map(b, &b_map)) return false;
  stream.note("gemm_sm90", cudaFuncSetAttribute(gemm_sm90<kForm, kPair>,
                                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                kSharedBytes));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kPair, 1, 1};
  cudaLaunchConfig_t config = {};
  const int64_t blocks = blocks_for(kForm, problem, stream.multiprocessors(), kPair);
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream.get();
  config.attrs = &cluster;
  config.numAttrs = 1;
  stream.note("gemm_sm90",
              cudaLaunchKernelEx(&config, gemm_sm90<kForm, kPair>, problem, a_map, b_map));
  return true;
}

// Pairs where most tiles have one below them in their group, as far as the host can know.
template <GemmForm kForm>
bool launch(Stream& stream, const GemmProblem& problem) {
  const bool pairs = kForm == GemmForm::kWeightGradient
                         ? problem.m > kTileRows
                         : problem.rows_most >= problem.group_count * int64_t{kTileRows * 3 / 2};
  return pairs && stream.multiprocessors() > 1 ? launch<kForm, 2>(stream, problem)
                                               : launch<kForm, 1>(stream, problem);
}

}  // namespace

bool launch_gemm_sm90(Stream& stream, GemmForm form, const GemmProblem& problem) {
  switch (form) {
    case GemmForm::kForward:
      return launch<GemmForm::kForward>(stream, problem);
    case GemmForm::kInputGradient:
      return launch<GemmForm::kInputGradient>(stream, problem);
    case GemmForm::kWeightGradient:
      return launch<GemmForm::kWeightGradient>(stream, problem);
  }
  return false;
}

}  // namespace penstock::cuda
