// Which devices there are, and memory on them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

namespace penstock::cuda {

struct DeviceInfo {
  int index = 0;
  std::string name;  // "NVIDIA H100 80GB HBM3"
  int major = 0;     // compute capability
  int minor = 0;
  int multiprocessors = 0;
  int64_t memory_bytes = 0;
  int64_t l2_bytes = 0;
  // Operations here are built for compute capability 8.x and 9.0.
  bool supported() const { return major == 8 || (major == 9 && minor == 0); }
};

struct DeviceList {
  std::vector<DeviceInfo> devices;
  std::string reason;  // why there is none, as the driver or its absence says: "no CUDA-capable …"
};

// Never fails: a machine without a driver has no devices. Makes no context.
DeviceList list_devices();

// One allocation, all of a kind's memory for the life of a rank. Bump allocation, as
// kernels/arena.h, which describes take() and rewinding; 256-byte aligned.
class DeviceArena {
 public:
  static constexpr int64_t kAlignmentBytes = 256;  // what cudaMalloc gives

  // Of the current device. Check failure() before the first take(): without memory there is nothing
  // to take from.
  explicit DeviceArena(int64_t capacity_bytes);
  ~DeviceArena();
  DeviceArena(const DeviceArena&) = delete;
  DeviceArena& operator=(const DeviceArena&) = delete;

  // cudaSuccess, or why the memory could not be had.
  cudaError_t failure() const { return failure_; }
  // `count` elements, contents unspecified; null: more than what is left.
  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * static_cast<int64_t>(sizeof(T))));
  }
  int64_t used_bytes() const { return used_bytes_; }
  int64_t capacity_bytes() const { return capacity_bytes_; }
  // REQUIRES: bytes <= used_bytes(). What was taken since is void.
  void rewind(int64_t bytes) { used_bytes_ = bytes; }

 private:
  void* take_bytes(int64_t bytes);

  std::byte* base_ = nullptr;
  int64_t capacity_bytes_ = 0;
  int64_t used_bytes_ = 0;
  cudaError_t failure_ = cudaSuccess;
};

}  // namespace penstock::cuda
