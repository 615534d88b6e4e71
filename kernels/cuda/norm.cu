#include "kernels/cuda/norm.h"

#include "kernels/cuda/lanes.cuh"
#include "kernels/cuda/launch.cuh"

namespace penstock::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorsMax = 4;  // that a thread keeps of its row: more would cost occupancy

// A team of kTeam threads has a row, each every kTeam-th vector of it, so that a row is read once.
// A block has kThreads / kTeam teams.
template <int kTeam>
struct RowTeam {
  int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
  int member = threadIdx.x % kTeam;
  __device__ int64_t column(int v) const {
    return static_cast<int64_t>(v * kTeam + member) * kVector;
  }
  // Over the team, in a fixed order. Every thread of the block calls it; `sums`: kThreads / kWarp
  // floats of shared memory.
  __device__ float sum(float value, float* sums) const {
    const float warp = sum_lanes(value);
    if constexpr (kTeam == kWarp) return warp;
    __syncthreads();
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = warp;
    __syncthreads();
    const int first = threadIdx.x / kTeam * (kTeam / kWarp);
    float total = 0;
#pragma unroll
    for (int i = 0; i < kTeam / kWarp; ++i) total += sums[first + i];
    return total;
  }
};

template <typename T, int kTeam>
__global__ __launch_bounds__(kThreads) void norm_rows(RmsNorm<T> norm) {
  __shared__ float sums[kThreads / kWarp];
  const RowTeam<kTeam> team;
  const int64_t row = team.row;
  const int64_t width = row < rows_of(norm.rows) ? norm.width : 0;  // 0: the team has no row
  Packed<T> kept[kVectorsMax];
#pragma unroll
  for (int v = 0; v < kVectorsMax; ++v) {
    if (team.column(v) < width) kept[v] = load(norm.x.data + row * norm.x.stride + team.column(v));
  }
  float squares = 0;
#pragma unroll
  for (int v = 0; v < kVectorsMax; ++v) {
    const int64_t column = team.column(v);
    if (column >= width) continue;
    float values[kVector];
    unpack(kept[v], values);
    if (norm.residual.data != nullptr) {
      float other[kVector];
      load_floats(norm.residual.data + row * norm.residual.stride + column, other);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] += other[i];
      // What is normed is what is stored, so that the gradients see the same numbers.
      kept[v] = pack<T>(values);
      put(norm.sum.data + row * norm.sum.stride + column, kept[v]);
      unpack(kept[v], values);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares += values[i] * values[i];
  }
  const float mean = team.sum(squares, sums) / static_cast<float>(norm.width);
  const float inverse = rsqrtf(mean + norm.eps);
  if (team.member == 0 && width > 0) norm.inv_rms[row] = inverse;
#pragma unroll
  for (int v = 0; v < kVectorsMax; ++v) {
    const int64_t column = team.column(v);
    if (column >= width) continue;
    float values[kVector];
    float weight[kVector];
    unpack(kept[v], values);
    load_floats(norm.weight + column, weight);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] *= inverse * weight[i];
    put(norm.y.data + row * norm.y.stride + column, pack<T>(values));
  }
}

template <typename T, int kTeam>
__global__ __launch_bounds__(kThreads) void norm_rows_gradient(RmsNormInputGradient<T> g) {
  __shared__ float sums[kThreads / kWarp];
  const RowTeam<kTeam> team;
  const int64_t row = team.row;
  const int64_t width = row < rows_of(g.rows) ? g.width : 0;
  Packed<T> x[kVectorsMax];
  Packed<T> dy[kVectorsMax];
#pragma unroll
  for (int v = 0; v < kVectorsMax; ++v) {
    if (team.column(v) >= width) continue;
    x[v] = load(g.x.data + row * g.x.stride + team.column(v));
    dy[v] = load(g.dy.data + row * g.dy.stride + team.column(v));
  }
  float dot = 0;
#pragma unroll
  for (int v = 0; v < kVectorsMax; ++v) {
    const int64_t column = team.column(v);
    if (column >= width) continue;
    float a[kVector];
    float b[kVector];
    float weight[kVector];
    unpack(x[v], a);
    unpack(dy[v], b);
    load_floats(g.weight + column, weight);
#pragma unroll
    for (int i = 0; i < kVector; ++i) dot += a[i] * weight[i] * b[i];
  }
  const float inverse = width > 0 ? g.inv_rms[row] : 0.0F;
  const float mean = inverse * team.sum(dot, sums) / static_cast<float>(g.width);
#pragma unroll
  for (int v = 0; v < kVectorsMax; ++v) {
    const int64_t column = team.column(v);
    if (column >= width) continue;
    float a[kVector];
    float b[kVector];
    float weight[kVector];
    unpack(x[v], a);
    unpack(dy[v], b);
    load_floats(g.weight + column, weight);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      b[i] = inverse * (weight[i] * b[i] - a[i] * inverse * mean);
    }
    if (g.add.data != nullptr) {
      load_floats(g.add.data + row * g.add.stride + column, a);
#pragma unroll
      for (int i = 0; i < kVector; ++i) b[i] += a[i];
    }
    put(g.dx.data + row * g.dx.stride + column, pack<T>(b));
  }
}

