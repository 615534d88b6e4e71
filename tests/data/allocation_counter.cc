#include "tests/data/allocation_counter.h"

#include <cstdlib>
#include <new>

namespace {
thread_local uint64_t allocation_count = 0;
}  // namespace

void* operator new(size_t size) {
  ++allocation_count;
  void* const memory = std::malloc(size);
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
  return allocation_count;
}

}  // namespace penstock
