// The generations of a rank's state in memory.
#include <gtest/gtest.h>

#include "tests/worker/engine_test_support.h"
#include "worker/engine/engine.h"
#include "worker/engine/state_memory.h"

namespace penstock {
namespace {

constexpr HeldStateIdentity kIdentity{JobId{7}, Rank{3}, {1, 2}};

TEST(StateMemoryTest, GenerationsAreZeroAndNoneIsWhole) {
  const Result<StateMemory> memory = StateMemory::make(kIdentity, 4096);
  ASSERT_TRUE(memory.ok()) << memory.status().to_string();
  EXPECT_EQ(memory->byte_count(), held_state_bytes(4096));
  for (size_t g = 0; g < kStateGenerations; ++g) {
    EXPECT_EQ(memory->step_of(g), -1);
    for (size_t i = 0; i < 4096; ++i) ASSERT_EQ(memory->generation(g)[i], std::byte{0});
  }
  EXPECT_FALSE(memory->find(0));
  EXPECT_FALSE(memory->find(-1));
}

TEST(StateMemoryTest, AGenerationIsWholeFromPublishUntilItIsWrittenAgain) {
  Result<StateMemory> memory = StateMemory::make(kIdentity, 4096);
  ASSERT_TRUE(memory.ok());
  memory->publish(1, 8);
  memory->publish(2, 9);
  EXPECT_EQ(memory->find(8), 1u);
  EXPECT_EQ(memory->find(9), 2u);
  memory->begin_writing(1);
  EXPECT_FALSE(memory->find(8));
  EXPECT_EQ(memory->find(9), 2u);
}

TEST(StateMemoryTest, NoMemoryIsAnErrorAtTheStart) {
  const Result<StateMemory> memory = StateMemory::make(kIdentity, uint64_t{1} << 50);
  EXPECT_EQ(memory.status().code(), Code::kResourceExhausted);
}

class HeldStateTest : public testing::Test {
 protected:
  void SetUp() override { write_tiny_corpus(directory_.path()); }
  static std::vector<std::byte> bytes_of(std::span<const SliceSource> sources) {
    std::vector<std::byte> all;
    for (const SliceSource& source : sources) {
      all.insert(all.end(), source.bytes.begin(), source.bytes.end());
    }
    return all;
  }
  ScratchDirectory directory_;
};

TEST_F(HeldStateTest, StaysAsItIsWhileStepsGoOn) {
  JobSpec spec = tiny_spec(directory_.path(), {}, 8);
  spec.optimizer.ema_decay = 0.9;
  StandaloneOptions options = tiny_run(spec);
  options.on_loaded = [](Engine& engine) {
    TrainingState& state = engine.state();
    const auto train_through = [&](int64_t step) {
      while (state.step() < step) {
        ASSERT_TRUE(engine.train_step(state.step() + 1).ok());
      }
      engine.settle();
    };
    train_through(2);
    const std::span<const SliceSource> held = state.hold();
    const std::vector<std::byte> before = bytes_of(held);
    EXPECT_EQ(before.size(), state.save_bytes());
    for (int64_t step = 3; step <= 6; ++step) {
      train_through(step);
      EXPECT_EQ(bytes_of(held), before) << "after step " << step;
      EXPECT_NE(bytes_of(state.to_save()), before);
    }
    state.release();
    train_through(8);
    EXPECT_NE(bytes_of(held), before) << "released, its memory is used again";
  };
  train_tiny(options);
}

TEST_F(HeldStateTest, OneStepAtATimeIsHeld) {
  StandaloneOptions options = tiny_run(tiny_spec(directory_.path(), {}, 1));
  options.on_loaded = [](Engine& engine) {
    (void)engine.state().hold();
    EXPECT_DEATH((void)engine.state().hold(), "held_");
    engine.state().release();
  };
  train_tiny(options);
}

}  // namespace
}  // namespace penstock
