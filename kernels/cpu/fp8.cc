#include "kernels/cpu/fp8.h"

#include <algorithm>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/fp8.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "comm/base/minifloat.h"
#include "kernels/cpu/simd_inl.h"
#include "kernels/tile_scale.h"

#ifndef PENSTOCK_KERNELS_CPU_FP8_SHARED
#define PENSTOCK_KERNELS_CPU_FP8_SHARED
namespace penstock::cpu {
namespace {

// A tiled format's numbers, as the vector code uses them.
struct TileFormat {
  int mantissa_bits;
  uint32_t min_exponent_bits;  // of the smallest normal code, as fp32 bits
  float largest;
  bool power_of_two;
};

template <typename Format>
constexpr TileFormat format_of(int mantissa_bits, bool power_of_two) {
  return {mantissa_bits, static_cast<uint32_t>(127 + Format::kMinExponent) << 23, Format::largest(),
          power_of_two};
}

constexpr TileFormat tile_format(RowFormat format) {
  if (format == RowFormat::kE5m6PowerOfTwo) return format_of<E5m6>(6, true);
  return format_of<E4m3>(3, format == RowFormat::kE4m3PowerOfTwo);
}

}  // namespace
}  // namespace penstock::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace penstock::cpu::HWY_NAMESPACE {

// Magnitudes are compared as integers: the same order, and a NaN is the largest.
template <class D>
HWY_INLINE auto magnitude_bits(D d, const float* x) {
  const hn::RebindToSigned<D> di;
  return hn::And(hn::BitCast(di, hn::LoadU(d, x)), hn::Set(di, 0x7fffffff));
}

// The larger of `so_far` and the largest magnitude of x[0, count), as bits.
HWY_INLINE int32_t largest_bits(int64_t count, const float* x, int32_t so_far) {
  const Lanes d;
  const hn::RebindToSigned<Lanes> di;
  auto largest = hn::Set(di, so_far);
  int64_t i = 0;
  for (; i + kLaneCount <= count; i += kLaneCount) {
    largest = hn::Max(largest, magnitude_bits(d, x + i));
  }
  int32_t result = hn::GetLane(hn::MaxOfLanes(di, largest));
  for (; i < count; ++i) result = std::max(result, hn::GetLane(magnitude_bits(One(), x + i)));
  return result;
}

// Minifloat::round. Adding 1.5 * 2^(e + 23 - mantissa bits), e the value's exponent or the smallest
// normal one, leaves no room for more mantissa bits than the format has: the addition rounds, to
// even because the summand is an even multiple of that step.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V round_codes(D d, V x, const TileFormat& format) {
  const hn::RebindToSigned<D> di;
  const V largest = hn::Set(d, format.largest);
  V v = hn::Abs(x);
  v = hn::IfThenElse(hn::Gt(v, largest), largest, v);  // not Min: this keeps NaN
  auto exponent = hn::And(hn::BitCast(di, v), hn::Set(di, 0x7f800000));
  exponent = hn::Max(exponent, hn::Set(di, static_cast<int32_t>(format.min_exponent_bits)));
  const auto step = hn::Add(exponent, hn::Set(di, (23 - format.mantissa_bits) << 23));
  const V pushed = hn::BitCast(d, hn::Or(step, hn::Set(di, 0x400000)));
  return hn::CopySign(hn::Sub(hn::Add(v, pushed), pushed), x);
}

// codes = round(x / scale), or scale times that.
HWY_INLINE void round_tile(int64_t count, const float* x, float scale, const TileFormat& format,
                           bool scaled_back, float* codes) {
  for_lanes(count, [&](auto d, int64_t j) HWY_ATTR {
    const auto s = hn::Set(d, scale);
    const auto code = round_codes(d, hn::Div(hn::LoadU(d, x + j), s), format);
    hn::StoreU(scaled_back ? hn::Mul(s, code) : code, d, codes + j);
  });
}

