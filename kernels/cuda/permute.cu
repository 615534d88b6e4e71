#include "kernels/cuda/permute.h"

#include "kernels/cuda/lanes.cuh"
#include "kernels/cuda/launch.cuh"

namespace penstock::cuda {
namespace {

constexpr int kWarps = kSortBlock / kWarp;

__device__ int64_t assignments_of(const CountSort& sort) {
  return sort.row_count == nullptr ? sort.assignments : *sort.row_count * sort.topk;
}

// The expert of this thread's assignment; -1: it has none.
__device__ int expert_of(const CountSort& sort) {
  const int64_t a = static_cast<int64_t>(blockIdx.x) * kSortBlock + threadIdx.x;
  return a < assignments_of(sort) ? sort.ids[a] : -1;
}

// scratch[block][expert] = how many of the block's assignments go there. Counts are integers, so
// that the order of the additions does not matter.
__global__ __launch_bounds__(kSortBlock) void count_blocks(CountSort sort) {
  __shared__ int counts[kSortExpertsMax];
  for (int e = threadIdx.x; e < sort.experts; e += kSortBlock) counts[e] = 0;
  __syncthreads();
  const int expert = expert_of(sort);
  if (expert >= 0) atomicAdd(&counts[expert], 1);
  __syncthreads();
  for (int e = threadIdx.x; e < sort.experts; e += kSortBlock) {
    sort.scratch[static_cast<int64_t>(blockIdx.x) * sort.experts + e] = counts[e];
  }
}

// scratch[block][expert] becomes the place of the block's first assignment of that expert. One
// block, a thread for each expert.
__global__ __launch_bounds__(kSortExpertsMax) void scan_blocks(CountSort sort, int64_t blocks) {
  __shared__ int64_t ends[kSortExpertsMax];
  const int expert = threadIdx.x;
  int64_t total = 0;
  if (expert < sort.experts) {
    for (int64_t b = 0; b < blocks; ++b) total += sort.scratch[b * sort.experts + expert];
  }
  ends[expert] = total;
  __syncthreads();
  for (int distance = 1; distance < kSortExpertsMax; distance *= 2) {
    const int64_t before = expert >= distance ? ends[expert - distance] : 0;
    __syncthreads();
    ends[expert] += before;
    __syncthreads();
  }
  if (expert >= sort.experts) return;
  int64_t next = ends[expert] - total;
  if (expert == 0) sort.offsets[0] = 0;
  sort.offsets[expert + 1] = ends[expert];
  for (int64_t b = 0; b < blocks; ++b) {
    int32_t& at = sort.scratch[b * sort.experts + expert];
    const int32_t count = at;
    at = static_cast<int32_t>(next);
    next += count;
  }
}

// Within a block: those of earlier warps first, then those of lower lanes.
__global__ __launch_bounds__(kSortBlock) void place_assignments(CountSort sort) {
  int* const before =
      dynamic_shared<int>();  // [kWarps][experts]: of this warp, then of earlier ones
  const int warp = threadIdx.x / kWarp;
  for (int i = threadIdx.x; i < kWarps * sort.experts; i += kSortBlock) before[i] = 0;
  __syncthreads();
  const int expert = expert_of(sort);
  const unsigned same = __match_any_sync(kAllLanes, expert);
  const unsigned lower = same & ((1U << (threadIdx.x % kWarp)) - 1);
  if (expert >= 0 && lower == 0) before[warp * sort.experts + expert] = __popc(same);
  __syncthreads();
  for (int e = threadIdx.x; e < sort.experts; e += kSortBlock) {
    int sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int count = before[w * sort.experts + e];
      before[w * sort.experts + e] = sum;
      sum += count;
    }
  }
  __syncthreads();
  const int64_t a = static_cast<int64_t>(blockIdx.x) * kSortBlock + threadIdx.x;
  if (a >= sort.assignments) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * sort.experts;
  sort.place[a] = expert < 0 ? -1
                             : sort.scratch[first + expert] + before[warp * sort.experts + expert] +
                                   __popc(lower);
}

constexpr int kRowThreads = 256;
constexpr int kRowsPerBlock = kRowThreads / kWarp;  // a warp has a row, or an assignment

template <typename T>
__global__ __launch_bounds__(kRowThreads) void expand(PermuteRows<T> in, View<const T> x,
                                                      const float* weights, View<T> sorted,
                                                      View<const T> of, float* dots) {
  const int64_t a = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (a >= rows_of(in.rows) * in.topk) return;
  const int64_t to = in.place[a];
  if (to < 0) {
    if (dots != nullptr && threadIdx.x % kWarp == 0) dots[a] = 0.0F;
    return;
  }
  const float weight = weights == nullptr ? 1.0F : weights[a];
  const T* const from = x.data + a / in.topk * x.stride;
  float dot = 0;
#pragma unroll 4
  for (int64_t column = threadIdx.x % kWarp * kVector; column < in.width;
       column += kWarp * kVector) {
    float values[kVector];
    load_floats(from + column, values);
    if (of.data != nullptr) {
      float other[kVector];
      load_floats(of.data + to * of.stride + column, other);
#pragma unroll
      for (int i = 0; i < kVector; ++i) dot += values[i] * other[i];
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] *= weight;
    put(sorted.data + to * sorted.stride + column, pack<T>(values));
  }
  if (dots == nullptr) return;
  dot = sum_lanes(dot);
  if (threadIdx.x % kWarp == 0) dots[a] = dot;
}

template <typename T>
__global__ __launch_bounds__(kRowThreads) void combine(PermuteRows<T> in, View<const T> sorted,
                                                       const float* weights, View<T> y) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= rows_of(in.rows)) return;
  for (int64_t column = threadIdx.x % kWarp * kVector; column < in.width;
       column += kWarp * kVector) {
    float sum[kVector] = {};
#pragma unroll 4
    for (int64_t a = row * in.topk; a < (row + 1) * in.topk; ++a) {
      const int64_t from = in.place[a];
      if (from < 0) continue;
      const float weight = weights == nullptr ? 1.0F : weights[a];
      float values[kVector];
      load_floats(sorted.data + from * sorted.stride + column, values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[i] += weight * values[i];
    }
    put(y.data + row * y.stride + column, pack<T>(sum));
  }
}

