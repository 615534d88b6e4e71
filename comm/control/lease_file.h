// Until when the ranks of a host may run: eight bytes that a daemon writes through shared memory
// and its ranks read, so that they keep to it also where the daemon itself is stopped or stuck. In
// memory, not on a disk, which could make the writer wait.
#pragma once

#include <cstdint>
#include <limits>

#include "comm/base/file.h"
#include "comm/base/status.h"

namespace penstock {

// Any thread. Move-only; the mapping goes with it.
class LeaseFile {
 public:
  static constexpr int64_t kEndless = std::numeric_limits<int64_t>::max();

  // Endless to begin with.
  static Result<LeaseFile> create();
  // The one at path() of the process that made it.
  static Result<LeaseFile> open(const Path& path);
  LeaseFile(LeaseFile&& other) noexcept
      : memory_(std::move(other.memory_)), word_(std::exchange(other.word_, nullptr)) {}
  LeaseFile& operator=(LeaseFile&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(word_, other.word_);
    return *this;
  }
  ~LeaseFile();

  // For other processes of this user, while the one that made it lives.
  Path path() const;
  // Of the host's monotonic clock.
  int64_t end_ns() const;
  void set(int64_t end_ns);
  // Never makes it shorter; one that was endless is set.
  void extend_to(int64_t end_ns);

 private:
  LeaseFile(FileDescriptor memory, int64_t* word) : memory_(std::move(memory)), word_(word) {}
  FileDescriptor memory_;
  int64_t* word_ = nullptr;
};

}  // namespace penstock
