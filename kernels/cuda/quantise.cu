#include "kernels/cuda/quantise.h"

#include <cuda_fp8.h>

#include "kernels/cuda/lanes.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/tile_scale.h"

namespace penstock::cuda {
namespace {

constexpr int kTile = 128;
constexpr int kTeam = kTile / kVector;  // lanes that share a row of a tile
constexpr int kThreads = 256;
constexpr int kTeams = kThreads / kTeam;
constexpr float kLargestCode = 448.0F;  // of E4M3

__device__ inline uint8_t encode(float value) {
  return __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
}

__device__ inline float largest_of(const float (&values)[kVector]) {
  float largest = 0.0F;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float magnitude = fabsf(values[i]);
    largest = magnitude > largest || magnitude != magnitude ? magnitude : largest;
    if (largest != largest) break;
  }
  return largest;
}

// Divided, not multiplied by an inverse: the same bits as on the host.
__device__ inline uint2 encode_all(const float (&values)[kVector], float scale) {
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    words[i / 4] |= static_cast<uint32_t>(encode(values[i] / scale)) << (i % 4 * 8);
  }
  return {words[0], words[1]};
}

// A team has a tile of a row.
template <typename T>
__global__ __launch_bounds__(kThreads) void quantise_tiles(RowCount rows, int64_t width,
                                                           View<const T> x, bool power_of_two,
                                                           QuantisedRows out) {
  const int64_t tiles = ceil_div(width, kTile);
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kTeams + threadIdx.x / kTeam;
  const int64_t row = number / tiles;
  const int64_t tile = number % tiles;
  const int64_t column = tile * kTile + threadIdx.x % kTeam * kVector;
  const bool there = row < rows_of(rows);
  float values[kVector] = {};
  if (there && column < width) load_floats(x.data + row * x.stride + column, values);
  const float largest = max_lanes<kTeam>(largest_of(values));
  const float scale = tile_scale(largest, kLargestCode, power_of_two);
  if (!there) return;
  if (threadIdx.x % kTeam == 0) out.scales.data[tile * out.scales.stride + row] = scale;
  if (column >= width) return;
  *reinterpret_cast<uint2*>(out.codes.data + row * out.codes.stride + column) =
      encode_all(values, scale);
}

// A block has a block of the weight, a team every 16th row of it.
template <typename T>
__global__ __launch_bounds__(kThreads) void quantise_blocks(int64_t rows, int64_t width,
                                                            View<const T> weight,
                                                            QuantisedWeight out) {
  constexpr int kRowsEach = kTile / kTeams;
  __shared__ float largest_of_warps[kThreads / kWarp];
  __shared__ uint8_t turned[kTile][kTile + kVector];  // [column][row]; aligned, and off the banks
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kTile;
  const int team = threadIdx.x / kTeam;
  const int lane_column = threadIdx.x % kTeam * kVector;
  float values[kRowsEach][kVector] = {};
  float largest = 0.0F;
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) {
    const int64_t row = first_row + i * kTeams + team;
    if (row >= rows || first_column + lane_column >= width) continue;
    load_floats(weight.data + row * weight.stride + first_column + lane_column, values[i]);
    const float here = largest_of(values[i]);
    largest = here > largest || here != here ? here : largest;
  }
  largest = max_lanes(largest);
  if (threadIdx.x % kWarp == 0) largest_of_warps[threadIdx.x / kWarp] = largest;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) {
    const float here = largest_of_warps[warp];
    largest = here > largest || here != here ? here : largest;
  }
  const float scale = tile_scale(largest, kLargestCode, false);
  if (threadIdx.x == 0) out.scales[blockIdx.y * ceil_div(width, kTile) + blockIdx.x] = scale;
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) {
    const int tile_row = i * kTeams + team;
    const uint2 codes = encode_all(values[i], scale);
    const bool there = first_row + tile_row < rows && first_column + lane_column < width;
    if (there) {
      *reinterpret_cast<uint2*>(out.codes.data + (first_row + tile_row) * out.codes.stride +
                                first_column + lane_column) = codes;
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      turned[lane_column + j][tile_row] =
          static_cast<uint8_t>((j < 4 ? codes.x : codes.y) >> (j % 4 * 8));
    }
  }
  if (out.transposed.data == nullptr) return;
  __syncthreads();
  for (int column = team; column < kTile; column += kTeams) {
    if (first_column + column >= width || first_row + lane_column >= rows) continue;
    *reinterpret_cast<uint2*>(
        out.transposed.data + (first_column + column) * out.transposed.stride + first_row +
        lane_column) = *reinterpret_cast<const uint2*>(&turned[column][lane_column]);
  }
}

}  // namespace

template <typename T>
void quantise_rows(Stream& stream, const RowCount& rows, int64_t width, View<const T> x,
                   bool power_of_two, const QuantisedRows& out) {
  if (rows.most == 0) return;
  const int64_t tiles = rows.most * ceil_div(width, kTile);
  launch(stream, "quantise_rows", static_cast<unsigned>(ceil_div(tiles, kTeams)), kThreads, 0,
         quantise_tiles<T>, rows, width, x, power_of_two, out);
}

template <typename T>
void quantise_weight(Stream& stream, int64_t out, int64_t in, View<const T> weight,
                     const QuantisedWeight& quantised) {
  const dim3 grid(static_cast<unsigned>(ceil_div(in, kTile)),
                  static_cast<unsigned>(ceil_div(out, kTile)));
  launch(stream, "quantise_weight", grid, kThreads, 0, quantise_blocks<T>, out, in, weight,
         quantised);
}

#define PENSTOCK_INSTANTIATE(T)                                                          \
  template void quantise_rows<T>(Stream&, const RowCount&, int64_t, View<const T>, bool, \
                                 const QuantisedRows&);                                  \
  template void quantise_weight<T>(Stream&, int64_t, int64_t, View<const T>,             \
                                   const QuantisedWeight&);
PENSTOCK_INSTANTIATE(Bf16)
PENSTOCK_INSTANTIATE(float)
#undef PENSTOCK_INSTANTIATE

}  // namespace penstock::cuda
