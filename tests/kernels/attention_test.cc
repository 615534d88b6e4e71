#include "kernels/reference/attention_reference.h"

#include <gtest/gtest.h>
// After gtest, whose macros it uses.
#include <rapidcheck/gtest.h>

#include "tests/kernels/support.h"

namespace penstock {
namespace {

// One projection's row as the model lays it out: query [heads, nope + rope]; key and value together
// [heads, nope + value]; the rope key as the tail of [latent | rope].
struct Buffers {
  explicit Buffers(const AttentionShape& shape)
      : query(random_values(shape.tokens() * shape.heads * shape.query_dim(), 1)),
        key_value(
            random_values(shape.tokens() * shape.heads * (shape.nope_dim + shape.value_dim), 2)),
        latent_rope(random_values(shape.tokens() * (kLatent + shape.rope_dim), 3)),
        d_out(random_values(shape.tokens() * shape.heads * shape.value_dim, 4)) {}

  static constexpr int64_t kLatent = 3;
  std::vector<float> query, key_value, latent_rope, d_out;
};

struct AttentionResult {
  std::vector<float> out, log_sum_exp, d_query, d_key_value, d_latent_rope;
  bool operator==(const AttentionResult&) const = default;
};

AttentionResult run(Kernels& kernels, const AttentionShape& shape, const Buffers& b, float scale) {
  const int64_t kv_dim = shape.nope_dim + shape.value_dim;
  const int64_t kv_row = shape.heads * kv_dim;
  const int64_t rope_row = Buffers::kLatent + shape.rope_dim;
  const AttentionInputs in = {
      .query = {b.query.data(), shape.heads * shape.query_dim(), shape.query_dim()},
      .key_nope = {b.key_value.data(), kv_row, kv_dim},
      .key_rope = {b.latent_rope.data() + Buffers::kLatent, rope_row},
      .value = {b.key_value.data() + shape.nope_dim, kv_row, kv_dim}};
  AttentionResult r;
  r.out.resize(b.d_out.size());
  r.log_sum_exp.resize(static_cast<size_t>(shape.tokens() * shape.heads));
  r.d_query.resize(b.query.size());
  r.d_key_value.resize(b.key_value.size());
  r.d_latent_rope.resize(b.latent_rope.size(), -1.0F);
  std::vector<float> workspace(static_cast<size_t>(kernels.attention_workspace_floats(shape)),
                               std::nanf(""));  // stale scratch must never show
  const Heads out = {r.out.data(), shape.heads * shape.value_dim, shape.value_dim};
  kernels.attention(shape, scale, in, out, r.log_sum_exp.data(), workspace.data());
  kernels.attention_backward(
      shape, scale, in, out, r.log_sum_exp.data(),
      {b.d_out.data(), shape.heads * shape.value_dim, shape.value_dim},
      {.query = {r.d_query.data(), shape.heads * shape.query_dim(), shape.query_dim()},
       .key_nope = {r.d_key_value.data(), kv_row, kv_dim},
       .key_rope = {r.d_latent_rope.data() + Buffers::kLatent, rope_row},
       .value = {r.d_key_value.data() + shape.nope_dim, kv_row, kv_dim}},
      workspace.data());
  return r;
}

void expect_agreement(const AttentionResult& a, const AttentionResult& b, const std::string& what) {
  expect_close(a.out, b.out, 2e-5, what + " out");
  expect_close(a.log_sum_exp, b.log_sum_exp, 1e-5, what + " log_sum_exp");
  expect_close(a.d_query, b.d_query, 1e-4, what + " d_query");
  expect_close(a.d_key_value, b.d_key_value, 1e-4, what + " d_key_value");
  expect_close(a.d_latent_rope, b.d_latent_rope, 1e-4, what + " d_latent_rope");
}

TEST(AttentionTest, CpuAgreesWithReferenceAcrossBlockEdgesOnEveryInstructionSet) {
  const auto reference = make_reference_kernels();
  on_each_instruction_set([&](const std::string& name) {
    const auto cpu = make_cpu_kernels();
    for (const int64_t seq_length : {1, 2, 47, 48, 49, 130}) {
      const AttentionShape shape = {2, seq_length, 2, 8, 6, 12};
      const Buffers buffers(shape);
      expect_agreement(run(*cpu, shape, buffers, 0.3F), run(*reference, shape, buffers, 0.3F),
                       name + " T=" + std::to_string(seq_length));
    }
  });
}

RC_GTEST_PROP(AttentionTest, CpuAgreesWithReferenceOnRandomShapes, ()) {
  static const auto reference = make_reference_kernels();
  static const auto cpu = make_cpu_kernels();
  const auto pick = [](int64_t low, int64_t high) { return *rc::gen::inRange(low, high); };
  AttentionShape shape = {pick(0, 3),  pick(1, 90),     pick(1, 4),
                          pick(0, 20), pick(0, 10) * 2, pick(1, 20)};
  if (shape.query_dim() == 0) shape.nope_dim = 1;
  const Buffers buffers(shape);
  expect_agreement(run(*cpu, shape, buffers, 0.2F), run(*reference, shape, buffers, 0.2F), "");
  RC_ASSERT(!::testing::Test::HasFatalFailure());
}

TEST(AttentionTest, ATokenNeverSeesALaterTokenOrAnotherSequence) {
  const auto cpu = make_cpu_kernels();
  const AttentionShape shape = {2, 70, 2, 8, 4, 8};
  Buffers buffers(shape);
  const AttentionResult before = run(*cpu, shape, buffers, 0.3F);
  constexpr int64_t kChanged = 66;  // a token of the first sequence
  const int64_t kv_row = shape.heads * (shape.nope_dim + shape.value_dim);
  for (int64_t i = 0; i < kv_row; ++i) buffers.key_value[kChanged * kv_row + i] += 1.0F;
  const AttentionResult after = run(*cpu, shape, buffers, 0.3F);
  const int64_t out_row = shape.heads * shape.value_dim;
  for (int64_t token = 0; token < shape.tokens(); ++token) {
    const auto first = static_cast<size_t>(token * out_row);
    const bool same = std::equal(before.out.begin() + first, before.out.begin() + first + out_row,
                                 after.out.begin() + first);
    EXPECT_EQ(same, token < kChanged || token >= shape.seq_length) << token;
  }
}

TEST(AttentionTest, LargeScoresDoNotOverflow) {
  const auto cpu = make_cpu_kernels();
  const AttentionShape shape = {1, 20, 1, 8, 0, 4};
  const AttentionResult r = run(*cpu, shape, Buffers(shape), 1000.0F);
  for (const float v : r.out) ASSERT_TRUE(std::isfinite(v));
  for (const float v : r.d_query) ASSERT_TRUE(std::isfinite(v));
}

TEST(AttentionTest, NanInAValueReachesTheTokensThatSeeIt) {
  const auto cpu = make_cpu_kernels();
  const AttentionShape shape = {1, 6, 1, 4, 0, 4};
  Buffers buffers(shape);
  buffers.query[3 * 4] = std::nanf("");
  const AttentionResult r = run(*cpu, shape, buffers, 0.5F);
  for (int64_t token = 0; token < 6; ++token) {
    EXPECT_EQ(std::isnan(r.out[static_cast<size_t>(token * 4)]), token == 3) << token;
  }
}

TEST(AttentionTest, WorkspaceGrowsWithTheSequenceNotWithBatchOrHeads) {
  const auto cpu = make_cpu_kernels();
  const auto floats = [&](int64_t batch, int64_t seq_length, int64_t heads) {
    return cpu->attention_workspace_floats({batch, seq_length, heads, 32, 16, 32});
  };
  EXPECT_EQ(floats(1, 256, 1), floats(9, 256, 8));
  EXPECT_LE(floats(1, 4096, 1), 2 * floats(1, 2048, 1));
}

// ---- gradients ---------------------------------------------------------------------------------

using Doubles = std::vector<double>;

struct Problem {
  AttentionShape shape = {2, 5, 2, 3, 2, 4};
  Doubles query = random_values<double>(shape.tokens() * shape.heads * shape.query_dim(), 1);
  Doubles key_nope = random_values<double>(shape.tokens() * shape.heads * shape.nope_dim, 2);
  Doubles key_rope = random_values<double>(shape.tokens() * shape.rope_dim, 3);
  Doubles value = random_values<double>(shape.tokens() * shape.heads * shape.value_dim, 4);
  Doubles d_out = random_values<double>(value.size(), 5);

