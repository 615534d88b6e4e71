// The generations of a rank's state in memory.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <future>
#include <map>
#include <mutex>
#include <set>

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

// Publishes nothing before it is told to.
class HeldUpPublisher final : public RankProbe {
 public:
  explicit HeldUpPublisher(std::shared_future<void> told) : told_(std::move(told)) {}
  void on_step(const StepResult&) override {}
  void before_publish(int64_t) override { told_.wait(); }

 private:
  const std::shared_future<void> told_;
};

TEST_F(HeldStateTest, WhatIsNotPublishedIsNeitherSavedNorSteppedFrom) {
  JobSpec spec = tiny_spec(directory_.path(), {}, 1);
  spec.optimizer.ema_decay = 0.9;  // whose thread publishes
  StandaloneOptions options = tiny_run(spec);
  std::promise<void> tell;
  const std::shared_future<void> told = tell.get_future().share();
  options.make_probe = [&](Rank) -> Result<std::unique_ptr<RankProbe>> {
    return std::unique_ptr<RankProbe>(std::make_unique<HeldUpPublisher>(told));
  };
  options.on_loaded = [&](Engine& engine) {
    EXPECT_TRUE(engine.train_step(1).ok());
    EXPECT_DEATH((void)engine.state().hold(), "step_of");
    EXPECT_DEATH(engine.state().begin_step(), "step_of");
    tell.set_value();
    engine.settle();
    (void)engine.state().hold();
    engine.state().release();
  };
  train_tiny(options);
}

// Rank 0 publishes its first step late; rank 1 tells when it is past the sums of the second.
class LatePublisher final : public RankProbe {
 public:
  LatePublisher(Rank rank, std::promise<void>& passed) : rank_(rank), passed_(passed) {}
  void on_step(const StepResult& step) override {
    if (rank_.value == 1 && step.step == 2) passed_.set_value();
  }
  void before_publish(int64_t step) override {
    if (rank_.value != 0 || step != 1) return;
    EXPECT_EQ(passed_.get_future().wait_for(std::chrono::milliseconds(300)),
              std::future_status::timeout)
        << "a rank that dies now has nothing in common with the others";
  }

 private:
  const Rank rank_;
  std::promise<void>& passed_;
};

TEST_F(HeldStateTest, NoRankPassesTheSumsOfAStepBeforeEveryRankHasPublishedTheOneBefore) {
  JobSpec spec = tiny_spec(directory_.path(), {2, 1, 1, Schedule::kOneForwardOneBackward}, 3);
  spec.optimizer.ema_decay = 0.9;  // whose thread publishes
  StandaloneOptions options = tiny_run(spec);
  std::promise<void> passed;
  options.make_probe = [&](Rank rank) -> Result<std::unique_ptr<RankProbe>> {
    return std::unique_ptr<RankProbe>(std::make_unique<LatePublisher>(rank, passed));
  };
  train_tiny(options);
}

// Runs that end after a step, and others that go on from the memory they left.
class RestoreFromMemoryTest : public HeldStateTest {
 protected:
  JobSpec spec_of(const TinyLayout& layout) const {
    JobSpec spec = tiny_spec(directory_.path(), layout, 7);
    spec.optimizer.ema_decay = 0.9;
    spec.optimizer.moments = MomentType::kBf16;
    spec.optimizer.bias_update_speed = 0.01;  // so that the routers' biases count
    return spec;
  }
  std::function<Path(Rank)> files() {
    return [this](Rank rank) {
      const std::lock_guard lock(mutex_);
      FileDescriptor& memory = memory_[rank];
      if (!memory.valid()) memory = FileDescriptor(::memfd_create("state", MFD_CLOEXEC));
      return Path(fmt::format("/proc/self/fd/{}", memory.get()));
    };
  }
  // As the daemon reads them once the rank is gone.
  static std::vector<int64_t> steps_in(const FileDescriptor& memory) {
    alignas(HeldStateHead) std::array<std::byte, kHeldStateHeadBytes> head{};
    EXPECT_TRUE(read_at(memory.get(), "state", 0, head).ok());
    const auto size = static_cast<uint64_t>(::lseek(memory.get(), 0, SEEK_END));
    const auto held = read_held_state(*reinterpret_cast<const HeldStateHead*>(head.data()), size);
    EXPECT_TRUE(held.ok()) << held.status().to_string();
    return held.ok() ? held->steps : std::vector<int64_t>();
  }
  std::mutex mutex_;
  std::map<Rank, FileDescriptor> memory_;
};

