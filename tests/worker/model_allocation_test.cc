// Counts heap allocations: replaces the global operator new of this binary.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "kernels/cpu/cpu_kernels.h"
#include "tests/worker/model_test_support.h"

namespace {
std::atomic<int64_t> allocation_count{0};

void* counted(std::size_t size) {
  ++allocation_count;
  void* memory = std::malloc(size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
}  // namespace

void* operator new(std::size_t size) {
  return counted(size);
}
void* operator new[](std::size_t size) {
  return counted(size);
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete[](void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, std::size_t) noexcept {
  std::free(memory);
}

namespace penstock {
namespace {

TEST(AllocationTest, ARepeatedStepTakesNothingFromTheHeap) {
  const auto kernels = make_cpu_kernels();
  Pipeline pipeline({.model = tiny_model(), .stage_count = 2}, *kernels);
  pipeline.initialize(1);
  const TokenBatch batch = random_batch(tiny_model(), 3, 12, 1);
  const auto step = [&] {
    pipeline.train(batch, 1.0 / 36, BackwardMode::kInputThenWeight);
    pipeline.train(batch, 1.0 / 36, BackwardMode::kFull);
    pipeline.evaluate(batch);
  };
  step();
  const int64_t before = allocation_count;
  step();
  EXPECT_EQ(allocation_count - before, 0);
  EXPECT_GT(before, 0) << "the counter does not count";
}

}  // namespace
}  // namespace penstock
