// The operations a model is made of, behind one interface with several backends: reference (plain
// loops, the definition of right), cpu (vectorised) and later cuda.
//
// Conventions
// - fp32, row-major. A matrix is {data, stride}: element (i, j) is data[i * stride + j]; the stride
//   is at least the number of columns, in floats. A wider one lets an operation work on a slice of
//   rows.
// - A pointer is to the backend's own memory. For reference and cpu that is host memory; 64-byte
//   aligned rows are fastest, nothing requires them.
// - Outputs do not overlap inputs unless the operation's comment says they may.
// - Scratch comes from the caller (`workspace`) or was allocated at construction: no call
//   allocates. (The reference does, in attention and the router; it is for tests.)
// - Same backend, same inputs: same bits, wherever the buffers lie. Sums run in a fixed order that
//   depends on shapes alone. Backends differ from each other by rounding.
// - Row and group counts may be 0; widths may not. NaN and infinity pass through; none is dropped.
// - A broken REQUIRES is a PENSTOCK_CHECK. Ids and offsets are checked here, because one out of
//   range would be a wild write.
//
// Thread-safety: one thread at a time per instance; different instances are independent.
#pragma once

#include <cstdint>
#include <string_view>

namespace penstock {

struct ConstMatrix {
  const float* data = nullptr;
  int64_t stride = 0;
};
struct Matrix {
  float* data = nullptr;
  int64_t stride = 0;
  operator ConstMatrix() const { return {data, stride}; }
};

// Whether an operation replaces its output or adds to it.
enum class Store : uint8_t { kOverwrite, kAccumulate };

// op(X) is X, or its transpose.
enum class Transpose : uint8_t { kNo, kYes };

// One dimension-by-head view of a [batch * seq_length, heads, dim] tensor inside wider rows:
// element (token, head, d) is data[token * token_stride + head * head_stride + d].
struct ConstHeads {
  const float* data = nullptr;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};
struct Heads {
  float* data = nullptr;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
  operator ConstHeads() const { return {data, token_stride, head_stride}; }
};

// Multi-head attention whose key is [nope part of its own head | rope part shared by all heads], as
// in multi-head latent attention. rope_dim 0 gives ordinary attention.
// token = sequence * seq_length + position.
struct AttentionShape {
  int64_t batch = 0;       // sequences
  int64_t seq_length = 0;  // tokens of each; one sees itself and those before it in its sequence
  int64_t heads = 0;
  int64_t nope_dim = 0;
  int64_t rope_dim = 0;
  int64_t value_dim = 0;
  int64_t query_dim() const { return nope_dim + rope_dim; }
  int64_t tokens() const { return batch * seq_length; }
};
struct AttentionInputs {
  ConstHeads query;      // [tokens, heads, nope_dim + rope_dim], rotated
  ConstHeads key_nope;   // [tokens, heads, nope_dim]
  ConstMatrix key_rope;  // [tokens, rope_dim], rotated; unused when rope_dim is 0
  ConstHeads value;      // [tokens, heads, value_dim]
};
struct AttentionGradients {  // same shapes as the inputs; all overwritten
  Heads query;
  Heads key_nope;
  Matrix key_rope;  // summed over heads
  Heads value;
};

struct RouterShape {
  int64_t tokens = 0;
  int64_t experts = 0;
  int64_t groups = 1;        // divides experts; experts / groups >= 2 unless groups == 1
  int64_t topk_groups = 1;   // groups kept per token; <= groups
  int64_t topk = 1;          // experts chosen per token; <= topk_groups * experts / groups
  bool normalise = true;     // norm_topk_prob: divide the chosen scores by their sum + 1e-20
  float scaling_factor = 1;  // routed_scaling_factor
};

// What the values of a row are rounded to. The tiled formats (DeepSeek-V3 report §3.3) give every
// 128 neighbours of a row, and what is left at its end, a scale of their own:
//   value = scale * code(x / scale),  scale = max(|x| of the tile, 1e-4) / (largest code)
// and round that scale up to a power of two where the name says so, so that rounding again changes
// nothing. Codes: comm/base/minifloat.h. A NaN or an infinity makes its whole tile NaN.
enum class RowFormat : uint8_t { kFp32, kBf16, kE4m3, kE4m3PowerOfTwo, kE5m6PowerOfTwo };
inline constexpr int64_t kTileWidth = 128;

// How a backend on the host adds up the products of one interval: P_b in "FP8 linear layers" below.
enum class Fp8Accumulator : uint8_t {
  kFp32,  // one chain of fused multiply-adds
  // A model of Hopper's tensor core: 32 products are shifted to the exponent of their largest and
  // keep 13 fraction bits, the rest falling away downwards (sign-fill); their sum is added in fp32
  // to what was there before, which is then cut to 13 fraction bits ("FP22"). Sources: DeepSeek-V3
  // report, section 3.5.2; arXiv 2505.09343, section 3; SageAttention2 (arXiv 2411.10958) for the
  // cut. NVIDIA documents none of it, and it is not checked against a device.
  kHopper,
};

// Linear layers on rows grouped by expert: group g has rows [offsets[g], offsets[g+1]) and a weight
// [out, in], contiguous, at weight + g * group_stride. An ordinary layer is one group.
struct LinearShape {
  int64_t out = 0;
  int64_t in = 0;
  int64_t group_count = 0;
  const int64_t* offsets = nullptr;  // [group_count + 1], non-decreasing; the first need not be 0
  int64_t group_stride = 0;
};

// What swiglu_backward() may compute besides its gradients; absent where null. h = silu(gate) * up.
struct SwigluWith {
  const float* weights = nullptr;  // w: [rows], of the rows; null: all 1
  Matrix y = {};                   // [rows, width]: w[i] * h[i, :]
  float* dots = nullptr;           // [rows]: dy[i, :] . h[i, :], the gradient of w
};

// One AdamW update (Loshchilov & Hutter 2019, Algorithm 2):
//   g = gradient_scale * gradient
//   m' = beta1 m + (1 - beta1) g;  v' = beta2 v + (1 - beta2) g^2
//   p' = p - lr * (m' / bias_correction1 / (sqrt(v' / bias_correction2) + eps) + weight_decay * p)
struct AdamwStep {
  float lr = 0;
  float beta1 = 0.9F;
  float beta2 = 0.95F;
  float eps = 1e-8F;
  float weight_decay = 0;
  float bias_correction1 = 1;  // 1 - beta1^t, t = 1 at the first update
  float bias_correction2 = 1;  // 1 - beta2^t
  float gradient_scale = 1;    // clipping and averaging, in one factor
};
struct ConstAdamwState {
  const float* parameter = nullptr;
  const float* moment1 = nullptr;
  const float* moment2 = nullptr;
};
struct AdamwState {
  float* parameter = nullptr;
  float* moment1 = nullptr;
  float* moment2 = nullptr;
};

class Kernels {
 public:
  virtual ~Kernels() = default;

