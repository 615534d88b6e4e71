// How kernels are launched, and their dynamic shared memory. tests/gpu/emulation has both for a
// machine without a device and is then included before everything else.
#pragma once

#ifndef PENSTOCK_EMULATED

#include <cuda_runtime.h>

#include "kernels/cuda/stream.h"

namespace penstock::cuda {

// Launches `kernel` for `operation`, with `shared` bytes of dynamic shared memory. A launch that is
// refused is the stream's failure.
template <typename... Parameters, typename... Arguments>
void launch(Stream& stream, const char* operation, dim3 grid, dim3 block, size_t shared,
            void (*kernel)(Parameters...), Arguments&&... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared > kWithoutAsking) {
    stream.note(operation, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                static_cast<int>(shared)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream.get();
  stream.note(operation,
              cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

template <typename T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char penstock_dynamic_shared[];
  return reinterpret_cast<T*>(penstock_dynamic_shared);
}

}  // namespace penstock::cuda

#endif
