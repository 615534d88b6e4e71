#include "checkpoint/write_buffers.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "checkpoint/file_system.h"

namespace penstock {

Result<WriteBuffers> WriteBuffers::make(uint64_t budget_bytes) {
  const auto count = std::min<size_t>(budget_bytes / kWriteBufferBytes, kStartedWritesMax);
  if (count < 2) {
    return invalid_argument(fmt::format(
        "{} bytes to write checkpoints through are too few: two buffers of {} bytes are needed",
        budget_bytes, kWriteBufferBytes));
  }
  const uint64_t bytes = count * kWriteBufferBytes;
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(kDirectAlignment, bytes));
  if (memory == nullptr) {
    return resource_exhausted(
        fmt::format("no memory for {} bytes to write checkpoints through", bytes));
  }
  return WriteBuffers(memory, count);
}

void WriteBuffers::touch() {
  std::memset(memory_.get(), 0, byte_count());
}

}  // namespace penstock
