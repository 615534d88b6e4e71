// A repeated step of the model takes nothing from the heap.
#include <gtest/gtest.h>

#include "kernels/cpu/cpu_kernels.h"
#include "tests/support/allocation_counter.h"
#include "tests/worker/model_test_support.h"

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
  const uint64_t before = allocations_of_this_process();
  step();
  EXPECT_EQ(allocations_of_this_process() - before, 0U);
  EXPECT_GT(before, 0U) << "the counter does not count";
}

}  // namespace
}  // namespace penstock
