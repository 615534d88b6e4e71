// Strided views for the reference loops, over float in the backend and over double where tests take
// finite differences.
#pragma once

#include <cstdint>

namespace penstock::reference {

template <typename T>
struct MatrixView {
  T* data = nullptr;
  int64_t stride = 0;
  T& operator()(int64_t row, int64_t column) const { return data[row * stride + column]; }
};

template <typename T>
struct HeadsView {
  T* data = nullptr;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
  T& operator()(int64_t token, int64_t head, int64_t d) const {
    return data[token * token_stride + head * head_stride + d];
  }
};

}  // namespace penstock::reference
