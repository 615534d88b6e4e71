#include "worker/engine/state_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>

#include "comm/base/check.h"

namespace penstock {
namespace {

// The file, of the size wanted; *found when it had that size before.
Result<FileDescriptor> open_sized(const Path& file, uint64_t byte_count, bool* found) {
  PENSTOCK_TRY_ASSIGN(FileDescriptor descriptor, open_file(file, O_RDWR));
  struct stat info = {};
  if (::fstat(descriptor.get(), &info) != 0) {
    return errno_status(errno, "state of " + file.string());
  }
  *found = static_cast<uint64_t>(info.st_size) == byte_count;
  if (!*found && (::ftruncate(descriptor.get(), 0) != 0 ||
                  ::ftruncate(descriptor.get(), static_cast<off_t>(byte_count)) != 0)) {
    return errno_status(errno, fmt::format("{}: {} bytes", file.string(), byte_count));
  }
  return descriptor;
}

bool is_of(const HeldStateHead& head, const HeldStateIdentity& identity, uint64_t byte_count) {
  const Result<HeldState> held = read_held_state(head, byte_count);
  return held.ok() && held->identity == identity;
}

}  // namespace

Result<StateMemory> StateMemory::make(const HeldStateIdentity& identity, uint64_t generation_bytes,
                                      const Path& file) {
  const uint64_t byte_count = held_state_bytes(generation_bytes);
  bool found = false;
  FileDescriptor descriptor;
  if (!file.empty()) {
    PENSTOCK_TRY_ASSIGN(descriptor, open_sized(file, byte_count, &found));
  }
  const int flags = descriptor.valid() ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
  void* const mapping = ::mmap(nullptr, byte_count, PROT_READ | PROT_WRITE, flags,
                               descriptor.valid() ? descriptor.get() : -1, 0);
  if (mapping == MAP_FAILED) {
    return resource_exhausted(
        fmt::format("no memory for {} bytes of training state: {}", byte_count, strerror(errno)));
  }
  StateMemory memory(static_cast<std::byte*>(mapping), generation_bytes);
  // Fewer translations to miss. A kernel without huge pages refuses, and nothing is lost.
  (void)::madvise(mapping, byte_count, MADV_HUGEPAGE);
  if (::madvise(mapping, byte_count, MADV_POPULATE_WRITE) != 0) {
    if (errno != EINVAL) {  // of kernels before 5.14
      return resource_exhausted(
          fmt::format("no memory for {} bytes of training state: {}", byte_count, strerror(errno)));
    }
    for (uint64_t at = 0; at < byte_count; at += kHeldStateHeadBytes) {
      volatile std::byte* const page = memory.base_ + at;
      *page = *page;
    }
  }
  if (found && is_of(memory.head(), identity, byte_count)) return memory;
  if (found) std::memset(mapping, 0, byte_count);
  auto* const head = new (mapping) HeldStateHead;
  head->job = identity.job.value;
  head->rank = identity.rank.value;
  head->contents = identity.contents;
  head->generation_bytes = generation_bytes;
  std::atomic_thread_fence(std::memory_order_seq_cst);  // the process may die at any time
  std::atomic_ref(head->magic).store(kHeldStateMagic, std::memory_order_relaxed);
  return memory;
}

StateMemory::~StateMemory() {
  if (base_ != nullptr) ::munmap(base_, byte_count());
}

void StateMemory::begin_writing(size_t index) {
  PENSTOCK_CHECK(index < kStateGenerations, index);
  head().steps[index].store(-1, std::memory_order_relaxed);
  // What follows must not be seen before this: the process may die between any two stores.
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void StateMemory::publish(size_t index, int64_t step) {
  PENSTOCK_CHECK(index < kStateGenerations && step >= 0, index, step);
  head().steps[index].store(step, std::memory_order_release);
}

int64_t StateMemory::step_of(size_t index) const {
  return head().steps[index].load(std::memory_order_acquire);
}

std::optional<size_t> StateMemory::find(int64_t step) const {
  for (size_t index = 0; index < kStateGenerations; ++index) {
    if (step >= 0 && step_of(index) == step) return index;
  }
  return std::nullopt;
}

}  // namespace penstock
