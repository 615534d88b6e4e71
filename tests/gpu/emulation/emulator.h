// Runs kernels on the host, so that what they compute is tested where there is no device: included
// before a .cu file that is compiled as C++. A launch runs its blocks one after the other, each
// thread of a block as a fiber; where a warp or a block does something together, fibers wait for
// each other.
//
// It shows wrong indices, wrong sums, missing barriers (threads run far ahead of each other) and
// shuffles that not all lanes of a warp come to. It shows nothing of memory ordering, of alignment
// or of speed, and knows no instruction of tensor cores or asynchronous copies.
#pragma once

#define PENSTOCK_EMULATED 1

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>

#include "kernels/cuda/stream.h"

namespace penstock::emulation {

struct Thread {
  dim3 thread;
  dim3 block;
  int number = 0;  // in its block
};
const Thread& current();

void run(dim3 grid, dim3 block, const std::function<void()>& thread);
void sync_block();
void sync_warp();
// What lane `from` of this thread's warp holds in `value`; 8 bytes at most.
uint64_t exchange(uint64_t value, int from);
unsigned char* shared_memory();

template <typename T>
T exchange_value(T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, from);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace penstock::emulation

namespace penstock::cuda {

template <typename... Parameters, typename... Arguments>
void launch(Stream&, const char*, dim3 grid, dim3 block, size_t, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  emulation::run(grid, block, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::shared_memory());
}

}  // namespace penstock::cuda

// ---- what device code is written with

#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define threadIdx (::penstock::emulation::current().thread)
#define blockIdx (::penstock::emulation::current().block)

inline void __syncthreads() {
  penstock::emulation::sync_block();
}
inline void __syncwarp() {
  penstock::emulation::sync_warp();
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  using namespace penstock::emulation;
  return exchange_value(value, current().number % 32 ^ distance);
}
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return penstock::emulation::exchange_value(value, from);
}
template <typename T>
unsigned __match_any_sync(unsigned, T value) {
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane) {
    same |= static_cast<unsigned>(penstock::emulation::exchange_value(value, lane) == value)
            << lane;
  }
  return same;
}
inline unsigned __ballot_sync(unsigned, bool value) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    votes |= static_cast<unsigned>(penstock::emulation::exchange_value(value, lane)) << lane;
  }
  return votes;
}
inline int __popc(unsigned bits) {
  return std::popcount(bits);
}
inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}
inline unsigned __float_as_uint(float value) {
  return std::bit_cast<unsigned>(value);
}
inline float rsqrtf(float x) {
  return 1.0F / std::sqrt(x);
}
// Blocks follow each other, and a fiber gives way only where it waits.
template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
