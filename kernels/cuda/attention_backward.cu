// Gradients: scores and weights are taken again from log_sum_exp, twice, so that every sum has one
// owner and needs no atomics (Dao et al., FlashAttention-2, Algorithm 2, is one pass with them):
//   weight = exp(scale * score - log_sum_exp),  d_score = weight * (d_out . value - out . d_out)
//   d_value = weight^T d_out,  d_key = scale * d_score^T query,  d_query = scale * d_score key
// A warp has 16 rows of what it sums up; transposed products put weights where the next product
// wants its left side, so that they never leave the registers.
#include "kernels/cuda/attention_tile.cuh"

namespace penstock::cuda {
namespace {

constexpr int kWarpRows = 16;

// Two rounds of shared memory for what a block goes through: one is copied, one is used.
template <int kQuery, int kValue>
struct Plan {
  static constexpr bool kWide = kQuery > 192;
  static constexpr int kWarps = kWide ? 4 : 8;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kOwnRows = kWarps * kWarpRows;
  static constexpr int kOtherRows = kWide ? 32 : 64;
  static constexpr int kAtOnce = 32;  // queries whose weights d_key and d_value take at a time
  // d_key and d_value of wide heads take blocks for each half of their columns: all would not fit
  // into registers.
  static constexpr int kParts = kWide ? 2 : 1;
  using OwnQueryTile = SharedTile<kOwnRows, kQuery>;  // of the width of queries and keys
  using OwnValueTile = SharedTile<kOwnRows, kValue>;  // of that of values and outputs
  using QueryTile = SharedTile<kOtherRows, kQuery>;
  using ValueTile = SharedTile<kOtherRows, kValue>;
  static constexpr int kRoundBytes = QueryTile::kBytes + ValueTile::kBytes;
  static constexpr int kOwnBytes = OwnQueryTile::kBytes + OwnValueTile::kBytes;
  static constexpr int kStatsBytes = 2 * kOtherRows * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = kOwnBytes + 2 * kRoundBytes;
  static constexpr int kSharedBytesWithStats = kSharedBytes + 2 * kStatsBytes;
};

__device__ float weight_of(float score, float scale_log2, float log_sum_exp) {
  return exp2_fast(score * scale_log2 - log_sum_exp * kLog2E);
}

// delta[sequence, head, position] = out . d_out. Sixteen lanes to a row.
constexpr int kDeltaThreads = 256;
constexpr int kDeltaLanes = 16;
__global__ __launch_bounds__(kDeltaThreads) void output_dots(
    const __grid_constant__ AttentionGradient task, int64_t rows) {
  const int64_t row =
      (static_cast<int64_t>(blockIdx.x) * kDeltaThreads + threadIdx.x) / kDeltaLanes;
  const int lane = static_cast<int>(threadIdx.x) % kDeltaLanes;
  const int64_t token = row / task.shape.heads;
  const int64_t head = row % task.shape.heads;
  float dot = 0;
  if (row < rows) {
    const Bf16* const out = task.out.data + token * task.out.token_stride +
                            head * task.out.head_stride;
    const Bf16* const d_out = task.d_out.data + token * task.d_out.token_stride +
                              head * task.d_out.head_stride;
    for (int64_t column = lane * kVector; column < task.shape.value_dim;
         column += kDeltaLanes * kVector) {
      float a[kVector];
      float b[kVector];
      load_floats(out + column, a);
      load_floats(d_out + column, b);
#pragma unroll
      for (int i = 0; i < kVector; ++i) dot += a[i] * b[i];
    }
  }
  dot = sum_lanes<kDeltaLanes>(dot);
  if (row >= rows || lane != 0) return;
  const int64_t length = task.shape.seq_length;
  task.workspace[(token / length * task.shape.heads + head) * length + token % length] = dot;
}

// scores: of 16 queries; become gradients of scores. log_sum_exp, delta: of the lane's two queries.
template <int kKeyTiles>
__device__ void score_gradients(float (&scores)[1][kKeyTiles][4],
                                const float (&d_weights)[1][kKeyTiles][4], int warp_query,
                                int first_key, float scale_log2, const float (&log_sum_exp)[2],
                                const float (&delta)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int query = warp_query + 8 * (e / 2) + lane / 4;
      const int key = first_key + 8 * n + 2 * (lane % 4) + e % 2;
      const float weight = weight_of(scores[0][n][e], scale_log2, log_sum_exp[e / 2]);
      const float gradient = weight * (d_weights[0][n][e] - delta[e / 2]);
      scores[0][n][e] = hidden(query, key) ? 0.0F : gradient;
    }
  }
}

