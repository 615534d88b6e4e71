// Matrix products as triple loops, summed in double. Contracts: kernels/kernels.h.
#pragma once

#include "kernels/kernels.h"
#include "kernels/reference/view.h"

namespace penstock::reference {

template <typename T>
void matmul(int64_t m, int64_t n, int64_t k, MatrixView<const T> a, Transpose transpose_a,
            MatrixView<const T> b, Transpose transpose_b, Store store, MatrixView<T> c,
            double alpha) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t p = 0; p < k; ++p) {
        const T left = transpose_a == Transpose::kYes ? a(p, i) : a(i, p);
        const T right = transpose_b == Transpose::kYes ? b(j, p) : b(p, j);
        sum += static_cast<double>(left) * static_cast<double>(right);
      }
      const double before = store == Store::kAccumulate ? static_cast<double>(c(i, j)) : 0.0;
      c(i, j) = static_cast<T>(before + alpha * sum);
    }
  }
}

}  // namespace penstock::reference
