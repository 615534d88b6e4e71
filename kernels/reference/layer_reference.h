// Normalisation, rotary position, SwiGLU and the loss as plain loops. Contracts: kernels/kernels.h.
#pragma once

#include <cmath>

#include "kernels/kernels.h"
#include "kernels/reference/view.h"

namespace penstock::reference {

template <typename T>
void rms_norm(int64_t rows, int64_t width, MatrixView<const T> x, const T* weight, double eps,
              MatrixView<T> y, T* inv_rms) {
  for (int64_t i = 0; i < rows; ++i) {
    double squares = 0;
    for (int64_t j = 0; j < width; ++j) squares += static_cast<double>(x(i, j)) * x(i, j);
    const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(width) + eps);
    inv_rms[i] = static_cast<T>(inverse);
    for (int64_t j = 0; j < width; ++j) y(i, j) = static_cast<T>(x(i, j) * inverse * weight[j]);
  }
}

// dx.data or dweight null: that output is skipped.
template <typename T>
void rms_norm_backward(int64_t rows, int64_t width, MatrixView<const T> x, const T* weight,
                       const T* inv_rms, MatrixView<const T> dy, Store store, MatrixView<T> dx,
                       T* dweight) {
  if (dweight != nullptr) {
    for (int64_t j = 0; j < width; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < rows; ++i)
        sum += static_cast<double>(dy(i, j)) * x(i, j) * inv_rms[i];
      dweight[j] = static_cast<T>(dweight[j] + sum);
    }
  }
  if (dx.data == nullptr) return;
  for (int64_t i = 0; i < rows; ++i) {
    const double inverse = inv_rms[i];
    double dot = 0;  // of xhat and weight * dy
    for (int64_t j = 0; j < width; ++j) dot += x(i, j) * inverse * weight[j] * dy(i, j);
    const double mean = dot / static_cast<double>(width);
    for (int64_t j = 0; j < width; ++j) {
      const double gradient =
          inverse * (static_cast<double>(weight[j]) * dy(i, j) - x(i, j) * inverse * mean);
      const double before = store == Store::kAccumulate ? static_cast<double>(dx(i, j)) : 0.0;
      dx(i, j) = static_cast<T>(before + gradient);
    }
  }
}

template <typename T>
void rope(int64_t tokens, int64_t seq_length, int64_t heads, int64_t dim, const T* cosine,
          const T* sine, bool inverse, HeadsView<T> x) {
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t row = token % seq_length * (dim / 2);
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t pair = 0; pair < dim / 2; ++pair) {
        const double c = cosine[row + pair];
        const double s = inverse ? -static_cast<double>(sine[row + pair]) : sine[row + pair];
        T& first = x(token, head, 2 * pair);
        T& second = x(token, head, 2 * pair + 1);
        const double a = first;
        const double b = second;
        first = static_cast<T>(a * c - b * s);
        second = static_cast<T>(b * c + a * s);
      }
    }
  }
}

template <typename T>
void swiglu(int64_t rows, int64_t width, MatrixView<const T> gate, MatrixView<const T> up,
            MatrixView<T> y) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const double g = gate(i, j);
      y(i, j) = static_cast<T>(g / (1.0 + std::exp(-g)) * up(i, j));
    }
  }
}

template <typename T>
void swiglu_backward(int64_t rows, int64_t width, MatrixView<const T> gate, MatrixView<const T> up,
                     MatrixView<const T> dy, MatrixView<T> d_gate, MatrixView<T> d_up,
                     const T* weights = nullptr, MatrixView<T> y = {}, T* dots = nullptr) {
  for (int64_t i = 0; i < rows; ++i) {
    const double weight = weights == nullptr ? 1.0 : weights[i];
    double dot = 0;
    for (int64_t j = 0; j < width; ++j) {
      const double g = gate(i, j);
      const double u = up(i, j);
      const double d = weight * dy(i, j);
      const double sigmoid = 1.0 / (1.0 + std::exp(-g));
      const double h = g * sigmoid * u;
      dot += dy(i, j) * h;
      d_gate(i, j) = static_cast<T>(d * u * sigmoid * (1.0 + g * (1.0 - sigmoid)));
      d_up(i, j) = static_cast<T>(d * g * sigmoid);
      if (y.data != nullptr) y(i, j) = static_cast<T>(weight * h);
    }
    if (dots != nullptr) dots[i] = static_cast<T>(dot);
  }
}

template <typename T>
void cross_entropy(int64_t rows, int64_t vocab, MatrixView<const T> logits, const int32_t* targets,
                   double gradient_scale, T* losses, MatrixView<T> d_logits) {
  for (int64_t i = 0; i < rows; ++i) {
    if (targets[i] < 0) {
      losses[i] = 0;
      for (int64_t j = 0; d_logits.data != nullptr && j < vocab; ++j) d_logits(i, j) = 0;
      continue;
    }
    double largest = logits(i, 0);
    for (int64_t j = 1; j < vocab; ++j) {
      if (logits(i, j) > largest) largest = logits(i, j);
    }
    double sum = 0;  // a NaN logit makes this NaN, whatever `largest` became
    for (int64_t j = 0; j < vocab; ++j) sum += std::exp(logits(i, j) - largest);
    losses[i] = static_cast<T>(largest + std::log(sum) - logits(i, targets[i]));
    for (int64_t j = 0; d_logits.data != nullptr && j < vocab; ++j) {
      const double probability = std::exp(logits(i, j) - largest) / sum;
      const double target = j == targets[i] ? 1.0 : 0.0;
      d_logits(i, j) = static_cast<T>(gradient_scale * (probability - target));
    }
  }
}

}  // namespace penstock::reference