TEST_F(RestoreFromMemoryTest, AnyOfTheLastTwoStepsContinuesBitForBitInEveryLayout) {
  for (const TinyLayout& layout :
       {TinyLayout{}, TinyLayout{2, 2, 1, Schedule::kDualPipe},
        TinyLayout{2, 1, 2, Schedule::kZeroBubble}, TinyLayout{2, 2, 1, Schedule::kDualPipeV}}) {
    StandaloneOptions options = tiny_run(spec_of(layout));
    const StandaloneReport undisturbed = train_tiny(options);
    for (const int64_t step : {5, 4}) {
      memory_.clear();
      options.state_file = files();
      options.stop_after = 5;
      options.from_memory = false;
      options.restore_step = 0;
      train_tiny(options);
      options.stop_after = 0;
      options.from_memory = true;
      options.restore_step = step;
      const StandaloneReport rest = train_tiny(options);
      EXPECT_EQ(rest.weights_digest, undisturbed.weights_digest) << to_string(layout) << step;
      ASSERT_EQ(std::ssize(rest.steps), 7 - step);
      for (size_t i = 0; i < rest.steps.size(); ++i) {
        const StepResult& same = undisturbed.steps[static_cast<size_t>(step) + i];
        EXPECT_EQ(rest.steps[i].loss, same.loss) << to_string(layout) << step;
        EXPECT_EQ(rest.steps[i].grad_norm, same.grad_norm);
      }
    }
  }
}

TEST_F(RestoreFromMemoryTest, AStepThatIsNotHeldIsNotFound) {
  StandaloneOptions options = tiny_run(spec_of({}));
  options.state_file = files();
  options.stop_after = 5;
  train_tiny(options);
  options.from_memory = true;
  options.restore_step = 2;
  EXPECT_EQ(run_standalone_threads(options).status().code(), Code::kNotFound);
  options.spec.training.seed += 1;  // another run's state
  options.restore_step = 5;
  EXPECT_EQ(run_standalone_threads(options).status().code(), Code::kNotFound);
}

TEST_F(RestoreFromMemoryTest, StepsAfterTheOneGoneBackToAreForgotten) {
  StandaloneOptions options = tiny_run(spec_of({}));
  options.state_file = files();
  options.stop_after = 5;
  train_tiny(options);
  options.from_memory = true;
  options.restore_step = 4;
  options.stop_after = 4;
  train_tiny(options);
  EXPECT_EQ(steps_in(memory_.at(Rank{0})), (std::vector<int64_t>{3, 4}));
}

TEST_F(RestoreFromMemoryTest, AGenerationThatHoldsAnotherStepThanItsHeadSaysIsNotUsed) {
  StandaloneOptions options = tiny_run(spec_of({}));
  options.state_file = files();
  options.stop_after = 5;
  train_tiny(options);
  HeldStateHead head;
  const int memory = memory_.at(Rank{0}).get();
  ASSERT_EQ(::pread(memory, &head, sizeof head, 0), static_cast<ssize_t>(sizeof head));
  for (std::atomic<int64_t>& step : head.steps) step += 1;
  ASSERT_EQ(::pwrite(memory, &head, sizeof head, 0), static_cast<ssize_t>(sizeof head));
  options.from_memory = true;
  options.restore_step = 6;
  EXPECT_EQ(run_standalone_threads(options).status().code(), Code::kNotFound);
}

// Whatever the moment of death, one of two steps is what every rank has.
TEST_F(RestoreFromMemoryTest, WhileAStepIsWrittenTheTwoBeforeItAreWhole) {
  JobSpec spec = spec_of({});
  StandaloneOptions options = tiny_run(spec);
  options.state_file = files();
  options.on_loaded = [this](Engine& engine) {
    TrainingState& state = engine.state();
    const auto whole = [&] { return steps_in(memory_.at(Rank{0})); };
    for (int64_t step = 1; step <= 5; ++step) {
      ASSERT_TRUE(engine.train_step(step).ok());
      engine.settle();
    }
    EXPECT_EQ(whole(), (std::vector<int64_t>{3, 4, 5}));
    (void)state.hold();  // step 5
    ASSERT_TRUE(engine.train_step(6).ok());
    engine.settle();
    EXPECT_EQ(whole(), (std::vector<int64_t>{4, 5, 6}));
    state.begin_step();
    EXPECT_EQ(whole(), (std::vector<int64_t>{5, 6}));
    state.release();
  };
  train_tiny(options);
}

}  // namespace
}  // namespace penstock
