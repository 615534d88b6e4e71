#include "kernels/bench/operation_bench.h"

#include <fmt/format.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "comm/base/random.h"
#include "kernels/arena.h"
#include "kernels/bench/measure.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/reference/reference_kernels.h"

namespace penstock::bench {
namespace {

constexpr int64_t kTokens = 1024, kSequence = 256, kWidth = 256, kHeads = 8, kVocab = 4096;
constexpr int64_t kCount = 1 << 20;
constexpr AttentionShape kAttention = {1, kSequence, kHeads, 32, 16, 32};
constexpr RouterShape kRouter = {kTokens, 64, 8, 4, 6, true, 2.5F};

// Buffers of one micro-batch, shared by all operations.
struct Buffers {
  Buffers() : arena("operation bench", 256 << 20) {
    a = fill(kTokens * kVocab, 1);
    b = fill(kTokens * kVocab, 2);
    c = fill(kTokens * kVocab, 3);
    d = fill(kTokens * kVocab, 4);
    weight = fill(kVocab, 5);
    rows = fill(kTokens * 64, 6);
    cosine = arena.floats(kSequence * 8);
    sine = arena.floats(kSequence * 8);
    make_rope_tables(kSequence, 16, 10000.0, cosine, sine);
    index = arena.int32s(kTokens);
    chosen = arena.int32s(kTokens * kRouter.topk);
    counts = arena.int64s(kRouter.experts);
    Random random(8, 0);
    for (int64_t i = 0; i < kTokens; ++i) {
      index[i] = static_cast<int32_t>(random.below(kTokens));
    }
    workspace = arena.floats(make_cpu_kernels()->attention_workspace_floats(kAttention));
  }
  float* fill(int64_t count, uint64_t seed) {
    float* const to = arena.floats(count);
    Random random(seed, 0);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(random.uniform());
    return to;
  }

