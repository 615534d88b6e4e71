// Steady-state steps allocate nothing: every operator new of the process is counted.
#include <gtest/gtest.h>

#include "tests/support/allocation_counter.h"
#include "tests/worker/engine_test_support.h"

namespace penstock {
namespace {

TEST(EngineAllocationTest, StepsAfterTheFirstAllocateNothing) {
  ScratchDirectory directory;
  write_tiny_corpus(directory.path());
  for (const TinyLayout& layout :
       {TinyLayout{1, 1, 1, Schedule::kOneForwardOneBackward},
        TinyLayout{2, 2, 1, Schedule::kDualPipe}, TinyLayout{2, 2, 1, Schedule::kDualPipeV},
        TinyLayout{2, 1, 2, Schedule::kZeroBubble}, TinyLayout{4, 2, 1, Schedule::kDualPipe}}) {
    JobSpec spec = tiny_spec(directory.path(), layout, 8);
    const int64_t replicas = layout.expert * layout.data;
    spec.parallelism.microbatch_levels = {{4, 48 / replicas}, {6, 16 / replicas}};
    spec.training.recompute = {.norms = true, .mla_up = true};
    if (layout.pipeline == 2) spec.training.precision = Precision::kFp8;
    spec.model.num_nextn_predict_layers = 1;
    spec.model.aux_loss_alpha = 0.01;
    spec.optimizer.moments = MomentType::kBf16;
    spec.optimizer.ema_decay = 0.9;
    spec.guards.loss_spike = {GuardPolicy::kWarn, 6.0, 4};
    spec.guards.grad_norm_spike = {GuardPolicy::kSkip, 1e6, 4};
    StandaloneOptions options = tiny_run(spec);
    uint64_t after_second = 0;
    uint64_t after_last_but_one = 0;
    // Ranks are within one step of each other, so between these two moments of rank 0 all the
    // others run whole steps only, too.
    options.on_step = [&](const StepResult& step) {
      if (step.step == 2) after_second = allocations_of_this_process();
      if (step.step == 7) after_last_but_one = allocations_of_this_process();
    };
    train_tiny(options);
    ASSERT_GT(after_second, 0U);  // the counter works
    EXPECT_EQ(after_last_but_one - after_second, 0U) << to_string(layout);
  }
}

}  // namespace
}  // namespace penstock
