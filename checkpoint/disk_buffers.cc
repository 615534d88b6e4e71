#include "checkpoint/disk_buffers.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "checkpoint/file_system.h"

namespace penstock {

Result<DiskBuffers> DiskBuffers::make(uint64_t budget_bytes) {
  const auto count = std::min<size_t>(budget_bytes / kDiskBufferBytes, kStartedWritesMax);
  if (count < 2) {
    return invalid_argument(fmt::format(
        "{} bytes to move checkpoints through are too few: two buffers of {} bytes are needed",
        budget_bytes, kDiskBufferBytes));
  }
  const uint64_t bytes = count * kDiskBufferBytes;
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(kDirectAlignment, bytes));
  if (memory == nullptr) {
    return resource_exhausted(
        fmt::format("no memory for {} bytes to move checkpoints through", bytes));
  }
  return DiskBuffers(memory, count);
}

void DiskBuffers::touch() {
  std::memset(memory_.get(), 0, byte_count());
}

}  // namespace penstock
