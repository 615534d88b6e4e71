// Causal attention written out score by score. Contracts: kernels/kernels.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/reference/view.h"

namespace penstock::reference {

template <typename T>
struct AttentionViews {
  HeadsView<const T> query;
  HeadsView<const T> key_nope;
  MatrixView<const T> key_rope;
  HeadsView<const T> value;
};
template <typename T>
struct AttentionGradientViews {
  HeadsView<T> query;
  HeadsView<T> key_nope;
  MatrixView<T> key_rope;
  HeadsView<T> value;
};

// Element d of the key of (token, head): its own part first, then the shared one.
template <typename T>
double key_element(const AttentionShape& shape, const AttentionViews<T>& in, int64_t token,
                   int64_t head, int64_t d) {
  return d < shape.nope_dim ? in.key_nope(token, head, d) : in.key_rope(token, d - shape.nope_dim);
}

template <typename T>
double attention_score(const AttentionShape& shape, double scale, const AttentionViews<T>& in,
                       int64_t query_token, int64_t key_token, int64_t head) {
  double sum = 0;
  for (int64_t d = 0; d < shape.query_dim(); ++d) {
    sum += in.query(query_token, head, d) * key_element(shape, in, key_token, head, d);
  }
  return scale * sum;
}

// One query token of one head. `weights` holds seq_length doubles.
template <typename T>
void attend_one(const AttentionShape& shape, double scale, const AttentionViews<T>& in,
                int64_t first_token, int64_t t, int64_t head, HeadsView<T> out, T* log_sum_exp,
                double* weights) {
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j <= t; ++j) {
    weights[j] = attention_score(shape, scale, in, first_token + t, first_token + j, head);
    if (!(weights[j] <= largest)) largest = weights[j];
  }
  double sum = 0;
  for (int64_t j = 0; j <= t; ++j) {
    weights[j] = std::exp(weights[j] - largest);
    sum += weights[j];
  }
  *log_sum_exp = static_cast<T>(largest + std::log(sum));
  for (int64_t d = 0; d < shape.value_dim; ++d) {
    double value = 0;
    for (int64_t j = 0; j <= t; ++j) value += weights[j] * in.value(first_token + j, head, d);
    out(first_token + t, head, d) = static_cast<T>(value / sum);
  }
}

template <typename T>
void attention(const AttentionShape& shape, double scale, const AttentionViews<T>& in,
               HeadsView<T> out, T* log_sum_exp) {
  std::vector<double> weights(static_cast<size_t>(shape.seq_length));
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t head = 0; head < shape.heads; ++head) {
      for (int64_t t = 0; t < shape.seq_length; ++t) {
        T* const lse = log_sum_exp + (b * shape.heads + head) * shape.seq_length + t;
        attend_one(shape, scale, in, b * shape.seq_length, t, head, out, lse, weights.data());
      }
    }
  }
}

// Gradients of one head of one sequence, summed in double: d_query, d_key [seq_length, query_dim],
// d_value [seq_length, value_dim].
struct HeadGradients {
  std::vector<double> query;
  std::vector<double> key;
  std::vector<double> value;
};

template <typename T>
HeadGradients head_gradients(const AttentionShape& shape, double scale, const AttentionViews<T>& in,
                             HeadsView<const T> out, const T* log_sum_exp, HeadsView<const T> d_out,
                             int64_t first_token, int64_t head) {
  const int64_t query_dim = shape.query_dim();
  HeadGradients sums;
  sums.query.resize(static_cast<size_t>(shape.seq_length * query_dim));
  sums.key.resize(static_cast<size_t>(shape.seq_length * query_dim));
  sums.value.resize(static_cast<size_t>(shape.seq_length * shape.value_dim));
  for (int64_t t = 0; t < shape.seq_length; ++t) {
    const int64_t token = first_token + t;
    double delta = 0;
    for (int64_t d = 0; d < shape.value_dim; ++d) {
      delta += static_cast<double>(d_out(token, head, d)) * out(token, head, d);
    }
    for (int64_t j = 0; j <= t; ++j) {
      const double score = attention_score(shape, scale, in, token, first_token + j, head);
      const double weight = std::exp(score - log_sum_exp[t]);
      double d_weight = 0;
      for (int64_t d = 0; d < shape.value_dim; ++d) {
        d_weight += static_cast<double>(d_out(token, head, d)) * in.value(first_token + j, head, d);
        sums.value[j * shape.value_dim + d] += weight * d_out(token, head, d);
      }
      const double d_score = weight * (d_weight - delta) * scale;
      for (int64_t d = 0; d < query_dim; ++d) {
        sums.query[t * query_dim + d] += d_score * key_element(shape, in, first_token + j, head, d);
        sums.key[j * query_dim + d] += d_score * in.query(token, head, d);
      }
    }
  }
  return sums;
}

template <typename T>
void attention_backward(const AttentionShape& shape, double scale, const AttentionViews<T>& in,
                        HeadsView<const T> out, const T* log_sum_exp, HeadsView<const T> d_out,
                        const AttentionGradientViews<T>& gradients) {
  const int64_t query_dim = shape.query_dim();
  std::vector<double> key_rope(static_cast<size_t>(shape.seq_length * shape.rope_dim));
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t first = b * shape.seq_length;
    std::fill(key_rope.begin(), key_rope.end(), 0.0);
    for (int64_t head = 0; head < shape.heads; ++head) {
      const HeadGradients sums = head_gradients(
          shape, scale, in, out, log_sum_exp + (b * shape.heads + head) * shape.seq_length, d_out,
          first, head);
      for (int64_t t = 0; t < shape.seq_length; ++t) {
        for (int64_t d = 0; d < query_dim; ++d) {
          gradients.query(first + t, head, d) = static_cast<T>(sums.query[t * query_dim + d]);
        }
        for (int64_t d = 0; d < shape.nope_dim; ++d) {
          gradients.key_nope(first + t, head, d) = static_cast<T>(sums.key[t * query_dim + d]);
        }
        for (int64_t d = 0; d < shape.rope_dim; ++d) {
          key_rope[t * shape.rope_dim + d] += sums.key[t * query_dim + shape.nope_dim + d];
        }
        for (int64_t d = 0; d < shape.value_dim; ++d) {
          gradients.value(first + t, head, d) = static_cast<T>(sums.value[t * shape.value_dim + d]);
        }
      }
    }
    for (int64_t t = 0; t < shape.seq_length; ++t) {
      for (int64_t d = 0; d < shape.rope_dim; ++d) {
        gradients.key_rope(first + t, d) = static_cast<T>(key_rope[t * shape.rope_dim + d]);
      }
    }
  }
}

}  // namespace penstock::reference
