#include "tests/support/allocation_counter.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace {
thread_local uint64_t thread_count = 0;
std::atomic<uint64_t> process_count{0};
}  // namespace

void* operator new(size_t size, const std::nothrow_t&) noexcept {
  ++thread_count;
  process_count.fetch_add(1, std::memory_order_relaxed);
  return std::malloc(size > 0 ? size : 1);
}
void* operator new(size_t size) {
  void* const memory = operator new(size, std::nothrow);
  if (memory == nullptr) std::abort();
  return memory;
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, size_t) noexcept {
  std::free(memory);
}

namespace penstock {

uint64_t allocations_of_this_thread() {
  return thread_count;
}
uint64_t allocations_of_this_process() {
  return process_count.load(std::memory_order_relaxed);
}

}  // namespace penstock
