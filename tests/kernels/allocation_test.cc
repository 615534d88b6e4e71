// Steady-state steps allocate nothing: counts the calls of operator new while the CPU backend
// computes.
#include <gtest/gtest.h>

#include <functional>
#include <vector>

#include "kernels/arena.h"
#include "kernels/cpu/cpu_kernels.h"
#include "tests/support/allocation_counter.h"

namespace penstock {
namespace {

uint64_t allocations_of(const std::function<void()>& body) {
  const uint64_t before = allocations_of_this_thread();
  body();
  return allocations_of_this_thread() - before;
}

TEST(AllocationTest, TheCounterCounts) {
  EXPECT_GT(allocations_of([] { std::vector<float> v(100); }), 0U);
}

TEST(AllocationTest, NoOperationOfTheCpuBackendAllocates) {
  constexpr int64_t kRows = 100, kWidth = 96;
  constexpr AttentionShape kShape = {1, kRows, 2, 16, 8, 24};
  constexpr RouterShape kRouter = {kRows, 8, 4, 2, 2, true, 1.0F};
  const auto k = make_cpu_kernels();
  Arena arena("allocation test", 8 << 20);
  const auto zeros = [&](int64_t count) { return arena.floats(count); };
  float* const x = zeros(kRows * kWidth);
  float* const y = zeros(kRows * kWidth);
  float* const z = zeros(kRows * kWidth);
  float* const w = zeros(kWidth * kWidth);
  float* const small = zeros(4 * kRows);
  int32_t* const ids = arena.int32s(2 * kRows);
  int64_t* const counts = arena.int64s(8);
  float* const workspace = zeros(k->attention_workspace_floats(kShape));
  float* const fp8 = zeros(k->fp8_workspace_floats(32, kWidth));
  const AttentionInputs in = {{x, 48, 24}, {y, 80, 40}, {w, 8}, {y + 16, 80, 40}};
  const int64_t offsets[] = {0, 40, 40, kRows};
  float* const d = zeros(kRows * (48 + 80 + 8));
  EXPECT_EQ(0U, allocations_of([&] {
              k->matmul(kRows, kWidth, kWidth, {x, kWidth}, Transpose::kNo, {w, kWidth},
                        Transpose::kYes, Store::kOverwrite, {z, kWidth});
              k->grouped_matmul(3, offsets, 32, kWidth, {x, kWidth}, {w, kWidth}, 32 * kWidth,
                                Transpose::kYes, Store::kOverwrite, {z, kWidth});
              k->grouped_matmul_ragged_k(3, offsets, 32, kWidth, {z, kWidth}, {x, kWidth},
                                         {w, kWidth}, 32 * kWidth);
              k->fp8_linear({32, kWidth, 3, offsets, 32 * kWidth}, RowFormat::kE4m3, {x, kWidth}, w,
                            Store::kOverwrite, {z, kWidth}, fp8);
              k->fp8_linear_input_gradient({32, kWidth, 3, offsets, 32 * kWidth}, RowFormat::kE4m3,
                                           {z, kWidth}, w, Store::kOverwrite, {y, kWidth}, fp8);
              k->fp8_linear_weight_gradient({32, kWidth, 3, offsets, 32 * kWidth}, RowFormat::kE4m3,
                                            {z, kWidth}, RowFormat::kE4m3, {x, kWidth}, w, fp8);
              k->round_rows(RowFormat::kE4m3, kRows, kWidth, {x, kWidth}, {x, kWidth});
              k->rms_norm(kRows, kWidth, {x, kWidth}, w, 1e-6F, {y, kWidth}, small);
              k->rms_norm_backward(kRows, kWidth, {x, kWidth}, w, small, {y, kWidth},
                                   Store::kOverwrite, {z, kWidth}, w);
              k->rope(kRows, kRows, 2, 8, w, w, false, {x, 48, 24});
              k->attention(kShape, 0.2F, in, {z, 48, 24}, small, workspace);
              k->attention_backward(
                  kShape, 0.2F, in, {z, 48, 24}, small, {x, 48, 24},
                  {{d, 48, 24}, {d + 4800, 80, 40}, {d + 12800, 8}, {d + 4816, 80, 40}}, workspace);
              k->swiglu(kRows, 48, {x, kWidth}, {x + 48, kWidth}, {z, kWidth});
              k->swiglu_backward(kRows, 48, {x, kWidth}, {x + 48, kWidth}, {z, kWidth}, {y, kWidth},
                                 {y + 48, kWidth});
              k->router(kRouter, {x, 8}, w, y, ids, small, counts);
              k->router_backward(kRouter, y, ids, small, {z, 8});
              k->cross_entropy(kRows, 8, {x, 8}, ids, 0.1F, small, {y, 8});
              k->gather_rows(kRows, kWidth, kRows, {x, kWidth}, ids, small, {z, kWidth});
              k->scatter_add_rows(kRows, kWidth, kRows, {z, kWidth}, ids, small, {x, kWidth});
              k->adamw(kRows, {.lr = 0.1F}, x, {x, y, z}, {x, y, z});
              small[0] = static_cast<float>(k->sum_of_squares(kRows * kWidth, x));
            }));
}

}  // namespace
}  // namespace penstock
