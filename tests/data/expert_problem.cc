#include "tests/data/expert_problem.h"

#include <algorithm>
#include <numeric>

#include "comm/base/random.h"

namespace penstock {
namespace {

// A stand-in for an expert: linear, different for every expert, and not symmetric.
//   f_e(x)[i] = (1 + e/8) x[i] + x[i+1] / (e + 2)
float expert_value(int32_t expert, const float* x, int32_t i, int32_t hidden) {
  const float next = x[(i + 1) % hidden];
  return (1.0f + static_cast<float>(expert) / 8.0f) * x[i] + next / static_cast<float>(expert + 2);
}
// Its transpose.
float expert_transposed(int32_t expert, const float* d, int32_t i, int32_t hidden) {
  const float previous = d[(i + hidden - 1) % hidden];
  return (1.0f + static_cast<float>(expert) / 8.0f) * d[i] +
         previous / static_cast<float>(expert + 2);
}

void add_forward(int32_t expert, float weight, const float* x, float* y, int32_t hidden) {
  for (int32_t i = 0; i < hidden; ++i) y[i] += weight * expert_value(expert, x, i, hidden);
}
// Adds to dx; returns the gradient of the weight.
float add_backward(int32_t expert, float weight, const float* x, const float* d, float* dx,
                   int32_t hidden) {
  float d_weight = 0.0f;
  for (int32_t i = 0; i < hidden; ++i) {
    dx[i] += weight * expert_transposed(expert, d, i, hidden);
    d_weight += d[i] * expert_value(expert, x, i, hidden);
  }
  return d_weight;
}

std::vector<float> normals(Random& random, size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(random.normal());
  return values;
}

// `top_k` different experts for one token, or -1.
void choose_experts(const ExpertProblem& problem, Random& random, int32_t* chosen) {
  std::vector<int32_t> experts(static_cast<size_t>(problem.expert_count()));
  std::iota(experts.begin(), experts.end(), 0);
  for (size_t i = experts.size(); i > 1; --i) std::swap(experts[i - 1], experts[random.below(i)]);
  if (problem.skew == Skew::kOneRank) {  // the last rank's experts first
    std::stable_partition(experts.begin(), experts.end(), [&](int32_t expert) {
      return expert / problem.experts_per_rank == problem.group_size - 1;
    });
  }
  for (int32_t k = 0; k < problem.top_k; ++k) {
    chosen[k] = static_cast<size_t>(k) < experts.size() ? experts[static_cast<size_t>(k)] : -1;
    if (problem.skew == Skew::kOneExpert) chosen[k] = k == 0 ? 0 : -1;
    if (problem.skew == Skew::kSomeNone && random.below(2) == 0) chosen[k] = -1;
  }
}

}  // namespace

ExpertExchangeConfig ExpertProblem::config(int32_t rank, int32_t slot_count) const {
  ExpertExchangeConfig config;
  for (int32_t i = 0; i < group_size; ++i) config.group.push_back(Rank{i});
  config.group_index = rank;
  config.experts_per_rank = experts_per_rank;
  config.top_k = top_k;
  config.hidden_size = hidden_size;
  config.tokens_max = tokens_max;
  config.slot_count = slot_count;
  return config;
}

RankInput input_of(const ExpertProblem& problem, int32_t rank) {
  Random random(problem.seed, static_cast<uint64_t>(rank));
  RankInput input;
  input.token_count = static_cast<int32_t>(random.below(problem.tokens_max + 1u));
  const size_t values = static_cast<size_t>(input.token_count * problem.hidden_size);
  const size_t choices = static_cast<size_t>(input.token_count * problem.top_k);
  input.x = normals(random, values);
  input.residual = normals(random, values);
  input.dy = normals(random, values);
  input.weight = normals(random, choices);
  input.expert.resize(choices);
  for (int32_t t = 0; t < input.token_count; ++t) {
    choose_experts(problem, random, input.expert.data() + t * problem.top_k);
  }
  return input;
}

RankOutput expected_output(const ExpertProblem& problem, int32_t rank) {
  const RankInput input = input_of(problem, rank);
  const int32_t hidden = problem.hidden_size;
  RankOutput output{input.residual, std::vector<float>(input.x.size()),
                    std::vector<float>(input.weight.size())};
  for (int32_t t = 0; t < input.token_count; ++t) {
    const float* const x = input.x.data() + t * hidden;
    const float* const dy = input.dy.data() + t * hidden;
    for (int32_t member = 0; member < problem.group_size; ++member) {
      std::vector<float> y(static_cast<size_t>(hidden)), dx(static_cast<size_t>(hidden));
      bool used = false;
      for (int32_t at = t * problem.top_k; at < (t + 1) * problem.top_k; ++at) {
        const int32_t expert = input.expert[static_cast<size_t>(at)];
        if (expert < 0 || expert / problem.experts_per_rank != member) continue;
        used = true;
        const float weight = input.weight[static_cast<size_t>(at)];
        add_forward(expert, weight, x, y.data(), hidden);
        output.d_topk_weight[static_cast<size_t>(at)] =
            add_backward(expert, weight, x, dy, dx.data(), hidden);
      }
      for (int32_t i = 0; i < hidden && used; ++i) {
        output.out[static_cast<size_t>(t * hidden + i)] += y[static_cast<size_t>(i)];
        output.dx[static_cast<size_t>(t * hidden + i)] += dx[static_cast<size_t>(i)];
      }
    }
  }
  return output;
}

ExchangedLayer::ExchangedLayer(const ExpertProblem& problem, int32_t rank, ExpertExchange& exchange,
                               int32_t slot, Tag tag_base)
    : problem_(problem),
      input_(input_of(problem, rank)),
      exchange_(exchange),
      rank_(rank),
      slot_(slot),
      tag_base_(tag_base),
      output_{input_.residual, std::vector<float>(input_.x.size()),
              std::vector<float>(input_.weight.size(), -1.0f)} {
  const size_t rows_max = static_cast<size_t>(problem.group_size * problem.tokens_max);
  y_.reserve(rows_max * static_cast<size_t>(problem.hidden_size));
  dx_rows_.reserve(y_.capacity());
  d_weight_.reserve(rows_max * static_cast<size_t>(problem.top_k));
}

void ExchangedLayer::start_dispatch() {
  if (!problem_.renumbered) {
    return exchange_.start_dispatch(slot_, tag_base_, input_.x, input_.expert, input_.weight);
  }
  // The expert on seat s is called s + 1, the last one 0.
  const int32_t count = problem_.expert_count();
  std::vector<int32_t> seat_of(static_cast<size_t>(count));
  for (int32_t seat = 0; seat < count; ++seat) seat_of[(seat + 1) % count] = seat;
  std::vector<int32_t> named = input_.expert;
  for (int32_t& expert : named) expert = expert < 0 ? -1 : (expert + 1) % count;
  exchange_.start_dispatch(slot_, tag_base_, input_.x, named, input_.weight, seat_of);
}

Status ExchangedLayer::experts_forward() {
  PENSTOCK_TRY_ASSIGN(rows_, exchange_.finish_dispatch(slot_));
  const int32_t hidden = problem_.hidden_size;
  y_.assign(static_cast<size_t>(rows_.row_count * hidden), 0.0f);
  for (int32_t row = 0; row < rows_.row_count; ++row) {
    const auto r = static_cast<size_t>(row);
    for (int32_t a = rows_.assignment_offset[r]; a < rows_.assignment_offset[r + 1]; ++a) {
      const auto at = static_cast<size_t>(a);
      add_forward(rank_ * problem_.experts_per_rank + rows_.assignment_expert[at],
                  rows_.assignment_weight[at], rows_.rows.data() + row * hidden,
                  y_.data() + row * hidden, hidden);
    }
  }
  exchange_.start_combine(slot_, y_);
  return {};
}

Status ExchangedLayer::finish_forward() {
  return exchange_.finish_combine(slot_, output_.out);
}

void ExchangedLayer::start_backward() {
  exchange_.start_combine_backward(slot_, input_.dy);
}

Status ExchangedLayer::experts_backward() {
  PENSTOCK_TRY_ASSIGN(const std::span<const float> d_rows,
                      exchange_.finish_combine_backward(slot_));
  const int32_t hidden = problem_.hidden_size;
  dx_rows_.assign(static_cast<size_t>(rows_.row_count * hidden), 0.0f);
  d_weight_.assign(static_cast<size_t>(rows_.assignment_count), 0.0f);
  for (int32_t row = 0; row < rows_.row_count; ++row) {
    const auto r = static_cast<size_t>(row);
    for (int32_t a = rows_.assignment_offset[r]; a < rows_.assignment_offset[r + 1]; ++a) {
      const auto at = static_cast<size_t>(a);
      d_weight_[at] =
          add_backward(rank_ * problem_.experts_per_rank + rows_.assignment_expert[at],
                       rows_.assignment_weight[at], rows_.rows.data() + row * hidden,
                       d_rows.data() + row * hidden, dx_rows_.data() + row * hidden, hidden);
    }
  }
  exchange_.start_dispatch_backward(slot_, dx_rows_, d_weight_);
  return {};
}

Status ExchangedLayer::finish_backward() {
  return exchange_.finish_dispatch_backward(slot_, output_.dx, output_.d_topk_weight);
}

Status ExchangedLayer::run() {
  start_dispatch();
  PENSTOCK_TRY(experts_forward());
  PENSTOCK_TRY(finish_forward());
  start_backward();
  PENSTOCK_TRY(experts_backward());
  return finish_backward();
}

}  // namespace penstock