// Tiles of one row by 128 columns; scales, unless null: [rows, tiles of a row].
void quantize_rows(int64_t rows, int64_t width, ConstMatrix x, const TileFormat& format,
                   Matrix codes, float* scales) {
  const int64_t tiles = (width + kTileWidth - 1) / kTileWidth;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t t = 0; t < tiles; ++t) {
      const float* const from = x.data + i * x.stride + t * kTileWidth;
      const int64_t count = std::min(kTileWidth, width - t * kTileWidth);
      const float magnitude = std::bit_cast<float>(largest_bits(count, from, 0));
      const float scale = tile_scale(magnitude, format.largest, format.power_of_two);
      float* const to = codes.data + i * codes.stride + t * kTileWidth;
      round_tile(count, from, scale, format, scales == nullptr, to);
      if (scales != nullptr) scales[i * tiles + t] = scale;
    }
  }
}

// Blocks of 128 x 128 of a contiguous matrix; scales: [blocks down, blocks across].
void quantize_blocks(int64_t rows, int64_t width, const float* x, float* codes, float* scales) {
  constexpr TileFormat kFormat = tile_format(RowFormat::kE4m3);
  for (int64_t row = 0; row < rows; row += kTileWidth) {
    const int64_t row_end = std::min(row + kTileWidth, rows);
    for (int64_t column = 0; column < width; column += kTileWidth) {
      const int64_t count = std::min(kTileWidth, width - column);
      int32_t bits = 0;
      for (int64_t i = row; i < row_end; ++i) {
        bits = largest_bits(count, x + i * width + column, bits);
      }
      const float scale = tile_scale(std::bit_cast<float>(bits), kFormat.largest, false);
      for (int64_t i = row; i < row_end; ++i) {
        const int64_t at = i * width + column;
        round_tile(count, x + at, scale, kFormat, false, codes + at);
      }
      *scales++ = scale;
    }
  }
}

// Tiles of up to 128 rows by one column, in place; x: [rows, width] contiguous; scales: [width].
void quantize_columns(int64_t rows, int64_t width, bool power_of_two, float* x, float* scales) {
  const TileFormat format = format_of<E4m3>(3, power_of_two);
  for_lanes(width, [&](auto d, int64_t j) HWY_ATTR {
    const hn::RebindToSigned<decltype(d)> di;
    auto bits = hn::Zero(di);
    for (int64_t i = 0; i < rows; ++i) bits = hn::Max(bits, magnitude_bits(d, x + i * width + j));
    const auto magnitude = hn::BitCast(d, bits);
    const auto least = hn::Set(d, kTileMagnitudeMin);
    const auto floored = hn::IfThenElse(hn::Le(magnitude, least), least, magnitude);
    auto scale = hn::Div(floored, hn::Set(d, format.largest));
    if (power_of_two) {
      const auto up = hn::Add(hn::BitCast(di, scale), hn::Set(di, 0x7fffff));
      const auto power = hn::BitCast(d, hn::And(up, hn::Set(di, 0x7f800000)));
      scale = hn::IfThenElse(hn::IsNaN(scale), scale, power);
    }
    hn::StoreU(scale, d, scales + j);
    for (int64_t i = 0; i < rows; ++i) {
      float* const at = x + i * width + j;
      hn::StoreU(round_codes(d, hn::Div(hn::LoadU(d, at), scale), format), d, at);
    }
  });
}

// sum[j] = fma(product[j], row_scale * column_scales[j], from_zero ? 0 : sum[j])
void promote(int64_t width, const float* product, float row_scale, const float* column_scales,
             bool from_zero, float* sum) {
  for_lanes(width, [&](auto d, int64_t j) HWY_ATTR {
    const auto scale = hn::Mul(hn::Set(d, row_scale), hn::LoadU(d, column_scales + j));
    const auto before = from_zero ? hn::Zero(d) : hn::LoadU(d, sum + j);
    hn::StoreU(hn::MulAdd(hn::LoadU(d, product + j), scale, before), d, sum + j);
  });
}