  // "reference", "cpu".
  virtual std::string_view name() const = 0;

  // ---- Matrix products ------------------------------------------------------------------------
  // C[m, n] (= or +=) alpha * op(A)[m, k] * op(B)[k, n]. A is stored [m, k], or [k, m] when
  // transposed; B [k, n], or [n, k]. k == 0 leaves zeros (kOverwrite) or C as it was (kAccumulate).
  // A linear layer y = x W^T: forward (x, No)(W, Yes); input gradient (dy, No)(W, No); weight
  // gradient (dy, Yes)(x, No) with kAccumulate.
  virtual void matmul(int64_t m, int64_t n, int64_t k, ConstMatrix a, Transpose transpose_a,
                      ConstMatrix b, Transpose transpose_b, Store store, Matrix c,
                      float alpha = 1.0F) = 0;

  // Rows grouped by expert: for each group g, with rows [offsets[g], offsets[g+1]) of A and C,
  //   C_g[rows, n] (= or +=) A_g[rows, k] * op(B_g)[k, n],   B_g = b.data + g * group_stride.
  // Forward of an expert layer with weight [n, k]: transpose_b = kYes. Input gradient: kNo with n
  // and k exchanged. `offsets` has group_count + 1 non-decreasing entries, the first
  // need not be 0.
  virtual void grouped_matmul(int64_t group_count, const int64_t* offsets, int64_t n, int64_t k,
                              ConstMatrix a, ConstMatrix b, int64_t group_stride,
                              Transpose transpose_b, Store store, Matrix c) = 0;