template <int kColumnTiles>
__device__ void scale_all(float (&sums)[1][kColumnTiles][4], float scale) {
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[0][n][e] *= scale;
  }
}

// A block has a tile of queries and goes through the keys up to its last.
template <int kQuery, int kValue>
__global__ __launch_bounds__(Plan<kQuery, kValue>::kThreads, 1) void query_gradients(
    const __grid_constant__ AttentionGradient task, int tiles) {
  using P = Plan<kQuery, kValue>;
  extern __shared__ __align__(128) char shared[];
  const typename P::OwnQueryTile queries(shared);
  const typename P::OwnValueTile d_outs(shared + P::OwnQueryTile::kBytes);
  const AttentionShape& shape = task.shape;
  const Work work = work_of(static_cast<int>(blockIdx.x), tiles,
                            static_cast<int>(shape.batch * shape.heads));
  const Head head(shape, work.head);
  const int count = static_cast<int>(shape.seq_length);
  const int first_query = (tiles - 1 - work.rank) * P::kOwnRows;
  const int key_end = min(count, first_query + P::kOwnRows);
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp * kWarpRows;
  const int warp_query = first_query + warp_row;
  const float scale_log2 = task.scale * kLog2E;

  const auto begin_round = [&](int first_key) {
    char* const round = shared + P::kOwnBytes + first_key / P::kOtherRows % 2 * P::kRoundBytes;
    load_rows<P::kThreads>(typename P::QueryTile(round), head.key(shape, task.in), first_key,
                           count);
    load_rows<P::kThreads>(typename P::ValueTile(round + P::QueryTile::kBytes),
                           head.rows(task.in.value, shape.value_dim), first_key, count);
  };
  load_rows<P::kThreads>(queries, head.rows(task.in.query, shape.nope_dim + shape.rope_dim),
                         first_query, count);
  load_rows<P::kThreads>(d_outs, head.rows(task.d_out, shape.value_dim), first_query, count);
  begin_round(0);
  float log_sum_exp[2];
  float delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Rows behind the last have queries and d_out of 0 and are not written: any number does.
    const int query = min(warp_query + 8 * half + static_cast<int>(threadIdx.x) % kWarp / 4,
                          count - 1);
    log_sum_exp[half] = task.log_sum_exp[work.head * shape.seq_length + query];
    delta[half] = task.workspace[work.head * shape.seq_length + query];
  }
  float sums[1][kQuery / 8][4];
  clear(sums);
  for (int first_key = 0; first_key < key_end; first_key += P::kOtherRows) {
    wait_for_copies();
    __syncthreads();  // this round is there, and everybody is done with the one before
    if (first_key + P::kOtherRows < key_end) begin_round(first_key + P::kOtherRows);
    if (first_key >= warp_query + kWarpRows) continue;
    char* const round = shared + P::kOwnBytes + first_key / P::kOtherRows % 2 * P::kRoundBytes;
    const typename P::QueryTile keys(round);
    const typename P::ValueTile values(round + P::QueryTile::kBytes);
    float scores[1][P::kOtherRows / 8][4];
    float d_weights[1][P::kOtherRows / 8][4];
    clear(scores);
    clear(d_weights);
    multiply_rows(scores, queries, warp_row, keys, 0);
    multiply_rows(d_weights, d_outs, warp_row, values, 0);
    score_gradients(scores, d_weights, warp_query, first_key, scale_log2, log_sum_exp, delta);
    add_weighted_rows(sums, scores, keys, 0, 0);
  }
  scale_all(sums, task.scale);
  store_rows(sums, queries, warp_row, 0,
             head.target(task.d_query, shape.nope_dim + shape.rope_dim), first_query, count);
}