  Arena arena;
  float *a, *b, *c, *d, *weight, *rows, *cosine, *sine, *workspace;
  int32_t* index;   // of rows, below kTokens
  int32_t* chosen;  // by the router
  int64_t* counts;
};

void rms_norm(Buffers& x, Kernels& k) {
  k.rms_norm(kTokens, kWidth, {x.a, kWidth}, x.weight, 1e-6F, {x.b, kWidth}, x.rows);
}
void rms_norm_backward(Buffers& x, Kernels& k) {
  k.rms_norm_backward(kTokens, kWidth, {x.a, kWidth}, x.weight, x.rows, {x.b, kWidth},
                      Store::kOverwrite, {x.c, kWidth}, x.weight + kWidth);
}
void rope(Buffers& x, Kernels& k) {
  const Heads slice = {x.a + 32, kHeads * 48, 48};
  k.rope(kTokens, kSequence, kHeads, 16, x.cosine, x.sine, false, slice);
}
void swiglu(Buffers& x, Kernels& k) {
  k.swiglu(kTokens, kWidth, {x.a, 2 * kWidth}, {x.a + kWidth, 2 * kWidth}, {x.b, kWidth});
}
void swiglu_backward(Buffers& x, Kernels& k) {
  k.swiglu_backward(kTokens, kWidth, {x.a, 2 * kWidth}, {x.a + kWidth, 2 * kWidth}, {x.b, kWidth},
                    {x.c, 2 * kWidth}, {x.c + kWidth, 2 * kWidth});
}
void router(Buffers& x, Kernels& k) {
  k.router(kRouter, {x.a, 64}, x.weight, x.b, x.chosen, x.c, x.counts);
}
void cross_entropy(Buffers& x, Kernels& k) {
  k.cross_entropy(kTokens, kVocab, {x.a, kVocab}, x.index, 0.1F, x.rows, {x.b, kVocab});
}

constexpr int64_t kQueryRow = kHeads * 48, kValueRow = kHeads * 64;

AttentionInputs attention_inputs(Buffers& x) {
  return {{x.a, kQueryRow, 48}, {x.b, kValueRow, 64}, {x.rows, 16}, {x.b + 32, kValueRow, 64}};
}
void attention(Buffers& x, Kernels& k) {
  k.attention(kAttention, 0.144F, attention_inputs(x), {x.c, kHeads * 32, 32}, x.d, x.workspace);
}
void attention_backward(Buffers& x, Kernels& k) {
  float* const d_query = x.d + kSequence * kHeads;  // after log_sum_exp
  float* const d_value = d_query + kSequence * kQueryRow;
  float* const d_rope = d_value + kSequence * kValueRow;
  const ConstHeads out = {x.c, kHeads * 32, 32};
  k.attention_backward(kAttention, 0.144F, attention_inputs(x), out, x.d, out,
                       {{d_query, kQueryRow, 48},
                        {d_value, kValueRow, 64},
                        {d_rope, 16},
                        {d_value + 32, kValueRow, 64}},
                       x.workspace);
}

void gather_rows(Buffers& x, Kernels& k) {
  k.gather_rows(kTokens, kWidth, kTokens, {x.a, kWidth}, x.index, nullptr, {x.b, kWidth});
}
void scatter_add_rows(Buffers& x, Kernels& k) {
  k.scatter_add_rows(kTokens, kWidth, kTokens, {x.a, kWidth}, x.index, x.rows, {x.b, kWidth});
}
void add(Buffers& x, Kernels& k) {
  k.add(kCount, x.a, x.b, x.c);
}
void sum_of_squares(Buffers& x, Kernels& k) {
  x.rows[0] = static_cast<float>(k.sum_of_squares(kCount, x.a));
}
void adamw(Buffers& x, Kernels& k) {
  k.adamw(kCount, {.lr = 1e-4F}, x.a, {x.b, x.c, x.d}, {x.b, x.c, x.d});
}

// `floats` is what the operation must read and write at least; `operations` its floating-point work
// where that is the better measure (0: report GB/s).
struct Operation {
  const char* name;
  int64_t floats;
  int64_t operations;
  void (*run)(Buffers&, Kernels&);
};

constexpr int64_t kRowFloats = kTokens * kWidth;
constexpr int64_t kScores = kSequence * (kSequence + 1) / 2 * kHeads;  // what causality leaves
constexpr Operation kOperations[] = {
    {"rms_norm", 2 * kRowFloats, 0, rms_norm},
    {"rms_norm_backward", 3 * kRowFloats, 0, rms_norm_backward},
    {"rope", 2 * kTokens* kHeads * 16, 0, rope},
    {"swiglu", 3 * kRowFloats, 0, swiglu},
    {"swiglu_backward", 5 * kRowFloats, 0, swiglu_backward},
    {"router", 2 * kTokens * 64, 0, router},
    {"cross_entropy", 2 * kTokens* kVocab, 0, cross_entropy},
    {"attention", 0, kScores * 2 * (48 + 32), attention},
    {"attention_backward", 0, kScores * 2 * (3 * 48 + 2 * 32), attention_backward},
    {"gather_rows", 2 * kRowFloats, 0, gather_rows},
    {"scatter_add_rows", 3 * kRowFloats, 0, scatter_add_rows},
    {"add", 3 * kCount, 0, add},
    {"sum_of_squares", kCount, 0, sum_of_squares},
    {"adamw", 7 * kCount, 0, adamw},
};

}  // namespace

void run_operation_bench(int round_count) {
  Buffers x;
  const auto cpu = make_cpu_kernels();
  const auto reference = make_reference_kernels();
  const Candidate copy = {
      "copy", [&x] { std::memcpy(x.d, x.c, static_cast<size_t>(kCount) * sizeof(float)); }};
  const double copy_seconds = alternate({copy}, round_count, 0.005)[0].seconds;
  fmt::print("other operations, one thread; peak {:.1f} GFLOP/s, copying memory {:.1f} GB/s\n",
             peak_gflops(), 8e-9 * kCount / copy_seconds);
  fmt::print("{:<20} {:>10} {:>16} {:>20}\n", "operation", "us", "rate", "over the reference");
  for (const Operation& operation : kOperations) {
    const std::vector<Measured> measured =
        alternate({{"cpu", [&] { operation.run(x, *cpu); }},
                   {"reference", [&] { operation.run(x, *reference); }}},
                  round_count, 0.002);
    const double seconds = measured[0].seconds;
    const double giga = 1e-9 / seconds;
    const std::string rate =
        operation.operations > 0
            ? fmt::format("{:.1f} GFLOP/s", giga * static_cast<double>(operation.operations))
            : fmt::format("{:.1f} GB/s", 4 * giga * static_cast<double>(operation.floats));
    fmt::print("{:<20} {:>10.1f} {:>16} {:>19.1f}x\n", operation.name, seconds * 1e6, rate,
               1 / measured[1].speed_ratio);
    std::fflush(stdout);
  }
}

}  // namespace penstock::bench
