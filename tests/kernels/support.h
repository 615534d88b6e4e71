// Helpers of the kernel tests: random buffers, comparisons, finite differences, and running the CPU
// backend once per instruction set that this machine has.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "comm/base/random.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/kernels.h"
#include "kernels/reference/reference_kernels.h"

namespace penstock {

template <typename T = float>
std::vector<T> random_values(int64_t count, uint64_t seed, double scale = 1.0) {
  Random random(seed, 0);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = static_cast<T>(scale * random.normal());
  return values;
}

// Rows with room between them; the room is filled with a marker, to notice writes outside the
// columns.
class StridedRows {
 public:
  static constexpr float kMarker = -777.25F;

  StridedRows(int64_t rows, int64_t width, int64_t stride, uint64_t seed)
      : width_(width), stride_(stride), data_(static_cast<size_t>(rows * stride), kMarker) {
    const std::vector<float> values = random_values(rows * width, seed);
    for (int64_t i = 0; i < rows * width; ++i) {
      data_[static_cast<size_t>(i / width * stride + i % width)] = values[static_cast<size_t>(i)];
    }
  }
  Matrix matrix() { return {data_.data(), stride_}; }
  bool gaps_untouched() const {
    for (size_t i = 0; i < data_.size(); ++i) {
      if (static_cast<int64_t>(i) % stride_ >= width_ && data_[i] != kMarker) return false;
    }
    return true;
  }
  const std::vector<float>& data() const { return data_; }

 private:
  int64_t width_;
  int64_t stride_;
  std::vector<float> data_;
};

template <typename T>
void expect_close(const std::vector<T>& actual, const std::vector<T>& expected, double tolerance,
                  const std::string& what = "") {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double bound = tolerance * (1.0 + std::abs(static_cast<double>(expected[i])));
    ASSERT_NEAR(actual[i], expected[i], bound) << what << " at " << i;
  }
}

// Compares `gradient` with central differences of `loss` around `x`, element by element.
inline void expect_gradient(std::vector<double> x, const std::vector<double>& gradient,
                            const std::function<double(const std::vector<double>&)>& loss,
                            const std::string& what) {
  ASSERT_EQ(x.size(), gradient.size()) << what;
  constexpr double kStep = 1e-5;
  for (size_t i = 0; i < x.size(); ++i) {
    const double middle = x[i];
    x[i] = middle + kStep;
    const double above = loss(x);
    x[i] = middle - kStep;
    const double below = loss(x);
    x[i] = middle;
    const double slope = (above - below) / (2 * kStep);
    ASSERT_NEAR(gradient[i], slope, 1e-6 * (1.0 + std::abs(slope))) << what << " at " << i;
  }
}

template <typename T>
double dot(const std::vector<T>& a, const std::vector<T>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

// Runs `body(name)` with the CPU backend limited to each instruction set in turn, narrowest last.
void on_each_instruction_set(const std::function<void(const std::string&)>& body);

}  // namespace penstock