// Calls launch(blocks, std::integral_constant<int, team>) with teams large enough for `width`.
template <typename Launch>
void for_width(int64_t rows, int64_t width, const Launch& launch) {
  const auto with = [&](auto team) {
    launch(static_cast<unsigned>(ceil_div(rows, kThreads / team())), team);
  };
  const int64_t threads = ceil_div(width, kVectorsMax * kVector);
  if (threads <= 32) return with(std::integral_constant<int, 32>());
  if (threads <= 64) return with(std::integral_constant<int, 64>());
  if (threads <= 128) return with(std::integral_constant<int, 128>());
  with(std::integral_constant<int, 256>());
}

// Block (x, y) sums rows y, y + kNormPartials, … of its columns, a thread for each.
constexpr int kColumnThreads = 128;
template <typename T>
__global__ __launch_bounds__(kColumnThreads) void norm_weight_partials(RowCount rows, int64_t width,
                                                                       View<const T> x,
                                                                       const float* inv_rms,
                                                                       View<const T> dy,
                                                                       float* partials) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x;
  if (column >= width) return;
  const int64_t count = rows_of(rows);
  float sum = 0;
  for (int64_t row = blockIdx.y; row < count; row += kNormPartials) {
    sum += static_cast<float>(dy.data[row * dy.stride + column]) *
           static_cast<float>(x.data[row * x.stride + column]) * inv_rms[row];
  }
  partials[blockIdx.y * width + column] = sum;
}

__global__ __launch_bounds__(kColumnThreads) void norm_weight_sum(int64_t width,
                                                                  const float* partials,
                                                                  float* dweight) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x;
  if (column >= width) return;
  float sum = 0;
  for (int64_t part = 0; part < kNormPartials; ++part) sum += partials[part * width + column];
  dweight[column] += sum;
}

}  // namespace

template <typename T>
void rms_norm(Stream& stream, const RmsNorm<T>& norm) {
  if (norm.rows.most == 0) return;
  for_width(norm.rows.most, norm.width, [&](unsigned blocks, auto team) {
    launch(stream, "rms_norm", blocks, kThreads, 0, norm_rows<T, team()>, norm);
  });
}

template <typename T>
void rms_norm_input_gradient(Stream& stream, const RmsNormInputGradient<T>& gradient) {
  if (gradient.rows.most == 0) return;
  for_width(gradient.rows.most, gradient.width, [&](unsigned blocks, auto team) {
    launch(stream, "rms_norm_input_gradient", blocks, kThreads, 0, norm_rows_gradient<T, team()>,
           gradient);
  });
}

template <typename T>
void rms_norm_weight_gradient(Stream& stream, const RowCount& rows, int64_t width, View<const T> x,
                              const float* inv_rms, View<const T> dy, float* dweight,
                              float* partials) {
  if (rows.most == 0) return;
  const auto columns = static_cast<unsigned>(ceil_div(width, kColumnThreads));
  launch(stream, "rms_norm_weight_gradient", dim3(columns, kNormPartials), kColumnThreads, 0,
         norm_weight_partials<T>, rows, width, x, inv_rms, dy, partials);
  launch(stream, "rms_norm_weight_gradient", columns, kColumnThreads, 0, norm_weight_sum, width,
         partials, dweight);
}

#define PENSTOCK_INSTANTIATE(T)                                                               \
  template void rms_norm<T>(Stream&, const RmsNorm<T>&);                                      \
  template void rms_norm_input_gradient<T>(Stream&, const RmsNormInputGradient<T>&);          \
  template void rms_norm_weight_gradient<T>(Stream&, const RowCount&, int64_t, View<const T>, \
                                            const float*, View<const T>, float*, float*);
PENSTOCK_INSTANTIATE(Bf16)
PENSTOCK_INSTANTIATE(float)
#undef PENSTOCK_INSTANTIATE

}  // namespace penstock::cuda
