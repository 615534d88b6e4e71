// Vector helpers of the CPU backend, compiled once per instruction set: include after highway.h,
// between nothing; it opens and closes its own per-target namespace.
//
// Every sum here runs over kSumLanes interleaved partial sums that are folded in halves, whatever
// the vector width, and elementwise code gives a tail the same operations as a full vector. So AVX2
// and AVX-512 hosts compute the same bits, and a run may resume on the other kind.

// In place of #pragma once: Highway compiles this once per target, not once per file.
#if defined(PENSTOCK_KERNELS_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PENSTOCK_KERNELS_CPU_SIMD_INL_H_
#undef PENSTOCK_KERNELS_CPU_SIMD_INL_H_
#else
#define PENSTOCK_KERNELS_CPU_SIMD_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>

HWY_BEFORE_NAMESPACE();
namespace penstock::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Lanes = hn::CappedTag<float, 16>;
using Four = hn::CappedTag<float, 4>;  // for tails
using One = hn::CappedTag<float, 1>;
constexpr int64_t kLaneCount = static_cast<int64_t>(hn::MaxLanes(Lanes()));
constexpr int64_t kFourCount = static_cast<int64_t>(hn::MaxLanes(Four()));
constexpr int64_t kSumLanes = 32;

// body(tag, i) over [0, count) in steps of the tag's lanes: whole vectors, then fours, then ones.
template <class Body>
HWY_INLINE void for_lanes(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLaneCount <= count; i += kLaneCount) body(Lanes(), i);
  for (; i + kFourCount <= count; i += kFourCount) body(Four(), i);
  for (; i < count; ++i) body(One(), i);
}

// Adds kSumLanes partial sums in halves: j and j + 16, then j and j + 8, …
HWY_INLINE float fold(float* HWY_RESTRICT sums) {
  const Lanes d;
  for (int64_t half = kSumLanes / 2; half >= kLaneCount; half /= 2) {
    for (int64_t j = 0; j < half; j += kLaneCount) {
      hn::StoreU(hn::Add(hn::LoadU(d, sums + j), hn::LoadU(d, sums + j + half)), d, sums + j);
    }
  }
  for (int64_t half = kLaneCount / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

// Sum over [0, count): body(tag, i, sum) returns `sum` plus the terms of its lanes.
template <class Body>
HWY_INLINE float sum_lanes(int64_t count, const Body& body) {
  constexpr int64_t kParts = kSumLanes / kLaneCount;
  const Lanes d;
  hn::Vec<Lanes> part[kParts];
  for (int64_t v = 0; v < kParts; ++v) part[v] = hn::Zero(d);
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    for (int64_t v = 0; v < kParts; ++v) part[v] = body(d, i + v * kLaneCount, part[v]);
  }
  alignas(64) float sums[kSumLanes];
  for (int64_t v = 0; v < kParts; ++v) hn::Store(part[v], d, sums + v * kLaneCount);
  const int64_t whole = i;
  for (; i + kFourCount <= count; i += kFourCount) {
    float* const at = sums + (i - whole);
    hn::StoreU(body(Four(), i, hn::LoadU(Four(), at)), Four(), at);
  }
  for (; i < count; ++i) {
    float* const at = sums + (i - whole);
    hn::StoreU(body(One(), i, hn::LoadU(One(), at)), One(), at);
  }
  return fold(sums);
}

// The largest of x[0, count); unspecified when one is NaN. REQUIRES: count > 0.
HWY_INLINE float max_of(int64_t count, const float* x) {
  const Lanes d;
  auto largest = hn::Set(d, x[0]);
  int64_t i = 0;
  for (; i + kLaneCount <= count; i += kLaneCount) largest = hn::Max(largest, hn::LoadU(d, x + i));
  float result = hn::GetLane(hn::MaxOfLanes(d, largest));
  for (; i < count; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// e^x to about 1 unit in the last place: Cody & Waite reduction by ln 2 in two parts, then the
// minimax polynomial of Moshier's Cephes expf. Below -87.33 it is 0, above 88.37 infinity; NaN
// stays NaN (which hwy/contrib/math would turn into 0).
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp_lanes(D d, V x) {
  const hn::RebindToSigned<D> di;
  const V low = hn::Set(d, -87.33654F);
  const V high = hn::Set(d, 88.72284F);
  const auto below = hn::Lt(x, low);
  V clamped = hn::IfThenElse(below, low, x);  // comparisons, not Max: those keep NaN
  clamped = hn::IfThenElse(hn::Gt(clamped, high), high, clamped);
  const auto exponent = hn::NearestInt(hn::Mul(clamped, hn::Set(d, 1.44269504088896341F)));
  const V n = hn::ConvertTo(d, exponent);
  V r = hn::NegMulAdd(n, hn::Set(d, 0.693359375F), clamped);
  r = hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4F), r);
  V p = hn::Set(d, 1.9875691500e-4F);
  p = hn::MulAdd(p, r, hn::Set(d, 1.3981999507e-3F));
  p = hn::MulAdd(p, r, hn::Set(d, 8.3334519073e-3F));
  p = hn::MulAdd(p, r, hn::Set(d, 4.1665795894e-2F));
  p = hn::MulAdd(p, r, hn::Set(d, 1.6666665459e-1F));
  p = hn::MulAdd(p, r, hn::Set(d, 5.0000001201e-1F));
  p = hn::Add(hn::MulAdd(p, hn::Mul(r, r), r), hn::Set(d, 1.0F));
  const auto biased = hn::Add(exponent, hn::Set(di, 127));
  const V power = hn::BitCast(d, hn::ShiftLeft<23>(biased));
  return hn::IfThenZeroElse(below, hn::Mul(p, power));
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V sigmoid_lanes(D d, V x) {
  const V one = hn::Set(d, 1.0F);
  return hn::Div(one, hn::Add(one, exp_lanes(d, hn::Neg(x))));
}

}  // namespace penstock::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
