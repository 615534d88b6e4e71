#include "kernels/arena.h"

#include <sys/mman.h>

#include <cerrno>
#include <limits>

#include "comm/base/check.h"

namespace penstock {

int64_t Arena::rounded_bytes(int64_t count, int64_t element_bytes) {
  constexpr int64_t kBytesMax = std::numeric_limits<int64_t>::max() - kAlignmentBytes;
  PENSTOCK_CHECK(count >= 0 && element_bytes > 0 && count <= kBytesMax / element_bytes, count,
                 element_bytes);
  return (count * element_bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
}

Arena::Arena(std::string name, int64_t capacity_bytes)
    : name_(std::move(name)), capacity_bytes_(rounded_bytes(capacity_bytes, 1)) {
  if (capacity_bytes_ == 0) return;
  void* mapping = ::mmap(nullptr, static_cast<size_t>(capacity_bytes_), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  PENSTOCK_CHECK(mapping != MAP_FAILED, name_, "arena: mmap of", capacity_bytes_, "bytes: errno",
                 errno);
  // Activations of a few micro-batches outgrow what the translation caches cover in small pages. A
  // kernel without huge pages refuses, and nothing is lost.
  (void)::madvise(mapping, static_cast<size_t>(capacity_bytes_), MADV_HUGEPAGE);
  base_ = static_cast<std::byte*>(mapping);
}

Arena::~Arena() {
  if (base_ != nullptr) ::munmap(base_, static_cast<size_t>(capacity_bytes_));
}

void* Arena::take(int64_t count, int64_t element_bytes) {
  const int64_t bytes = rounded_bytes(count, element_bytes);
  const int64_t left_bytes = capacity_bytes_ - used_bytes_;
  PENSTOCK_CHECK(bytes <= left_bytes, name_, "arena: wanted", bytes, "bytes, left", left_bytes,
                 "of", capacity_bytes_);
  void* taken = base_ + used_bytes_;
  used_bytes_ += bytes;
  peak_bytes_ = used_bytes_ > peak_bytes_ ? used_bytes_ : peak_bytes_;
  return taken;
}

void Arena::rewind(Mark mark) {
  PENSTOCK_CHECK(mark.used_bytes >= 0 && mark.used_bytes <= used_bytes_, name_, mark.used_bytes,
                 used_bytes_);
  used_bytes_ = mark.used_bytes;
}

}  // namespace penstock