  // Weight gradients, k ragged: for each group g, with its rows of A [., m] and B [., n],
  //   C_g[m, n] += A_g^T B_g,   C_g = c.data + g * group_stride.
  // A group without rows leaves its C_g untouched. A = dy and B = x give dW[n_out, n_in].
  virtual void grouped_matmul_ragged_k(int64_t group_count, const int64_t* offsets, int64_t m,
                                       int64_t n, ConstMatrix a, ConstMatrix b, Matrix c,
                                       int64_t group_stride) = 0;

  // ---- FP8 linear layers ----------------------------------------------------------------------
  // What DeepSeek-V3 runs on tensor cores (DeepSeek-V3 report §3.3); on the host the same numbers
  // are computed in fp32. Operands are rounded to E4M3 with a scale per tile, the products of 128
  // codes along the summed dimension (the last interval may be shorter) are added up, and each such
  // interval b is promoted:
  //   sum[i, j] = fma(P_b[i, j], scale_a[i, b] * scale_b[b, j], sum[i, j]),  from 0, in rising b
  //   P_b[i, j] = sum of code_a[i, p] * code_b[p, j] over p of b, in rising p from 0, as the
  //               backend's Fp8Accumulator adds; by default one chain of fp32 fused multiply-adds
  // Exact, as on the device: codes, scales, intervals, promotion. A model of it: P_b. A product of
  // two codes has 8 significant bits, so it is exact; the sum of 128 in exact arithmetic would need
  // 43 bits (multiples of 2^-18 below 2^25). The chain's error is at most
  // 127 * 2^-24 / (1 - 127 * 2^-24) * sum |products| (Higham 2002, section 3.1, one rounding less
  // as the first product is exact). Hopper keeps 13 fraction bits (DeepSeek-V3 report §3.3.2), a
  // thousand times fewer. No bit of a row depends on the other rows of its batch, but in weight
  // gradients.
  //
  // A weight has one scale per block of 128 x 128, the last ones smaller. `workspace`: as many
  // floats as fp8_workspace_floats() says.
  virtual int64_t fp8_workspace_floats(int64_t out, int64_t in) const = 0;

  // y[i, :] (= or +=) bf16(x[i, :] W^T): the device writes bf16. `x_format`: kE4m3 or
  // kE4m3PowerOfTwo, of x.
  virtual void fp8_linear(const LinearShape& shape, RowFormat x_format, ConstMatrix x,
                          const float* weight, Store store, Matrix y, float* workspace) = 0;
  // dx[i, :] (= or +=) bf16(dy[i, :] W), with the same codes of W.
  virtual void fp8_linear_input_gradient(const LinearShape& shape, RowFormat dy_format,
                                         ConstMatrix dy, const float* weight, Store store,
                                         Matrix dx, float* workspace) = 0;
  // dW_g += dy_g^T x_g, the sum over a group's rows in fp32. dy and x are first rounded by rows to
  // the format they were kept in (kFp32: not at all) and then by columns to E4M3: one scale per
  // column for every 128 rows of the group from its first; a power of two where the kept format has
  // one.
  virtual void fp8_linear_weight_gradient(const LinearShape& shape, RowFormat dy_format,
                                          ConstMatrix dy, RowFormat x_format, ConstMatrix x,
                                          float* dweight, float* workspace) = 0;

  // y = x rounded to `format`, [rows, width]. y may be x.
  virtual void round_rows(RowFormat format, int64_t rows, int64_t width, ConstMatrix x,
                          Matrix y) = 0;

  // ---- Normalisation and position -------------------------------------------------------------
  // y[i, :] = x[i, :] * inv_rms[i] * weight,  inv_rms[i] = 1 / sqrt(mean(x[i, :]^2) + eps).
  // x, y: [rows, width]; inv_rms: [rows], kept for the backward. y may be x.
  virtual void rms_norm(int64_t rows, int64_t width, ConstMatrix x, const float* weight, float eps,
                        Matrix y, float* inv_rms) = 0;