// scores: of 16 keys, transposed; become weights, and d_weights gradients of scores. stats: of the
// queries, log_sum_exp and kStatsRows behind it delta.
template <int kStatsRows, int kQueryTiles>
__device__ void transposed_gradients(float (&scores)[1][kQueryTiles][4],
                                     float (&d_weights)[1][kQueryTiles][4], int warp_key,
                                     int first_query, float scale_log2, const float* stats) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = warp_key + 8 * (e / 2) + lane / 4;
      const int row = 8 * n + 2 * (lane % 4) + e % 2;
      const float weight = weight_of(scores[0][n][e], scale_log2, stats[row]);
      const bool visible = !hidden(first_query + row, key);
      const float gradient = weight * (d_weights[0][n][e] - stats[kStatsRows + row]);
      scores[0][n][e] = visible ? weight : 0.0F;
      d_weights[0][n][e] = visible ? gradient : 0.0F;
    }
  }
}

// Columns of the shared part of keys go to this head's partial sums, [heads, tokens, rope_dim].
template <int kColumnTiles>
__device__ void store_shared_part(const float (&sums)[1][kColumnTiles][4],
                                  const AttentionGradient& task, const Head& head, int warp_key,
                                  int first_chunk) {
  const AttentionShape& shape = task.shape;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t tokens = shape.batch * shape.seq_length;
  float* const partials = task.workspace + (tokens * shape.heads + 3) / 4 * 4 +
                          (head.head * tokens + head.first_token) * shape.rope_dim;
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
    const int64_t column = (first_chunk + n) * 8 + 2 * (lane % 4) - shape.nope_dim;
    if (column < 0 || column >= shape.rope_dim) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = warp_key + 8 * half + lane / 4;
      if (key >= shape.seq_length) continue;
      *reinterpret_cast<float2*>(partials + key * shape.rope_dim + column) =
          make_float2(sums[0][n][2 * half], sums[0][n][2 * half + 1]);
    }
  }
}

// A block has a tile of keys and values and goes through the queries from its first on.
template <int kQuery, int kValue>
__global__ __launch_bounds__(Plan<kQuery, kValue>::kThreads, 1) void key_value_gradients(
    const __grid_constant__ AttentionGradient task, int tiles) {
  using P = Plan<kQuery, kValue>;
  extern __shared__ __align__(128) char shared[];
  const typename P::OwnQueryTile keys(shared);
  const typename P::OwnValueTile values(shared + P::OwnQueryTile::kBytes);
  float* const all_stats = reinterpret_cast<float*>(shared + P::kSharedBytes);
  const AttentionShape& shape = task.shape;
  const int part = static_cast<int>(blockIdx.x) % P::kParts;
  const Work work = work_of(static_cast<int>(blockIdx.x) / P::kParts, tiles,
                            static_cast<int>(shape.batch * shape.heads));
  const Head head(shape, work.head);
  const int count = static_cast<int>(shape.seq_length);
  const int first_key = work.rank * P::kOwnRows;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp * kWarpRows;
  const int warp_key = first_key + warp_row;
  const float scale_log2 = task.scale * kLog2E;

  const auto begin_round = [&](int first_query) {
    const int odd = first_query / P::kOtherRows % 2;
    char* const round = shared + P::kOwnBytes + odd * P::kRoundBytes;
    load_rows<P::kThreads>(typename P::QueryTile(round),
                           head.rows(task.in.query, shape.nope_dim + shape.rope_dim), first_query,
                           count);
    load_rows<P::kThreads>(typename P::ValueTile(round + P::QueryTile::kBytes),
                           head.rows(task.d_out, shape.value_dim), first_query, count);
    // Zeros behind the last query: its weights become 1, what they are multiplied by is 0.
    const int thread = static_cast<int>(threadIdx.x);
    const int query = first_query + thread % P::kOtherRows;
    const float* const from = thread < P::kOtherRows ? task.log_sum_exp : task.workspace;
    if (thread < 2 * P::kOtherRows) {
      copy_async<4>(shared_address(all_stats + odd * 2 * P::kOtherRows + thread),
                    from + work.head * shape.seq_length + (query < count ? query : 0),
                    query < count);
    }
  };
  load_rows<P::kThreads>(keys, head.key(shape, task.in), first_key, count);
  load_rows<P::kThreads>(values, head.rows(task.in.value, shape.value_dim), first_key, count);
  begin_round(first_key);
  constexpr int kKeyTiles = kQuery / P::kParts / 8;
  constexpr int kValueTiles = kValue / P::kParts / 8;
  float key_sums[1][kKeyTiles][4];
  float value_sums[1][kValueTiles][4];
  clear(key_sums);
  clear(value_sums);
  static_assert(P::kOwnRows % P::kOtherRows == 0);  // so that rounds begin where keys do
  for (int first_query = first_key; first_query < count; first_query += P::kOtherRows) {
    wait_for_copies();
    __syncthreads();  // this round is there, and everybody is done with the one before
    if (first_query + P::kOtherRows < count) begin_round(first_query + P::kOtherRows);
    const int odd = first_query / P::kOtherRows % 2;
    char* const round = shared + P::kOwnBytes + odd * P::kRoundBytes;
    const typename P::QueryTile queries(round);
    const typename P::ValueTile d_outs(round + P::QueryTile::kBytes);
#pragma unroll 1
    for (int row = 0; row < P::kOtherRows; row += P::kAtOnce) {
      if (first_query + row + P::kAtOnce <= warp_key) continue;  // all of it hidden
      float scores[1][P::kAtOnce / 8][4];
      float d_weights[1][P::kAtOnce / 8][4];
      clear(d_weights);
      multiply_rows(d_weights, values, warp_row, d_outs, row);
      clear(scores);
      multiply_rows(scores, keys, warp_row, queries, row);
      transposed_gradients<P::kOtherRows>(scores, d_weights, warp_key, first_query + row,
                                          scale_log2, all_stats + odd * 2 * P::kOtherRows + row);
      add_weighted_rows(value_sums, scores, d_outs, row, part * kValueTiles);
      add_weighted_rows(key_sums, d_weights, queries, row, part * kKeyTiles);
    }
  }
  scale_all(key_sums, task.scale);
  store_shared_part(key_sums, task, head, warp_key, part * kKeyTiles);
  store_rows(key_sums, keys, warp_row, part * kKeyTiles,
             head.target(task.d_key_nope, shape.nope_dim), first_key, count);
  store_rows(value_sums, values, warp_row, part * kValueTiles,
             head.target(task.d_value, shape.value_dim), first_key, count);
}

