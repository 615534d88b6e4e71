// What kernels share: eight elements at a time, and sums over a warp. Device code only.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/view.h"

namespace penstock::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kVector = 8;  // elements that a lane moves at a time: 16 bytes of bf16
inline constexpr unsigned kAllLanes = 0xffffffffU;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// As many as there are, where only the device may know.
__device__ inline int64_t rows_of(const RowCount& rows) {
  return rows.count == nullptr ? rows.most : *rows.count;
}

// Eight neighbours as they lie in memory.
template <typename T>
struct Packed;

template <>
struct Packed<Bf16> {
  uint4 bits;
};
template <>
struct Packed<float> {
  float4 low;
  float4 high;
};

__device__ inline Packed<Bf16> load(const Bf16* from) {
  return {*reinterpret_cast<const uint4*>(from)};
}
__device__ inline Packed<float> load(const float* from) {
  const auto* vectors = reinterpret_cast<const float4*>(from);
  return {vectors[0], vectors[1]};
}

__device__ inline void unpack(const Packed<Bf16>& packed, float (&values)[kVector]) {
  const uint32_t words[4] = {packed.bits.x, packed.bits.y, packed.bits.z, packed.bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = __uint_as_float(words[i] << 16);
    values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000U);
  }
}
__device__ inline void unpack(const Packed<float>& packed, float (&values)[kVector]) {
  values[0] = packed.low.x;
  values[1] = packed.low.y;
  values[2] = packed.low.z;
  values[3] = packed.low.w;
  values[4] = packed.high.x;
  values[5] = packed.high.y;
  values[6] = packed.high.z;
  values[7] = packed.high.w;
}

__device__ inline uint32_t pack_pair(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <typename T>
__device__ Packed<T> pack(const float (&values)[kVector]);
template <>
__device__ inline Packed<Bf16> pack<Bf16>(const float (&values)[kVector]) {
  return {{pack_pair(values[0], values[1]), pack_pair(values[2], values[3]),
           pack_pair(values[4], values[5]), pack_pair(values[6], values[7])}};
}
template <>
__device__ inline Packed<float> pack<float>(const float (&values)[kVector]) {
  return {{values[0], values[1], values[2], values[3]},
          {values[4], values[5], values[6], values[7]}};
}

__device__ inline void put(Bf16* to, const Packed<Bf16>& packed) {
  *reinterpret_cast<uint4*>(to) = packed.bits;
}
__device__ inline void put(float* to, const Packed<float>& packed) {
  auto* vectors = reinterpret_cast<float4*>(to);
  vectors[0] = packed.low;
  vectors[1] = packed.high;
}

template <typename T>
__device__ inline void load_floats(const T* from, float (&values)[kVector]) {
  unpack(load(from), values);
}

// Over kLanes neighbouring lanes, in a fixed order; every lane gets the sum.
template <int kLanes = kWarp>
__device__ inline float sum_lanes(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}
// Likewise the largest; NaN where one is.
template <int kLanes = kWarp>
__device__ inline float max_lanes(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, value, distance);
    value = other > value || other != other ? other : value;
  }
  return value;
}

}  // namespace penstock::cuda
