// Real engines that drive stages whose compute is timed waits: what they add up, what they move.
#include <gtest/gtest.h>

#include "comm/base/clock.h"
#include "comm/data/loopback_transport.h"
#include "tests/support/timed_stage.h"
#include "tests/worker/engine_test_support.h"

namespace penstock {
namespace {

TEST(ComputeClockTest, WorkBeginsWhenTheWorkBeforeItEndedHoweverLateItIsQueued) {
  ComputeClock clock;
  clock.run(1000);
  const int64_t woken_ns = monotonic_ns();
  while (monotonic_ns() < woken_ns + 100'000) {  // the host is busy for much longer than the work
  }
  clock.run(2000);
  EXPECT_EQ(clock.use().busy_ns, 3000);
  EXPECT_EQ(clock.use().end_ns - clock.use().begin_ns, 3000);
}

TEST(ComputeClockTest, WorkAfterAWaitBeginsWhenTheWaitEnded) {
  ComputeClock clock;
  clock.run(1000);
  const int64_t waited_until_ns = monotonic_ns();
  clock.ran_dry();
  clock.run(2000);
  EXPECT_EQ(clock.use().busy_ns, 3000);
  EXPECT_GE(clock.use().end_ns, waited_until_ns + 2000);
}

TEST(ComputeClockTest, OnlyAWaitThatHadToWaitLetsTheDeviceRunDry) {
  const std::vector<std::unique_ptr<LoopbackTransport>> ends = make_loopback(2);
  ComputeClock clock;
  const std::unique_ptr<Transport> watched = clock.watch(*ends[0]);
  const std::vector<std::byte> sent(8);
  std::vector<std::byte> got(8);
  const TransferHandle send = ends[1]->send(Rank{0}, Tag{1}, sent);
  clock.run(1000);
  ASSERT_TRUE(watched->wait(watched->receive(Rank{1}, Tag{1}, got)).ok());  // is there already
  clock.run(1000);
  EXPECT_EQ(clock.use().end_ns - clock.use().begin_ns, 2000);
  ASSERT_TRUE(ends[1]->wait(send).ok());
}

struct Measured {
  int64_t busy_ns = 0;
  uint64_t bytes_sent = 0;
};

class MeasuringProbe final : public RankProbe {
 public:
  MeasuringProbe(const TimedStageOptions& options, Measured* into)
      : options_(options), into_(into) {}
  Transport& transport(Transport& real) override {
    watched_ = clock_.watch(real);
    return *watched_;
  }
  StageFactory stage_factory() override {
    return [this](const StageOptions& options, Kernels& kernels, ExpertExchange* exchange) {
      return std::make_unique<TimedStage>(options, options_, clock_, kernels, exchange);
    };
  }
  void on_step(const StepResult&) override {
    *into_ = {clock_.use().busy_ns, watched_ ? watched_->bytes_sent() : 0};
  }

 private:
  const TimedStageOptions options_;
  Measured* const into_;
  ComputeClock clock_;
  std::unique_ptr<Transport> watched_;
};

class TimedStageTest : public ::testing::Test {
 protected:
  TimedStageTest() { write_tiny_corpus(directory_.path()); }

  // One step of 2 pipeline x 2 expert ranks with 4 micro-batches each; by rank.
  std::vector<Measured> run(Schedule schedule, const TimedStageOptions& timed) {
    JobSpec spec = tiny_spec(directory_.path(), {2, 2, 1, schedule, 8}, 1);
    spec.model.first_k_dense_replace = 0;
    spec.model.num_hidden_layers = 4;
    StandaloneOptions options = tiny_run(spec);
    std::vector<Measured> measured(4);
    options.make_probe = [&](Rank rank) -> Result<std::unique_ptr<RankProbe>> {
      return std::unique_ptr<RankProbe>(
          std::make_unique<MeasuringProbe>(timed, &measured[static_cast<size_t>(rank.value)]));
    };
    train_tiny(options);
    return measured;
  }
  ScratchDirectory directory_;
};

TEST_F(TimedStageTest, EveryRankComputesForAsLongAsTheTableSaysWhateverTheSchedule) {
  TimedStageOptions timed;
  timed.costs[SubOp::kAttention] = 1000;
  timed.costs[SubOp::kMlp] = 2000;
  timed.costs[SubOp::kMlpBackward] = 3000;
  timed.costs[SubOp::kMlpWeight] = 4000;
  timed.costs[SubOp::kAttentionBackward] = 5000;
  timed.costs[SubOp::kAttentionWeight] = 6000;
  for (const Schedule schedule : {Schedule::kOneForwardOneBackward, Schedule::kDualPipe}) {
    for (const Measured& rank : run(schedule, timed)) {
      EXPECT_EQ(rank.busy_ns, 4 * 2 * 21000);  // micro-batches x layers x the sum
    }
  }
}

TEST_F(TimedStageTest, ExchangesMoveTheBytesOfTheirTokensAndNothingWhenThereAreNone) {
  TimedStageOptions with;
  TimedStageOptions without;
  without.exchange_tokens = false;
  const std::vector<Measured> full = run(Schedule::kDualPipe, with);
  const std::vector<Measured> empty = run(Schedule::kDualPipe, without);
  // 16 tokens of 32 values each go to the one peer with their routing (token, 2 experts, 2
  // weights), come back, and so do their gradients, with one gate gradient each.
  constexpr uint64_t kRoundTripWords = 16 * ((32 + 5) + 32 + 32 + (32 + 1));
  for (size_t rank = 0; rank < full.size(); ++rank) {
    EXPECT_EQ(full[rank].bytes_sent - empty[rank].bytes_sent,
              4 * 2 * kRoundTripWords * sizeof(float))
        << "rank " << rank;
  }
}

TEST_F(TimedStageTest, AProbeThatCannotBeMadeFailsItsRank) {
  StandaloneOptions options = tiny_run(tiny_spec(directory_.path(), {2, 1, 1}, 1));
  options.make_probe = [](Rank rank) -> Result<std::unique_ptr<RankProbe>> {
    if (rank.value == 1) return failed_precondition("no such namespace");
    return std::unique_ptr<RankProbe>();
  };
  const Result<StandaloneReport> report = run_standalone_threads(options);
  EXPECT_NE(report.status().message().find("no such namespace"), std::string::npos)
      << report.status().to_string();
}

}  // namespace
}  // namespace penstock