// d_key_rope[token, :] = the partial sums of all heads, in their order. A thread has a vector.
constexpr int kSumThreads = 128;
__global__ __launch_bounds__(kSumThreads) void sum_heads(View<Bf16> d_key_rope,
                                                         const float* partials, int64_t tokens,
                                                         int64_t heads, int64_t width) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x) * kVector;
  if (at >= tokens * width) return;
  float sums[kVector] = {};
  for (int64_t head = 0; head < heads; ++head) {
    float values[kVector];
    load_floats(partials + head * tokens * width + at, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[i] += values[i];
  }
  put(d_key_rope.data + at / width * d_key_rope.stride + at % width, pack<Bf16>(sums));
}

}  // namespace

void attention_gradient(Stream& stream, const AttentionGradient& gradient) {
  const AttentionShape& shape = gradient.shape;
  const int64_t rows = shape.tokens() * shape.heads;
  if (rows == 0) return;
  const auto dot_blocks = static_cast<unsigned>(ceil_div(rows * kDeltaLanes, kDeltaThreads));
  launch(stream, "attention_gradient", dot_blocks, kDeltaThreads, 0, output_dots, gradient, rows);
  for_head_sizes(shape, [&](auto query, auto value) {
    using P = Plan<query(), value()>;
    const int64_t tiles = ceil_div(shape.seq_length, P::kOwnRows);
    const auto blocks = static_cast<unsigned>(tiles * shape.batch * shape.heads);
    launch(stream, "attention_gradient", blocks * P::kParts, P::kThreads, P::kSharedBytesWithStats,
           key_value_gradients<query(), value()>, gradient, static_cast<int>(tiles));
    launch(stream, "attention_gradient", blocks, P::kThreads, P::kSharedBytes,
           query_gradients<query(), value()>, gradient, static_cast<int>(tiles));
  });
  if (shape.rope_dim == 0) return;
  const int64_t vectors = shape.tokens() * shape.rope_dim / kVector;
  launch(stream, "attention_gradient", static_cast<unsigned>(ceil_div(vectors, kSumThreads)),
         kSumThreads, 0, sum_heads, gradient.d_key_rope,
         gradient.workspace + attention_delta_floats(shape), shape.tokens(), shape.heads,
         shape.rope_dim);
}

}  // namespace penstock::cuda