  // Both gradients of rms_norm; either output may be absent (null data), so that the weight's part
  // can run later than the input's.
  //   dx[i, :] (= or +=) inv_rms[i] * (weight * dy[i, :] - xhat[i, :] * mean(xhat * weight * dy))
  //   dweight += sum_i dy[i, :] * xhat[i, :],   xhat = x * inv_rms
  // x, dy, dx: [rows, width]. dx may be dy when store is kOverwrite.
  virtual void rms_norm_backward(int64_t rows, int64_t width, ConstMatrix x, const float* weight,
                                 const float* inv_rms, ConstMatrix dy, Store store, Matrix dx,
                                 float* dweight) = 0;

  // Rotates, in place, the pairs (x[2i], x[2i+1]) of every head by the angle of the token's
  // position: (a cos - b sin, b cos + a sin), or by minus that angle (inverse: this is the
  // backward). Position = token % seq_length. x: [tokens, heads, dim], dim even; for the shared
  // key, heads = 1. cosine, sine: [>= seq_length, dim / 2] from make_rope_tables. Scores equal
  // those of Hugging Face's interleaved form, which also permutes q and k, both alike.
  virtual void rope(int64_t tokens, int64_t seq_length, int64_t heads, int64_t dim,
                    const float* cosine, const float* sine, bool inverse, Heads x) = 0;

  // ---- Attention ------------------------------------------------------------------------------
  // Floats of scratch that the two functions below need for this shape. Never grows with batch or
  // heads, and is linear in seq_length.
  virtual int64_t attention_workspace_floats(const AttentionShape& shape) const = 0;

  // out[token, head, :] = sum_j softmax_j(scale * query . key_j) value_j over the tokens j <= token
  // of the same sequence. log_sum_exp: [batch, heads, seq_length], of the scaled scores, kept for
  // backward. REQUIRES: scale > 0.
  virtual void attention(const AttentionShape& shape, float scale, const AttentionInputs& in,
                         Heads out, float* log_sum_exp, float* workspace) = 0;

  // Gradients of attention, scores recomputed block by block (Dao et al., FlashAttention-2,
  // Algorithm 2).
  virtual void attention_backward(const AttentionShape& shape, float scale,
                                  const AttentionInputs& in, ConstHeads out,
                                  const float* log_sum_exp, ConstHeads d_out,
                                  const AttentionGradients& gradients, float* workspace) = 0;

  // ---- Feed-forward ---------------------------------------------------------------------------
  // y = silu(gate) * up. All [rows, width]; gate and up may be the halves of one wider buffer.
  virtual void swiglu(int64_t rows, int64_t width, ConstMatrix gate, ConstMatrix up, Matrix y) = 0;

  // d_gate = g * up * silu'(gate), d_up = g * silu(gate), g[i, :] = w[i] * dy[i, :]. d_gate may be
  // gate and d_up may be up. With them, from the same pass, what `with` asks for.
  virtual void swiglu_backward(int64_t rows, int64_t width, ConstMatrix gate, ConstMatrix up,
                               ConstMatrix dy, Matrix d_gate, Matrix d_up,
                               const SwigluWith& with = {}) = 0;

  // ---- Router (DeepSeek-V3 "noaux_tc" gate) ---------------------------------------------------
  // scores = sigmoid(logits); choice = scores + bias (the bias only chooses, it never weighs).
  // A group's score is the sum of its two largest choices. The best topk_groups groups are kept;
  // no expert of the others is chosen, however low the kept ones' choices (as Hugging Face's
  // deepseek_v3 since 5.0 and DeepSeek's own; older versions of the former masked with 0.0). The
  // topk largest choices win. Ties go to the lowest index, for groups and for experts.
  //   weights = scores of the winners [/ (their sum + 1e-20)] * scaling_factor
  // logits: [tokens, experts]; bias: [experts]; scores: [tokens, experts] contiguous, kept for the
  // backward; expert_ids, weights: [tokens, topk], by falling choice; counts: [experts], tokens per
  // expert, overwritten. A NaN choice ranks above every number, so that it shows in the weights.
  virtual void router(const RouterShape& shape, ConstMatrix logits, const float* bias,
                      float* scores, int32_t* expert_ids, float* weights, int64_t* counts) = 0;

