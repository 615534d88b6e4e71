#include "kernels/cuda/device.h"

#include <cstddef>

namespace penstock::cuda {

DeviceList list_devices() {
  DeviceList list;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch would be blamed for it
    list.reason = cudaGetErrorString(error);
    return list;
  }
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) continue;
    list.devices.push_back({index, properties.name, properties.major, properties.minor,
                            properties.multiProcessorCount,
                            static_cast<int64_t>(properties.totalGlobalMem),
                            static_cast<int64_t>(properties.l2CacheSize)});
  }
  if (list.devices.empty()) list.reason = "the driver lists no device";
  return list;
}

DeviceArena::DeviceArena(int64_t capacity_bytes) : capacity_bytes_(capacity_bytes) {
  if (capacity_bytes == 0) return;
  void* base = nullptr;
  failure_ = cudaMalloc(&base, static_cast<size_t>(capacity_bytes));
  if (failure_ != cudaSuccess) capacity_bytes_ = 0;
  base_ = static_cast<std::byte*>(base);
}

DeviceArena::~DeviceArena() {
  if (base_ != nullptr) cudaFree(base_);
}

void* DeviceArena::take_bytes(int64_t bytes) {
  const int64_t rounded = (bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
  if (rounded > capacity_bytes_ - used_bytes_) return nullptr;
  std::byte* const taken = base_ + used_bytes_;
  used_bytes_ += rounded;
  return taken;
}

}  // namespace penstock::cuda