__global__ __launch_bounds__(kRowThreads) void weights_to_places(int64_t assignments,
                                                                 const int32_t* place,
                                                                 const float* weights,
                                                                 float* sorted_weights) {
  const int64_t a = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (a < assignments && place[a] >= 0) sorted_weights[place[a]] = weights[a];
}

}  // namespace

void count_sort(Stream& stream, const CountSort& sort) {
  const int64_t blocks = ceil_div(sort.assignments, kSortBlock);
  const auto grid = static_cast<unsigned>(blocks);
  if (blocks > 0) launch(stream, "count_sort", grid, kSortBlock, 0, count_blocks, sort);
  launch(stream, "count_sort", 1, kSortExpertsMax, 0, scan_blocks, sort, blocks);
  if (blocks > 0) {
    const size_t shared = sizeof(int) * kWarps * static_cast<size_t>(sort.experts);
    launch(stream, "count_sort", grid, kSortBlock, shared, place_assignments, sort);
  }
}

template <typename T>
void expand_rows(Stream& stream, const PermuteRows<T>& rows, View<const T> x, const float* weights,
                 View<T> sorted, View<const T> of, float* dots) {
  if (rows.rows.most == 0) return;
  const int64_t blocks = ceil_div(rows.rows.most * rows.topk, kRowsPerBlock);
  launch(stream, "expand_rows", static_cast<unsigned>(blocks), kRowThreads, 0, expand<T>, rows, x,
         weights, sorted, of, dots);
}

void expand_weights(Stream& stream, int64_t assignments, const int32_t* place, const float* weights,
                    float* sorted_weights) {
  if (assignments == 0) return;
  const auto blocks = static_cast<unsigned>(ceil_div(assignments, kRowThreads));
  launch(stream, "expand_weights", blocks, kRowThreads, 0, weights_to_places, assignments, place,
         weights, sorted_weights);
}

template <typename T>
void combine_rows(Stream& stream, const PermuteRows<T>& rows, View<const T> sorted,
                  const float* weights, View<T> y) {
  if (rows.rows.most == 0) return;
  const auto blocks = static_cast<unsigned>(ceil_div(rows.rows.most, kRowsPerBlock));
  launch(stream, "combine_rows", blocks, kRowThreads, 0, combine<T>, rows, sorted, weights, y);
}

#define PENSTOCK_INSTANTIATE(T)                                                              \
  template void expand_rows<T>(Stream&, const PermuteRows<T>&, View<const T>, const float*,  \
                               View<T>, View<const T>, float*);                              \
  template void combine_rows<T>(Stream&, const PermuteRows<T>&, View<const T>, const float*, \
                                View<T>);
PENSTOCK_INSTANTIATE(Bf16)
PENSTOCK_INSTANTIATE(float)
#undef PENSTOCK_INSTANTIATE

}  // namespace penstock::cuda
