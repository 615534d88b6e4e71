// One large range of address space, reserved at once and backed by pages only where it is touched:
// worst-case buffers at fixed addresses, without paying for the worst case.
#pragma once

#include <cstddef>
#include <cstdint>

#include "comm/base/status.h"

namespace penstock {

// Move-only owner. Zeroed when first touched.
class ReservedMemory {
 public:
  static Result<ReservedMemory> reserve(uint64_t bytes);
  ReservedMemory() = default;
  ~ReservedMemory();
  ReservedMemory(ReservedMemory&& other) noexcept;
  ReservedMemory& operator=(ReservedMemory&& other) noexcept;
  std::byte* data() const { return data_; }

  // Hands out consecutive, cache-line aligned arrays. Run once over nullptr to learn how much to
  // reserve, and once over the memory.
  class Carver {
   public:
    explicit Carver(std::byte* base) : base_(base) {}
    template <typename T>
    void take(T*& array, uint64_t count) {
      array = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
      bytes_ += round_up(count * sizeof(T));
    }
    uint64_t bytes() const { return bytes_; }
    static constexpr uint64_t round_up(uint64_t bytes) {
      return (bytes + kAlignment - 1) / kAlignment * kAlignment;
    }

   private:
    static constexpr uint64_t kAlignment = 64;
    std::byte* const base_;
    uint64_t bytes_ = 0;
  };

 private:
  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
};

}  // namespace penstock