// C = A B with Fp8Accumulator::kHopper, of one interval. A code has 4 significant bits, so every
// product is exact, and none but zero is below 2^-18.
void hopper_product(const GemmArguments& g) {
  constexpr int64_t kProducts = 32;
  for (int64_t i = 0; i < g.m; ++i) {
    const float* const left = g.a + i * g.a_row_stride;
    for_lanes(g.n, [&](auto d, int64_t j) HWY_ATTR {
      const hn::RebindToSigned<decltype(d)> di;
      const auto product = [&](int64_t p) HWY_ATTR {
        return hn::Mul(hn::Set(d, left[p * g.a_depth_stride]),
                       hn::LoadU(d, g.b + p * g.b_depth_stride + j));
      };
      const auto bits_of = [&](auto v) HWY_ATTR { return hn::BitCast(di, hn::Abs(v)); };
      auto sum = hn::Zero(d);
      for (int64_t first = 0; first < g.k; first += kProducts) {
        const int64_t end = std::min(first + kProducts, g.k);
        auto largest = hn::Set(di, (127 - 18) << 23);
        for (int64_t p = first; p < end; ++p) largest = hn::Max(largest, bits_of(product(p)));
        const auto exponent = hn::And(largest, hn::Set(di, 0x7f800000));
        const auto nan = hn::Gt(largest, hn::Set(di, 0x7f800000));
        // 2^(13 - e) and 2^(e - 13).
        const auto steps = hn::BitCast(d, hn::Sub(hn::Set(di, (2 * 127 + 13) << 23), exponent));
        const auto step = hn::BitCast(d, hn::Sub(exponent, hn::Set(di, 13 << 23)));
        auto total = hn::Zero(di);
        for (int64_t p = first; p < end; ++p) {
          total = hn::Add(total, hn::ConvertTo(di, hn::Floor(hn::Mul(product(p), steps))));
        }
        const auto exact = hn::Add(sum, hn::Mul(hn::ConvertTo(d, total), step));
        const auto cut = hn::BitCast(d, hn::And(hn::BitCast(di, exact), hn::Set(di, ~0x3ff)));
        sum = hn::IfThenElse(hn::RebindMask(d, nan), hn::BitCast(d, largest), cut);
      }
      hn::StoreU(sum, d, g.c + i * g.c_stride + j);
    });
  }
}

// y (= or +=) bf16(x)
void store_bf16(int64_t width, const float* x, bool accumulate, float* y) {
  for_lanes(width, [&](auto d, int64_t j) HWY_ATTR {
    const hn::RebindToUnsigned<decltype(d)> du;
    const auto v = hn::LoadU(d, x + j);
    const auto bits = hn::BitCast(du, v);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1U));
    const auto carried = hn::Add(hn::Add(bits, hn::Set(du, 0x7fffU)), odd);
    const auto near = hn::BitCast(d, hn::And(carried, hn::Set(du, 0xffff0000U)));
    const auto rounded = hn::IfThenElse(hn::IsNaN(v), v, near);
    hn::StoreU(accumulate ? hn::Add(hn::LoadU(d, y + j), rounded) : rounded, d, y + j);
  });
}

}  // namespace penstock::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace penstock::cpu {

HWY_EXPORT(quantize_rows);
HWY_EXPORT(quantize_blocks);
HWY_EXPORT(quantize_columns);
HWY_EXPORT(promote);
HWY_EXPORT(hopper_product);
HWY_EXPORT(store_bf16);

