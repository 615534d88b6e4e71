// The memory that a segment's bytes pass through on their way to the disk (copied to, checksummed
// and digested in, and written from) or from it. Its size is a promise: writing and reading use no
// more, and wait when all of it is on the way.
#pragma once

#include <cstdlib>
#include <memory>

#include "comm/base/bytes.h"
#include "comm/base/status.h"

namespace penstock {

// Disks take four writes of this size at a time as fast as larger ones, and more would only take
// memory; a few more reads hide what verifying takes (docs/benchmarks/checkpoint.md).
inline constexpr uint64_t kDiskBufferBytes = 1 << 20;
inline constexpr uint64_t kWriteBudgetBytes = 4 * kDiskBufferBytes;
inline constexpr uint64_t kReadBudgetBytes = 8 * kDiskBufferBytes;

class DiskBuffers {
 public:
  // As many buffers as the budget holds, at most kStartedWritesMax, aligned for direct writes.
  //   kInvalidArgument    the budget does not hold the two that make copying and writing overlap
  //   kResourceExhausted  the memory is not there
  static Result<DiskBuffers> make(uint64_t budget_bytes = kWriteBudgetBytes);

  // Makes the pages be there now, so that no save fails for want of them, or waits for them.
  void touch();

  size_t count() const { return count_; }
  uint64_t byte_count() const { return count_ * kDiskBufferBytes; }
  // All of them, which are one piece of memory.
  MutableBytes memory() const { return {memory_.get(), byte_count()}; }
  // kDiskBufferBytes. REQUIRES: index < count().
  MutableBytes operator[](size_t index) const {
    return {memory_.get() + index * kDiskBufferBytes, kDiskBufferBytes};
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  DiskBuffers(std::byte* memory, size_t count) : memory_(memory), count_(count) {}

  std::unique_ptr<std::byte, Free> memory_;
  size_t count_;
};

}  // namespace penstock
