// The same run as threads on loopback and as processes on UCX.
#include <gtest/gtest.h>

#include "tests/worker/engine_test_support.h"

namespace penstock {
namespace {

TEST(StandaloneProcessesTest, ProcessesOnUcxGiveTheBitsOfThreadsOnLoopback) {
  ScratchDirectory directory;
  write_tiny_corpus(directory.path());
  for (const TinyLayout& layout : {TinyLayout{1, 1, 1, Schedule::kOneForwardOneBackward},
                                   TinyLayout{2, 1, 2, Schedule::kOneForwardOneBackward},
                                   TinyLayout{4, 2, 1, Schedule::kDualPipe}}) {
    const StandaloneOptions options = tiny_run(tiny_spec(directory.path(), layout, 3));
    const Result<StandaloneReport> processes = run_standalone_processes(options);
    ASSERT_TRUE(processes.ok()) << processes.status().to_string();
    EXPECT_EQ(processes->weights_digest, train_tiny(options).weights_digest) << to_string(layout);
  }
}

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