namespace {

// Rows whose codes, products and sums are held at once.
constexpr int64_t kRowsMax = 2 * kTileWidth;

int64_t tiles_of(int64_t width) {
  return (width + kTileWidth - 1) / kTileWidth;
}

// Hands out the workspace from its start, each piece at a multiple of 64 bytes.
class Workspace {
 public:
  explicit Workspace(float* data) : data_(data) {}
  float* take(int64_t count) {
    float* const taken = data_ == nullptr ? nullptr : data_ + used_;
    used_ += (count + 15) / 16 * 16;
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  float* data_;  // null: only counts
  int64_t used_ = 0;
};

// A product's right operand: the weight's codes, or their transpose.
struct Weight {
  float* codes;          // [out, in]
  float* scales;         // [out / 128, in / 128], rounded up
  float* column_scales;  // [width of the product], of one interval
};
// The rows under way, of depth d and width n.
struct Rows {
  float* codes;     // [kRowsMax, d]
  float* scales;    // [kRowsMax, d / 128], rounded up
  float* product;   // [kRowsMax, n], of one interval
  float* sums;      // [kRowsMax, n]
  float* straight;  // [128, n]: one interval of the weight, where a product cannot read it across
};
struct LinearScratch {
  LinearScratch(Workspace& from, int64_t out, int64_t in) {
    const int64_t wider = std::max(out, in);
    weight = {from.take(out * in), from.take(tiles_of(out) * tiles_of(in)), from.take(wider)};
    rows = {from.take(kRowsMax * wider), from.take(kRowsMax * tiles_of(wider)),
            from.take(kRowsMax * wider), from.take(kRowsMax * wider),
            from.take(kTileWidth * wider)};
  }
  Weight weight;
  Rows rows;
};
struct GradientScratch {
  GradientScratch(Workspace& from, int64_t out, int64_t in)
      : dy(from.take(kTileWidth * out)),
        x(from.take(kTileWidth * in)),
        dy_scales(from.take(out)),
        x_scales(from.take(in)),
        product(from.take(kTileWidth * in)),
        sums(from.take(out * in)) {}
  float* dy;  // codes of 128 rows
  float* x;
  float* dy_scales;
  float* x_scales;
  float* product;  // of 128 rows of dW, one interval
  float* sums;     // dW of one group
};

// to[p * width + j] = from[j * stride + p]
void transpose(int64_t depth, int64_t width, const float* from, int64_t stride, float* to) {
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t p = 0; p < depth; ++p) to[p * width + j] = from[j * stride + p];
  }
}

// P_b of kernels.h. `straight`: room for a transposed B; may be null when B lies straight.
void interval_product(GemmArguments g, const Fp8Context& context, float* straight) {
  if (context.accumulator == Fp8Accumulator::kFp32) {
    gemm(g, context.gemm_workspace);
    return;
  }
  if (g.b_column_stride != 1) {
    transpose(g.k, g.n, g.b, g.b_column_stride, straight);
    g.b = straight;
    g.b_depth_stride = g.n;
    g.b_column_stride = 1;
  }
  HWY_DYNAMIC_DISPATCH(hopper_product)(g);
}

void multiply(const LinearShape& shape, LinearPass pass, int64_t count, const LinearScratch& s,
              const Fp8Context& context) {
  const bool forward = pass == LinearPass::kForward;
  const int64_t depth = forward ? shape.in : shape.out;
  const int64_t width = forward ? shape.out : shape.in;
  const int64_t blocks_across = tiles_of(shape.in);
  for (int64_t first = 0; first < depth; first += kTileWidth) {
    const int64_t interval = first / kTileWidth;
    interval_product({.m = count,
                      .n = width,
                      .k = std::min(kTileWidth, depth - first),
                      .a = s.rows.codes + first,
                      .a_row_stride = depth,
                      .a_depth_stride = 1,
                      .b = s.weight.codes + first * (forward ? 1 : shape.in),
                      .b_depth_stride = forward ? 1 : shape.in,
                      .b_column_stride = forward ? shape.in : 1,
                      .c = s.rows.product,
                      .c_stride = width},
                     context, s.rows.straight);
    for (int64_t j = 0; j < width; ++j) {
      const int64_t block = j / kTileWidth;
      s.weight.column_scales[j] = s.weight.scales[forward ? block * blocks_across + interval
                                                          : interval * blocks_across + block];
    }
    for (int64_t i = 0; i < count; ++i) {
      HWY_DYNAMIC_DISPATCH(promote)
      (width, s.rows.product + i * width, s.rows.scales[i * tiles_of(depth) + interval],
       s.weight.column_scales, first == 0, s.rows.sums + i * width);
    }
  }
}

// Up to 128 rows of an operand of the weight gradient, in the codes of its columns.
void columns_of(int64_t rows, int64_t width, RowFormat format, ConstMatrix from, float* codes,
                float* scales) {
  round_rows(format, rows, width, from, {codes, width});
  HWY_DYNAMIC_DISPATCH(quantize_columns)
  (rows, width, tile_format(format).power_of_two, codes, scales);
}

}  // namespace

int64_t fp8_workspace_floats(int64_t out, int64_t in) {
  Workspace linear(nullptr), gradient(nullptr);
  LinearScratch(linear, out, in);
  GradientScratch(gradient, out, in);
  return std::max(linear.used(), gradient.used());
}

