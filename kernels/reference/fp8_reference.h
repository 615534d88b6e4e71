// FP8 linear layers as plain loops. Contracts: kernels/kernels.h. Unlike the other references these
// define every bit: the order of the fp32 sums is part of the emulated arithmetic.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "comm/base/minifloat.h"
#include "kernels/kernels.h"
#include "kernels/tile_scale.h"

namespace penstock::reference {

constexpr bool has_power_of_two_scale(RowFormat format) {
  return format == RowFormat::kE4m3PowerOfTwo || format == RowFormat::kE5m6PowerOfTwo;
}

// The largest magnitude of the tile; NaN when it has one.
template <typename At>  // at(i): value i of the tile
float tile_magnitude(int64_t count, const At& at) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = std::abs(at(i));
    if (std::isnan(magnitude)) return magnitude;
    largest = std::max(largest, magnitude);
  }
  return largest;
}

// An operand in E4M3: codes as the numbers they stand for, and a scale for each.
struct Fp8Matrix {
  int64_t width = 0;
  std::vector<float> codes;
  std::vector<float> scales;
  float code(int64_t row, int64_t column) const { return codes[row * width + column]; }
  float scale(int64_t row, int64_t column) const { return scales[row * width + column]; }
};

// Tiles of tile_rows x tile_columns, those at the ends smaller.
inline Fp8Matrix quantize(int64_t rows, int64_t width, ConstMatrix x, int64_t tile_rows,
                          int64_t tile_columns, bool power_of_two) {
  Fp8Matrix result{width, std::vector<float>(static_cast<size_t>(rows * width)), {}};
  result.scales.resize(result.codes.size());
  for (int64_t row = 0; row < rows; row += tile_rows) {
    for (int64_t column = 0; column < width; column += tile_columns) {
      const int64_t height = std::min(tile_rows, rows - row);
      const int64_t breadth = std::min(tile_columns, width - column);
      const auto at = [&](int64_t i) {
        return x.data[(row + i / breadth) * x.stride + column + i % breadth];
      };
      const float scale =
          tile_scale(tile_magnitude(height * breadth, at), E4m3::largest(), power_of_two);
      for (int64_t i = 0; i < height * breadth; ++i) {
        const int64_t place = (row + i / breadth) * width + column + i % breadth;
        result.codes[place] = E4m3::round(at(i) / scale);
        result.scales[place] = scale;
      }
    }
  }
  return result;
}

inline void round_rows(RowFormat format, int64_t rows, int64_t width, ConstMatrix x, Matrix y) {
  const bool e5m6 = format == RowFormat::kE5m6PowerOfTwo;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t column = 0; column < width; column += kTileWidth) {
      const float* const from = x.data + i * x.stride + column;
      float* const to = y.data + i * y.stride + column;
      const int64_t count = std::min(kTileWidth, width - column);
      const float scale =
          tile_scale(tile_magnitude(count, [&](int64_t j) { return from[j]; }),
                     e5m6 ? E5m6::largest() : E4m3::largest(), has_power_of_two_scale(format));
      for (int64_t j = 0; j < count; ++j) {
        if (format == RowFormat::kFp32) {
          to[j] = from[j];
        } else if (format == RowFormat::kBf16) {
          to[j] = round_to_bf16(from[j]);
        } else {
          const float scaled = from[j] / scale;
          to[j] = scale * (e5m6 ? E5m6::round(scaled) : E4m3::round(scaled));
        }
      }
    }
  }
}

// Fp8Accumulator::kHopper, for up to 32 products.
constexpr int64_t kHopperProducts = 32;
inline float hopper_sum(float before, int64_t count, const float* products) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (std::isnan(products[i])) return products[i];
    largest = std::max(largest, std::abs(products[i]));
  }
  const float step = largest > 0 ? std::ldexp(1.0F, std::ilogb(largest) - 13) : 1.0F;
  int64_t steps = 0;
  for (int64_t i = 0; i < count; ++i) {
    steps += static_cast<int64_t>(std::floor(products[i] / step));
  }
  const float total = before + static_cast<float>(steps) * step;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(total) & 0xfffffc00U);
}

