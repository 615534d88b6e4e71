// The gate that chooses experts.
#include "kernels/cuda/router.h"

#include <cmath>

#include "kernels/reference/router_reference.h"
#include "tests/gpu/harness.h"

namespace penstock::gpu_test {
namespace {

struct Choices {
  std::vector<int32_t> ids;
  std::vector<double> weights;
  std::vector<int64_t> counts;
};

// From the scores that the device has, so that a rounding of these changes no choice.
Choices choose(const RouterShape& shape, const std::vector<float>& scores,
               const std::vector<float>& bias) {
  Choices result;
  result.counts.assign(static_cast<size_t>(shape.experts), 0);
  for (int64_t token = 0; token < shape.tokens; ++token) {
    const float* const row = scores.data() + token * shape.experts;
    std::vector<double> choices;
    for (int64_t e = 0; e < shape.experts; ++e) choices.push_back(row[e] + bias[e]);
    reference::drop_groups(shape, choices);
    const std::vector<int64_t> order = reference::ranked(choices);
    double sum = 0;
    for (int64_t i = 0; i < shape.topk; ++i) sum += row[order[i]];
    const double divisor = shape.normalise ? sum + 1e-20 : 1.0;
    for (int64_t i = 0; i < shape.topk; ++i) {
      result.ids.push_back(static_cast<int32_t>(order[i]));
      result.weights.push_back(row[order[i]] / divisor * shape.scaling_factor);
      ++result.counts[order[i]];
    }
  }
  return result;
}

void check_router(Run& run, const RouterShape& shape, const std::vector<float>& values,
                  const std::vector<float>& bias_values) {
  const int64_t experts = shape.experts;
  const int64_t chosen = shape.tokens * shape.topk;
  Data<float> logits(run, shape.tokens * experts), bias(run, experts);
  Data<float> scores(run, shape.tokens * experts), weights(run, chosen);
  Data<float> d_weights(run, chosen), d_logits(run, shape.tokens * experts);
  Data<int32_t> ids(run, chosen);
  Data<int64_t> counts(run, experts);
  logits.write(values);
  bias.write(bias_values);
  const cuda::Router call{shape,     logits.view(experts), bias.get(),  scores.get(),
                          ids.get(), weights.get(),        counts.get()};
  cuda::router(run.stream(), call);
  const std::vector<float> got = scores.read_exact(run);
  std::vector<double> want_scores, score_values(got.begin(), got.end());
  for (const float value : values) want_scores.push_back(1.0 / (1.0 + std::exp(-double{value})));
  run.compare("scores", score_values, want_scores, kFp32Tolerance);
  const Choices want = choose(shape, got, bias_values);
  run.expect(ids.read_exact(run) == want.ids, "ids");
  run.expect(counts.read_exact(run) == want.counts, "counts");
  run.compare("weights", weights.read(run), want.weights, kFp32Tolerance);

  const std::vector<double> g = d_weights.fill_random(run);
  std::vector<double> want_d(score_values.size());
  reference::router_backward<double>(shape, score_values.data(), want.ids.data(), g.data(),
                                     {want_d.data(), experts});
  const cuda::RouterGradient gradient{shape, scores.get(), ids.get(), d_weights.get(),
                                      d_logits.view(experts)};
  cuda::router_gradient(run.stream(), gradient);
  run.compare("d_logits", d_logits.read(run), want_d, kFp32Tolerance);
}

std::vector<float> random_floats(Run& run, int64_t count, double deviation) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = static_cast<float>(deviation * run.normal());
  return values;
}

void check_random(Run& run, RouterShape shape) {
  check_router(run, shape, random_floats(run, shape.tokens * shape.experts, 1.5),
               random_floats(run, shape.experts, 0.1));
}

}  // namespace

GPU_CASE(router_of_v3) {
  check_random(run, {1000, 256, 8, 4, 8, true, 2.5F});
}
GPU_CASE(router_of_other_shapes) {
  check_random(run, {33, 64, 1, 1, 6, false, 1.0F});
  check_random(run, {7, 512, 32, 3, 8, true, 1.0F});
  check_random(run, {5, 6, 3, 2, 4, true, 1.0F});
  check_random(run, {1, 1, 1, 1, 1, true, 1.0F});
  check_random(run, {0, 16, 1, 1, 2, true, 1.0F});
}
// The lowest index wins among equals, of experts and of groups.
GPU_CASE(router_of_ties) {
  const RouterShape shape{9, 32, 4, 2, 4, true, 1.0F};
  check_router(run, shape, std::vector<float>(9 * 32, 0.25F), std::vector<float>(32, 0.0F));
}

}  // namespace penstock::gpu_test