void fp8_linear(const LinearShape& shape, LinearPass pass, RowFormat format, ConstMatrix x,
                const float* weight, Store store, Matrix y, const Fp8Context& context) {
  Workspace space(context.workspace);
  const LinearScratch scratch(space, shape.out, shape.in);
  const bool forward = pass == LinearPass::kForward;
  const int64_t depth = forward ? shape.in : shape.out;
  const int64_t width = forward ? shape.out : shape.in;
  for (int64_t g = 0; g < shape.group_count; ++g) {
    const int64_t end = shape.offsets[g + 1];
    if (shape.offsets[g] == end) continue;
    HWY_DYNAMIC_DISPATCH(quantize_blocks)
    (shape.out, shape.in, weight + g * shape.group_stride, scratch.weight.codes,
     scratch.weight.scales);
    for (int64_t row = shape.offsets[g]; row < end; row += kRowsMax) {
      const int64_t count = std::min(kRowsMax, end - row);
      HWY_DYNAMIC_DISPATCH(quantize_rows)
      (count, depth, {x.data + row * x.stride, x.stride}, tile_format(format),
       {scratch.rows.codes, depth}, scratch.rows.scales);
      multiply(shape, pass, count, scratch, context);
      for (int64_t i = 0; i < count; ++i) {
        HWY_DYNAMIC_DISPATCH(store_bf16)
        (width, scratch.rows.sums + i * width, store == Store::kAccumulate,
         y.data + (row + i) * y.stride);
      }
    }
  }
}

void fp8_linear_weight_gradient(const LinearShape& shape, RowFormat dy_format, ConstMatrix dy,
                                RowFormat x_format, ConstMatrix x, float* dweight,
                                const Fp8Context& context) {
  Workspace space(context.workspace);
  const GradientScratch s(space, shape.out, shape.in);
  for (int64_t g = 0; g < shape.group_count; ++g) {
    const int64_t begin = shape.offsets[g];
    const int64_t end = shape.offsets[g + 1];
    if (begin == end) continue;
    for (int64_t row = begin; row < end; row += kTileWidth) {
      const int64_t count = std::min(kTileWidth, end - row);
      columns_of(count, shape.out, dy_format, {dy.data + row * dy.stride, dy.stride}, s.dy,
                 s.dy_scales);
      columns_of(count, shape.in, x_format, {x.data + row * x.stride, x.stride}, s.x, s.x_scales);
      for (int64_t i = 0; i < shape.out; i += kTileWidth) {
        const int64_t height = std::min(kTileWidth, shape.out - i);
        interval_product({.m = height,
                          .n = shape.in,
                          .k = count,
                          .a = s.dy + i,
                          .a_row_stride = 1,
                          .a_depth_stride = shape.out,
                          .b = s.x,
                          .b_depth_stride = shape.in,
                          .b_column_stride = 1,
                          .c = s.product,
                          .c_stride = shape.in},
                         context, nullptr);
        for (int64_t r = 0; r < height; ++r) {
          HWY_DYNAMIC_DISPATCH(promote)
          (shape.in, s.product + r * shape.in, s.dy_scales[i + r], s.x_scales, row == begin,
           s.sums + (i + r) * shape.in);
        }
      }
    }
    float* const to = dweight + g * shape.group_stride;
    for (int64_t i = 0; i < shape.out * shape.in; ++i) to[i] += s.sums[i];
  }
}

void round_rows(RowFormat format, int64_t rows, int64_t width, ConstMatrix x, Matrix y) {
  if (format != RowFormat::kFp32 && format != RowFormat::kBf16) {
    HWY_DYNAMIC_DISPATCH(quantize_rows)(rows, width, x, tile_format(format), y, nullptr);
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* const from = x.data + i * x.stride;
    float* const to = y.data + i * y.stride;
    if (format == RowFormat::kBf16) {
      HWY_DYNAMIC_DISPATCH(store_bf16)(width, from, false, to);
    } else if (from != to) {
      std::copy_n(from, width, to);
    }
  }
}

}  // namespace penstock::cpu
#endif  // HWY_ONCE
