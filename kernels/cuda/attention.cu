// Forward: a block has a tile of queries of one head and goes through the keys and values up to its
// last query, with the running maximum and sum of each query's row (Milakov & Gimelshein 2018; Dao
// et al., FlashAttention-2, Algorithm 1).
//
// Keys and values have one tile of shared memory each, and take turns: values are copied while
// scores are computed, the next keys while values are summed up. What that saves lets a
// multiprocessor have two blocks, of which one multiplies while the other has its softmax.
#include "kernels/cuda/attention.h"

#include <limits>

#include "kernels/cuda/attention_tile.cuh"

namespace penstock::cuda {
namespace {

template <int kQuery, int kValue>
struct Plan {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarp;
  // Of 16 rows, to a warp: two share every fragment of keys and values; wider sums leave no
  // registers for that.
  static constexpr int kRowTiles = kValue <= 128 ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kQueries = kWarps * kWarpRows;
  static constexpr int kKeys = kValue == 128 ? 64 : 64;
  using QueryTile = SharedTile<kQueries, kQuery>;
  using KeyTile = SharedTile<kKeys, kQuery>;
  using ValueTile = SharedTile<kKeys, kValue>;
  static constexpr int kSharedBytes = QueryTile::kBytes + KeyTile::kBytes + ValueTile::kBytes;
};

// Of the rows that a lane has a part of, two to a row tile: g and g + 8.
template <int kRowTiles>
struct RunningSoftmax {
  float largest[kRowTiles][2];
  float sums[kRowTiles][2];  // this lane's part

  __device__ RunningSoftmax() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      for (int half = 0; half < 2; ++half) {
        largest[r][half] = -std::numeric_limits<float>::infinity();
        sums[r][half] = 0;
      }
    }
  }

  // Scores become weights relative to the new maximum, as `outputs` and the sums do. The first tile
  // has a key for every query, so that a maximum is never that of nothing.
  template <int kKeyTiles, int kValueTiles>
  __device__ void weigh(float (&scores)[kRowTiles][kKeyTiles][4],
                        float (&outputs)[kRowTiles][kValueTiles][4], float scale_log2) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = largest[r][half];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          top = fmaxf(top, fmaxf(scores[r][n][2 * half], scores[r][n][2 * half + 1]));
        }
        top = max_lanes<4>(top);
        const float factor = exp2_fast((largest[r][half] - top) * scale_log2);
        largest[r][half] = top;
        sums[r][half] *= factor;
#pragma unroll
        for (int n = 0; n < kValueTiles; ++n) {
          outputs[r][n][2 * half] *= factor;
          outputs[r][n][2 * half + 1] *= factor;
        }
        const float shift = top * scale_log2;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            scores[r][n][e] = exp2_fast(scores[r][n][e] * scale_log2 - shift);
            sums[r][half] += scores[r][n][e];
          }
        }
      }
    }
  }

  // Outputs are divided by the sums. log_sum_exp: of the lane's first row; rows from `rows_left` on
  // are not written.
  template <int kValueTiles>
  __device__ void finish(float (&outputs)[kRowTiles][kValueTiles][4], float scale,
                         float* log_sum_exp, int rows_left) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = sum_lanes<4>(sums[r][half]);
        const float inverse = 1.0F / sum;
#pragma unroll
        for (int n = 0; n < kValueTiles; ++n) {
          outputs[r][n][2 * half] *= inverse;
          outputs[r][n][2 * half + 1] *= inverse;
        }
        const int row = 16 * r + 8 * half;
        if (threadIdx.x % 4 == 0 && row < rows_left) {
          log_sum_exp[row] = largest[r][half] * scale + logf(sum);
        }
      }
    }
  }
};

template <int kRowTiles, int kKeyTiles>
__device__ void hide_later_keys(float (&scores)[kRowTiles][kKeyTiles][4], int warp_query,
                                int first_key) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int query = warp_query + 16 * r + 8 * (e / 2) + lane / 4;
        const int key = first_key + 8 * n + 2 * (lane % 4) + e % 2;
        if (hidden(query, key)) scores[r][n][e] = -std::numeric_limits<float>::infinity();
      }
    }
  }
}

template <int kQuery, int kValue>
__global__ __launch_bounds__(Plan<kQuery, kValue>::kThreads, 2) void attend(
    const __grid_constant__ Attention task, int tiles) {
  using P = Plan<kQuery, kValue>;
  extern __shared__ __align__(128) char shared[];
  const typename P::QueryTile queries(shared);
  const typename P::KeyTile keys(shared + P::QueryTile::kBytes);
  const typename P::ValueTile values(shared + P::QueryTile::kBytes + P::KeyTile::kBytes);
  const AttentionShape& shape = task.shape;
  const Work work = work_of(static_cast<int>(blockIdx.x), tiles,
                            static_cast<int>(shape.batch * shape.heads));
  const Head head(shape, work.head);
  const int count = static_cast<int>(shape.seq_length);
  const int first_query = (tiles - 1 - work.rank) * P::kQueries;
  const int key_end = min(count, first_query + P::kQueries);
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp * P::kWarpRows;
  const int warp_query = first_query + warp_row;
  const float scale_log2 = task.scale * kLog2E;

  load_rows<P::kThreads>(queries, head.rows(task.in.query, shape.nope_dim + shape.rope_dim),
                         first_query, count);
  load_rows<P::kThreads>(keys, head.key(shape, task.in), 0, count);
  float outputs[P::kRowTiles][kValue / 8][4];
  clear(outputs);
  RunningSoftmax<P::kRowTiles> softmax;
  for (int first_key = 0; first_key < key_end; first_key += P::kKeys) {
    const bool visible = first_key < warp_query + P::kWarpRows;  // to some row of this warp
    wait_for_copies();
    __syncthreads();  // keys are there, and everybody is done with the values before
    load_rows<P::kThreads>(values, head.rows(task.in.value, shape.value_dim), first_key, count);
    float scores[P::kRowTiles][P::kKeys / 8][4];
    clear(scores);
    if (visible) multiply_rows(scores, queries, warp_row, keys, 0);
    wait_for_copies();
    __syncthreads();  // values are there, and everybody is done with the keys
    if (first_key + P::kKeys < key_end) {
      load_rows<P::kThreads>(keys, head.key(shape, task.in), first_key + P::kKeys, count);
    }
    if (!visible) continue;
    if (first_key + P::kKeys - 1 > warp_query) hide_later_keys(scores, warp_query, first_key);
    softmax.weigh(scores, outputs, scale_log2);
    add_weighted_rows(outputs, scores, values, 0, 0);
  }
  const int lane_query = warp_query + static_cast<int>(threadIdx.x) % kWarp / 4;
  softmax.finish(outputs, task.scale,
                 task.log_sum_exp + work.head * shape.seq_length + lane_query,
                 count - lane_query);
  store_rows(outputs, queries, warp_row, 0,
             head.target(task.out, shape.value_dim),
             first_query, count);
}

}  // namespace

void attention(Stream& stream, const Attention& attention) {
  const AttentionShape& shape = attention.shape;
  if (shape.tokens() == 0 || shape.heads == 0) return;
  for_head_sizes(shape, [&](auto query, auto value) {
    using P = Plan<query(), value()>;
    const int64_t tiles = ceil_div(shape.seq_length, P::kQueries);
    launch(stream, "attention", static_cast<unsigned>(tiles * shape.batch * shape.heads),
           P::kThreads, P::kSharedBytes, attend<query(), value()>, attention,
           static_cast<int>(tiles));
  });
}

}  // namespace penstock::cuda