  // d_logits[tokens, experts], overwritten, from d_weights[tokens, topk]. The choice is not
  // differentiated; experts not chosen get 0.
  virtual void router_backward(const RouterShape& shape, const float* scores,
                               const int32_t* expert_ids, const float* d_weights,
                               Matrix d_logits) = 0;

  // ---- Loss -----------------------------------------------------------------------------------
  // losses[i] = log_sum_exp(logits[i, :]) - logits[i, targets[i]]
  // d_logits[i, :] = gradient_scale * (softmax(logits[i, :]) - onehot(targets[i]))
  // A row with targets[i] < 0 is ignored: loss and gradient 0. d_logits may be logits; null data
  // skips the gradient (evaluation). REQUIRES: targets[i] < vocab. A NaN logit makes its row's loss
  // NaN.
  virtual void cross_entropy(int64_t rows, int64_t vocab, ConstMatrix logits,
                             const int32_t* targets, float gradient_scale, float* losses,
                             Matrix d_logits) = 0;

  // ---- Rows -----------------------------------------------------------------------------------
  // y[i, :] = table[ids[i], :].  table: [vocab, width] contiguous. REQUIRES: 0 <= ids[i] < vocab.
  virtual void embedding(int64_t rows, int64_t vocab, int64_t width, const int32_t* ids,
                         const float* table, Matrix y) = 0;
  // d_table[ids[i], :] += dy[i, :], in the order of i.
  virtual void embedding_backward(int64_t rows, int64_t vocab, int64_t width, const int32_t* ids,
                                  ConstMatrix dy, float* d_table) = 0;

  // y[i, :] = w[i] * x[index[i], :]; weights null: w = 1. x has x_rows rows; REQUIRES 0 <= index[i]
  // < x_rows. Gathers tokens for experts, and (with weights) the gradient of scatter_add_rows.
  virtual void gather_rows(int64_t rows, int64_t width, int64_t x_rows, ConstMatrix x,
                           const int32_t* index, const float* weights, Matrix y) = 0;
  // y[index[i], :] += w[i] * x[i, :], in the order of i; weights null: w = 1. y has y_rows rows.
  virtual void scatter_add_rows(int64_t rows, int64_t width, int64_t y_rows, ConstMatrix x,
                                const int32_t* index, const float* weights, Matrix y) = 0;
  // y = x, [rows, width], between strides.
  virtual void copy_rows(int64_t rows, int64_t width, ConstMatrix x, Matrix y) = 0;
  // y += x, [rows, width], between strides.
  virtual void accumulate_rows(int64_t rows, int64_t width, ConstMatrix x, Matrix y) = 0;

  // ---- Vectors of `count` floats --------------------------------------------------------------
  // y = a + b; y may be a or b.
  virtual void add(int64_t count, const float* a, const float* b, float* y) = 0;
  // y += x
  virtual void accumulate(int64_t count, const float* x, float* y) = 0;
  // x *= factor
  virtual void scale(int64_t count, float factor, float* x) = 0;
  virtual void fill(int64_t count, float value, float* x) = 0;
  // Summed in double; the order depends on count alone.
  virtual double sum_of_squares(int64_t count, const float* x) = 0;

  // One pass over `count` parameters. `next` may be `previous` (in place) or other memory (the
  // other generation of double-buffered state).
  virtual void adamw(int64_t count, const AdamwStep& step, const float* gradient,
                     const ConstAdamwState& previous, const AdamwState& next) = 0;
};

// cosine[p, i] = cos(p * theta^(-2i / dim)), sine alike, computed in double: [positions, dim / 2]
// each, in host memory.
void make_rope_tables(int64_t positions, int64_t dim, double theta, float* cosine, float* sine);

}  // namespace penstock
