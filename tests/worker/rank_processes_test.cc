// The same run as threads on loopback and as processes on UCX.
#include <gtest/gtest.h>

#include <fstream>
#include <sstream>

#include "tests/worker/engine_test_support.h"

namespace penstock {
namespace {

class StandaloneTransportTest : public ::testing::TestWithParam<Schedule> {};

std::string line_of(const StepResult& step) {
  return fmt::format("{} {:a} {:a}\n", step.step, step.loss, step.grad_norm);
}

// Losses, gradient norms and weights, to the last bit.
TEST_P(StandaloneTransportTest, ThreadsSharedMemoryAndTcpGiveTheSameBits) {
  ScratchDirectory directory;
  write_tiny_corpus(directory.path());
  const TinyLayout layout{2, 2, 1, GetParam()};
  StandaloneOptions options = tiny_run(tiny_spec(directory.path(), layout, 3));
  std::string losses;
  for (const StepResult& step : train_tiny(options).steps) losses += line_of(step);
  const std::string weights = train_tiny(options).weights_digest;
  for (const char* tls : {"", "posix,self", "tcp,self"}) {
    const Path file = directory.path() / "losses";
    std::filesystem::remove(file);
    options.ucx_tls = tls;
    options.on_step = [&](const StepResult& step) {  // in rank 0's process
      std::ofstream(file, std::ios::app) << line_of(step);
    };
    const Result<StandaloneReport> processes = run_standalone_processes(options);
    ASSERT_TRUE(processes.ok()) << processes.status().to_string();
    EXPECT_EQ(processes->weights_digest, weights) << "UCX_TLS=" << tls;
    std::stringstream got;
    got << std::ifstream(file).rdbuf();
    EXPECT_EQ(got.str(), losses) << "UCX_TLS=" << tls;
  }
}
INSTANTIATE_TEST_SUITE_P(Schedules, StandaloneTransportTest, ::testing::ValuesIn(kSchedules),
                         [](const auto& schedule) {
                           const std::string_view name = to_string(schedule.param);
                           return "Schedule_" + std::string(name);
                         });

TEST(StandaloneProcessesTest, AFailureOfOneProcessIsReportedWithItsRank) {
  ScratchDirectory directory;
  write_tiny_corpus(directory.path());
  StandaloneOptions options =
      tiny_run(tiny_spec(directory.path(), {2, 1, 1, Schedule::kDualPipe}, 2));
  options.programs[1].training[0].microbatch = 99;
  const Result<StandaloneReport> report = run_standalone_processes(options);
  ASSERT_FALSE(report.ok());
  EXPECT_NE(report.status().message().find("rank 1"), std::string::npos)
      << report.status().to_string();
}

TEST(StandaloneProcessesTest, CheckpointsAreRefusedBecauseNobodyCouldCommitThem) {
  ScratchDirectory directory;
  StandaloneOptions options = tiny_run(tiny_spec(directory.path(), {}, 1));
  options.checkpoint_dir = directory.path();
  EXPECT_EQ(run_standalone_processes(options).status().code(), Code::kInvalidArgument);
}

}  // namespace
}  // namespace penstock