  template <typename T>
  reference::HeadsView<T> heads(T* data, int64_t dim) const {
    return {data, shape.heads * dim, dim};
  }
  reference::AttentionViews<double> views() const {
    return {heads(query.data(), shape.query_dim()),
            heads(key_nope.data(), shape.nope_dim),
            {key_rope.data(), shape.rope_dim},
            heads(value.data(), shape.value_dim)};
  }
  Doubles forward(Doubles* log_sum_exp) const {
    Doubles out(value.size());
    log_sum_exp->resize(static_cast<size_t>(shape.tokens() * shape.heads));
    reference::attention<double>(shape, 0.7, views(), heads(out.data(), shape.value_dim),
                                 log_sum_exp->data());
    return out;
  }
};

TEST(AttentionTest, GradientsAreTheFiniteDifferences) {
  const Problem problem;
  const AttentionShape& shape = problem.shape;
  Doubles log_sum_exp;
  const Doubles out = problem.forward(&log_sum_exp);
  Doubles d_query(problem.query.size()), d_key_nope(problem.key_nope.size());
  Doubles d_key_rope(problem.key_rope.size()), d_value(problem.value.size());
  reference::attention_backward<double>(
      shape, 0.7, problem.views(), problem.heads(out.data(), shape.value_dim), log_sum_exp.data(),
      problem.heads(problem.d_out.data(), shape.value_dim),
      {problem.heads(d_query.data(), shape.query_dim()),
       problem.heads(d_key_nope.data(), shape.nope_dim),
       {d_key_rope.data(), shape.rope_dim},
       problem.heads(d_value.data(), shape.value_dim)});
  const auto loss_with = [&](Doubles Problem::*field) {
    return [&problem, field](const Doubles& at) {
      Problem moved = problem;
      moved.*field = at;
      Doubles unused;
      return dot(moved.forward(&unused), problem.d_out);
    };
  };
  expect_gradient(problem.query, d_query, loss_with(&Problem::query), "query");
  expect_gradient(problem.key_nope, d_key_nope, loss_with(&Problem::key_nope), "key_nope");
  expect_gradient(problem.key_rope, d_key_rope, loss_with(&Problem::key_rope), "key_rope");
  expect_gradient(problem.value, d_value, loss_with(&Problem::value), "value");
}

}  // namespace
}  // namespace penstock