// P_b of kernels.h, of up to 128 products: a(p) and b(p) give {code, scale} of the operands.
template <typename A, typename B>
float interval_sum(Fp8Accumulator accumulator, int64_t first, int64_t end, const A& a, const B& b) {
  float sum = 0;
  for (int64_t p = first; p < end; ++p) {
    if (accumulator == Fp8Accumulator::kFp32) {
      sum = std::fmaf(a(p).first, b(p).first, sum);
    } else if ((p - first) % kHopperProducts == 0) {
      float products[kHopperProducts];
      const int64_t count = std::min(kHopperProducts, end - p);
      for (int64_t i = 0; i < count; ++i) products[i] = a(p + i).first * b(p + i).first;
      sum = hopper_sum(sum, count, products);
    }
  }
  return sum;
}

// One element of a product over `depth`.
template <typename A, typename B>
float promoted_sum(Fp8Accumulator accumulator, int64_t depth, const A& a, const B& b) {
  float sum = 0;
  for (int64_t first = 0; first < depth; first += kTileWidth) {
    const float interval =
        interval_sum(accumulator, first, std::min(first + kTileWidth, depth), a, b);
    sum = std::fmaf(interval, a(first).second * b(first).second, sum);
  }
  return sum;
}

inline void store(Store how, float value, float& place) {
  place = how == Store::kAccumulate ? place + value : value;
}

// y[i, j] from x and the weight, summed over `in`; or, `backward`, dx from dy, summed over `out`.
inline void fp8_linear(Fp8Accumulator accumulator, const LinearShape& shape, bool backward,
                       RowFormat format, ConstMatrix x, const float* weight, Store how, Matrix y) {
  const int64_t depth = backward ? shape.out : shape.in;
  const int64_t width = backward ? shape.in : shape.out;
  for (int64_t g = 0; g < shape.group_count; ++g) {
    const int64_t first = shape.offsets[g];
    const int64_t rows = shape.offsets[g + 1] - first;
    const Fp8Matrix a = quantize(rows, depth, {x.data + first * x.stride, x.stride}, 1, kTileWidth,
                                 has_power_of_two_scale(format));
    const Fp8Matrix w = quantize(shape.out, shape.in, {weight + g * shape.group_stride, shape.in},
                                 kTileWidth, kTileWidth, false);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        const auto left = [&](int64_t p) { return std::pair(a.code(i, p), a.scale(i, p)); };
        const auto right = [&](int64_t p) {
          return backward ? std::pair(w.code(p, j), w.scale(p, j))
                          : std::pair(w.code(j, p), w.scale(j, p));
        };
        store(how, round_to_bf16(promoted_sum(accumulator, depth, left, right)),
              y.data[(first + i) * y.stride + j]);
      }
    }
  }
}

inline void fp8_linear_weight_gradient(Fp8Accumulator accumulator, const LinearShape& shape,
                                       RowFormat dy_format, ConstMatrix dy, RowFormat x_format,
                                       ConstMatrix x, float* dweight) {
  for (int64_t g = 0; g < shape.group_count; ++g) {
    const int64_t first = shape.offsets[g];
    const int64_t rows = shape.offsets[g + 1] - first;
    const auto columns = [&](int64_t width, RowFormat format, ConstMatrix from) {
      std::vector<float> kept(static_cast<size_t>(rows * width));
      round_rows(format, rows, width, {from.data + first * from.stride, from.stride},
                 {kept.data(), width});
      return quantize(rows, width, {kept.data(), width}, kTileWidth, 1,
                      has_power_of_two_scale(format));
    };
    const Fp8Matrix a = columns(shape.out, dy_format, dy);
    const Fp8Matrix b = columns(shape.in, x_format, x);
    for (int64_t i = 0; i < shape.out; ++i) {
      for (int64_t j = 0; j < shape.in; ++j) {
        const auto left = [&](int64_t p) { return std::pair(a.code(p, i), a.scale(p, i)); };
        const auto right = [&](int64_t p) { return std::pair(b.code(p, j), b.scale(p, j)); };
        dweight[g * shape.group_stride + i * shape.in + j] +=
            promoted_sum(accumulator, rows, left, right);
      }
    }
  }
}

}  // namespace penstock::reference
