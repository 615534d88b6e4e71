// One training-like chain of every operation: its bits must not depend on the run, on where buffers
// lie, on what an instance computed before, or on the vector width of the host.
#include <cstring>

#include "kernels/arena.h"
#include "tests/kernels/support.h"

namespace penstock {
namespace {

constexpr int64_t kTokens = 70, kSequence = 35, kWidth = 48, kHeads = 2, kExperts = 6, kTopk = 2;
constexpr AttentionShape kAttention = {2, kSequence, kHeads, 16, 8, 24};

class Chain {
 public:
  explicit Chain(Kernels& kernels) : k_(kernels), arena_("chain", 64 << 20) {}

  // Everything computed, concatenated.
  std::vector<float> run() {
    const Arena::Mark mark = arena_.mark();
    result_.clear();
    normalise_and_project();
    attend();
    route_and_expand();
    finish();
    arena_.rewind(mark);
    return result_;
  }

 private:
  float* random(int64_t count, uint64_t seed) {
    float* const to = arena_.floats(count);
    const auto values = random_values(count, seed);
    std::copy(values.begin(), values.end(), to);
    return to;
  }
  void keep(const float* x, int64_t count) { result_.insert(result_.end(), x, x + count); }

  void normalise_and_project() {
    float* const x = random(kTokens * kWidth, 1);
    float* const weight = random(kWidth, 2);
    float* const inv_rms = arena_.floats(kTokens);
    normal_ = arena_.floats(kTokens * kWidth);
    k_.rms_norm(kTokens, kWidth, {x, kWidth}, weight, 1e-6F, {normal_, kWidth}, inv_rms);
    keep(normal_, kTokens * kWidth);
    float* const dx = arena_.floats(kTokens * kWidth);
    float* const dweight = random(kWidth, 13);
    k_.rms_norm_backward(kTokens, kWidth, {x, kWidth}, weight, inv_rms, {normal_, kWidth},
                         Store::kOverwrite, {dx, kWidth}, dweight);
    keep(dx, kTokens * kWidth);
    keep(dweight, kWidth);
  }

  void attend() {
    const int64_t dim = kAttention.query_dim();
    float* const q = random(kTokens * kHeads * dim, 3);
    float* const kv = random(kTokens * kHeads * 40, 4);
    float* const rope = random(kTokens * 8, 5);
    float* const cosine = arena_.floats(kSequence * 4);
    float* const sine = arena_.floats(kSequence * 4);
    make_rope_tables(kSequence, 8, 10000.0, cosine, sine);
    k_.rope(kTokens, kSequence, kHeads, 8, cosine, sine, false, {q + 16, kHeads * dim, dim});
    const AttentionInputs in = {{q, kHeads * dim, dim}, {kv, 80, 40}, {rope, 8}, {kv + 16, 80, 40}};
    float* const out = arena_.floats(kTokens * 48);
    float* const lse = arena_.floats(kTokens * kHeads);
    float* const workspace = arena_.floats(k_.attention_workspace_floats(kAttention));
    k_.attention(kAttention, 0.2F, in, {out, 48, 24}, lse, workspace);
    float* const d = arena_.floats(kTokens * (kHeads * dim + 80 + 8));
    float* const d_kv = d + kTokens * kHeads * dim;
    k_.attention_backward(
        kAttention, 0.2F, in, {out, 48, 24}, lse, {normal_, 48, 24},
        {{d, kHeads * dim, dim}, {d_kv, 80, 40}, {d_kv + kTokens * 80, 8}, {d_kv + 16, 80, 40}},
        workspace);
    keep(out, kTokens * 48);
    keep(d, kTokens * (kHeads * dim + 80 + 8));
  }

