#include "kernels/cpu/rows.h"

#include <cstring>

#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rows.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/cpu/simd_inl.h"

HWY_BEFORE_NAMESPACE();
namespace penstock::cpu::HWY_NAMESPACE {

void gather_rows(int64_t rows, int64_t width, ConstMatrix x, const int32_t* index,
                 const float* weights, Matrix y) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* const in = x.data + index[i] * x.stride;
    float* const out = y.data + i * y.stride;
    if (weights == nullptr) {
      std::memcpy(out, in, static_cast<size_t>(width) * sizeof(float));
      continue;
    }
    for_lanes(width, [&](auto d, int64_t j) HWY_ATTR {
      hn::StoreU(hn::Mul(hn::Set(d, weights[i]), hn::LoadU(d, in + j)), d, out + j);
    });
  }
}

void scatter_add_rows(int64_t rows, int64_t width, ConstMatrix x, const int32_t* index,
                      const float* weights, Matrix y) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* const in = x.data + i * x.stride;
    float* const out = y.data + index[i] * y.stride;
    const float weight = weights == nullptr ? 1.0F : weights[i];
    for_lanes(width, [&](auto d, int64_t j) HWY_ATTR {
      const auto sum = hn::MulAdd(hn::Set(d, weight), hn::LoadU(d, in + j), hn::LoadU(d, out + j));
      hn::StoreU(sum, d, out + j);
    });
  }
}

void add(int64_t count, const float* a, const float* b, float* y) {
  for_lanes(count, [&](auto d, int64_t j) HWY_ATTR {
    hn::StoreU(hn::Add(hn::LoadU(d, a + j), hn::LoadU(d, b + j)), d, y + j);
  });
}

void accumulate_rows(int64_t rows, int64_t width, ConstMatrix x, Matrix y) {
  for (int64_t i = 0; i < rows; ++i) {
    float* const out = y.data + i * y.stride;
    add(width, out, x.data + i * x.stride, out);
  }
}

void scale(int64_t count, float factor, float* x) {
  for_lanes(count, [&](auto d, int64_t j) HWY_ATTR {
    hn::StoreU(hn::Mul(hn::LoadU(d, x + j), hn::Set(d, factor)), d, x + j);
  });
}

double sum_of_squares(int64_t count, const float* x) {
  using Wide = hn::CappedTag<double, 8>;
  const Wide d;
  const hn::Rebind<float, Wide> narrow;
  constexpr int64_t kWideLanes = static_cast<int64_t>(hn::MaxLanes(Wide()));
  constexpr int64_t kParts = kSumLanes / kWideLanes;
  hn::Vec<Wide> part[kParts];
  for (int64_t v = 0; v < kParts; ++v) part[v] = hn::Zero(d);
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    for (int64_t v = 0; v < kParts; ++v) {
      const auto wide = hn::PromoteTo(d, hn::LoadU(narrow, x + i + v * kWideLanes));
      part[v] = hn::MulAdd(wide, wide, part[v]);
    }
  }
  alignas(64) double sums[kSumLanes];
  for (int64_t v = 0; v < kParts; ++v) hn::Store(part[v], d, sums + v * kWideLanes);
  // The square of a float is exact in double, so this is the same sum as a fused one.
  for (int64_t lane = 0; i < count; ++i, ++lane) sums[lane] += static_cast<double>(x[i]) * x[i];
  for (int64_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

void adamw(int64_t count, const AdamwStep& step, const float* gradient,
           const ConstAdamwState& previous, const AdamwState& next) {
  const float gradient_share1 = 1.0F - step.beta1;
  const float gradient_share2 = 1.0F - step.beta2;
  const float unbias1 = 1.0F / step.bias_correction1;
  const float unbias2 = 1.0F / step.bias_correction2;
  for_lanes(count, [&](auto d, int64_t j) HWY_ATTR {
    const auto g = hn::Mul(hn::Set(d, step.gradient_scale), hn::LoadU(d, gradient + j));
    const auto old_m = hn::Mul(hn::Set(d, step.beta1), hn::LoadU(d, previous.moment1 + j));
    const auto old_v = hn::Mul(hn::Set(d, step.beta2), hn::LoadU(d, previous.moment2 + j));
    const auto m = hn::MulAdd(hn::Set(d, gradient_share1), g, old_m);
    const auto v = hn::MulAdd(hn::Mul(hn::Set(d, gradient_share2), g), g, old_v);
    const auto root = hn::Sqrt(hn::Mul(v, hn::Set(d, unbias2)));
    const auto ratio =
        hn::Div(hn::Mul(m, hn::Set(d, unbias1)), hn::Add(root, hn::Set(d, step.eps)));
    const auto p = hn::LoadU(d, previous.parameter + j);
    const auto change = hn::MulAdd(hn::Set(d, step.weight_decay), p, ratio);
    hn::StoreU(hn::NegMulAdd(hn::Set(d, step.lr), change, p), d, next.parameter + j);
    hn::StoreU(m, d, next.moment1 + j);
    hn::StoreU(v, d, next.moment2 + j);
  });
}

}  // namespace penstock::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace penstock::cpu {

HWY_EXPORT(gather_rows);
HWY_EXPORT(scatter_add_rows);
HWY_EXPORT(accumulate_rows);
HWY_EXPORT(add);
HWY_EXPORT(scale);
HWY_EXPORT(sum_of_squares);
HWY_EXPORT(adamw);

void gather_rows(int64_t rows, int64_t width, ConstMatrix x, const int32_t* index,
                 const float* weights, Matrix y) {
  HWY_DYNAMIC_DISPATCH(gather_rows)(rows, width, x, index, weights, y);
}
void scatter_add_rows(int64_t rows, int64_t width, ConstMatrix x, const int32_t* index,
                      const float* weights, Matrix y) {
  HWY_DYNAMIC_DISPATCH(scatter_add_rows)(rows, width, x, index, weights, y);
}
void accumulate_rows(int64_t rows, int64_t width, ConstMatrix x, Matrix y) {
  HWY_DYNAMIC_DISPATCH(accumulate_rows)(rows, width, x, y);
}
void add(int64_t count, const float* a, const float* b, float* y) {
  HWY_DYNAMIC_DISPATCH(add)(count, a, b, y);
}
void scale(int64_t count, float factor, float* x) {
  HWY_DYNAMIC_DISPATCH(scale)(count, factor, x);
}
double sum_of_squares(int64_t count, const float* x) {
  return HWY_DYNAMIC_DISPATCH(sum_of_squares)(count, x);
}
void adamw(int64_t count, const AdamwStep& step, const float* gradient,
           const ConstAdamwState& previous, const AdamwState& next) {
  HWY_DYNAMIC_DISPATCH(adamw)(count, step, gradient, previous, next);
}

}  // namespace penstock::cpu
#endif  // HWY_ONCE
