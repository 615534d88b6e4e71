// The child process that checks the host: what it finds, and how it may end, become one answer.
#include "worker/agent/host_checker.h"

#include <gtest/gtest.h>

#include <fstream>

#include "tests/support/cluster.h"

namespace penstock {
namespace {

struct Checked {
  bool passed = false;
  std::string report;
};

class HostCheckerTest : public ::testing::Test {
 protected:
  Checked check(const Path& program, Duration limit = kPatience) {
    EventLoop loop;
    Checked checked;
    HostChecker checker(loop, {.rank_binary = program, .directory = folder_.path(), .limit = limit},
                        [&](bool passed, std::string report) {
                          checked = {passed, std::move(report)};
                          loop.stop();
                        });
    const Status begun = checker.begin();
    EXPECT_TRUE(begun.ok()) << begun.to_string();
    loop.run();
    return checked;
  }
  // A program that does what a shell script says.
  Path script(const std::string& text) {
    const Path path = folder_.path() / "check.sh";
    std::ofstream(path) << "#!/bin/sh\n" << text << "\n";
    std::filesystem::permissions(path, std::filesystem::perms::owner_all);
    return path;
  }
  ScratchFolder folder_;
};

TEST_F(HostCheckerTest, ThisHostPassesAndEverythingThatWasCheckedIsSaid) {
  const Checked checked = check(binary("penstock-rank"));
  EXPECT_TRUE(checked.passed) << checked.report;
  for (const char* part : {"memory: ", "processors: ", "disk: ", "loopback: ", "clock: "}) {
    EXPECT_NE(checked.report.find(part), std::string::npos) << part << checked.report;
  }
}

TEST_F(HostCheckerTest, WhatFailedIsTheAnswer) {
  const Checked checked =
      check(script("echo 'memory: a word changed'; echo 'disk: slow'; exit 19"));
  EXPECT_FALSE(checked.passed);
  EXPECT_EQ(checked.report, "memory: a word changed; disk: slow");
}

TEST_F(HostCheckerTest, ACheckThatCrashesOrNeverEndsHasFailed) {
  const Checked crashed = check(script("kill -SEGV $$"));
  EXPECT_FALSE(crashed.passed);
  EXPECT_NE(crashed.report.find("killed by signal 11"), std::string::npos) << crashed.report;
  const Checked endless = check(script("exec tail -f /dev/null"), std::chrono::milliseconds(50));
  EXPECT_FALSE(endless.passed);
  EXPECT_NE(endless.report.find("did not end within"), std::string::npos) << endless.report;
}

}  // namespace
}  // namespace penstock