  void route_and_expand() {
    const RouterShape shape = {kTokens, kExperts, 3, 2, kTopk, true, 2.5F};
    float* const logits = random(kTokens * kExperts, 6);
    float* const bias = random(kExperts, 7);
    float* const scores = arena_.floats(kTokens * kExperts);
    float* const weights = arena_.floats(kTokens * kTopk);
    int32_t* const ids = arena_.int32s(kTokens * kTopk);
    int64_t* const counts = arena_.int64s(kExperts);
    k_.router(shape, {logits, kExperts}, bias, scores, ids, weights, counts);
    keep(weights, kTokens * kTopk);
    int64_t offsets[kExperts + 1] = {};
    for (int64_t e = 0; e < kExperts; ++e) offsets[e + 1] = offsets[e] + counts[e];
    const int64_t rows = kTokens * kTopk;
    float* const w = random(kExperts * 40 * kWidth, 8);
    float* const x = random(rows * kWidth, 9);
    float* const hidden = arena_.floats(rows * 40);
    k_.grouped_matmul(kExperts, offsets, 40, kWidth, {x, kWidth}, {w, kWidth}, 40 * kWidth,
                      Transpose::kYes, Store::kOverwrite, {hidden, 40});
    float* const active = arena_.floats(rows * 20);
    k_.swiglu(rows, 20, {hidden, 40}, {hidden + 20, 40}, {active, 20});
    k_.grouped_matmul_ragged_k(kExperts, offsets, 40, kWidth, {hidden, 40}, {x, kWidth},
                               {w, kWidth}, 40 * kWidth);
    keep(active, rows * 20);
    keep(w, kExperts * 40 * kWidth);
  }

  void finish() {
    float* const logits = random(kTokens * 259, 10);
    float* const losses = arena_.floats(kTokens);
    std::vector<int32_t> targets;
    for (int64_t t = 0; t < kTokens; ++t) targets.push_back(static_cast<int32_t>(t * 3));
    k_.cross_entropy(kTokens, 259, {logits, 259}, targets.data(), 0.1F, losses, {logits, 259});
    keep(losses, kTokens);
    keep(logits, kTokens * 259);
    const double squares = k_.sum_of_squares(kTokens * 259, logits);
    result_.push_back(static_cast<float>(squares));
    float* const parameter = random(kTokens * 259, 11);
    float* const moments = random(2 * kTokens * 259, 12);
    k_.fill(2 * kTokens * 259, 0.01F, moments);
    const AdamwState state = {parameter, moments, moments + kTokens * 259};
    k_.adamw(kTokens * 259, {.lr = 0.01F, .gradient_scale = static_cast<float>(1 / squares)},
             logits, {parameter, moments, moments + kTokens * 259}, state);
    keep(parameter, kTokens * 259);
  }

  Kernels& k_;
  Arena arena_;
  std::vector<float> result_;
  float* normal_ = nullptr;
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

TEST(DeterminismTest, TheSameInputsGiveTheSameBitsFromAnyInstanceAndMemory) {
  const auto first = make_cpu_kernels();
  const auto second = make_cpu_kernels();
  Chain chain(*first);
  Chain other(*second);
  const auto expected = chain.run();
  EXPECT_TRUE(same_bits(chain.run(), expected));
  EXPECT_TRUE(same_bits(other.run(), expected));
}

TEST(DeterminismTest, EveryVectorInstructionSetOfThisHostComputesTheSameBits) {
  const auto chosen = make_cpu_kernels();
  const auto expected = Chain(*chosen).run();
  on_each_instruction_set([&](const std::string& name) {
    if (name == "SCALAR") return;  // rounds products that the others fuse
    const auto cpu = make_cpu_kernels();
    EXPECT_TRUE(same_bits(Chain(*cpu).run(), expected)) << name << " differs";
  });
}

TEST(DeterminismTest, TheChainAgreesWithTheReference) {
  const auto cpu = make_cpu_kernels();
  const auto reference = make_reference_kernels();
  expect_close(Chain(*cpu).run(), Chain(*reference).run(), 2e-3);
}

}  // namespace
}  // namespace penstock
