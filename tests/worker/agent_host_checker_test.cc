// The child process that checks the host: what it finds, and how it may end, become one answer.
#include "worker/agent/host_checker.h"

#include <gtest/gtest.h>

#include <fstream>

#include "tests/support/cluster.h"
#include "tests/support/hung_file_system.h"

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

TEST_F(HostCheckerTest, WhatACheckThatSaysNothingElseWritesToStderrIsItsReason) {
  const Checked failed = check(script("echo 'no kernel for this processor' >&2; exit 127"));
  EXPECT_FALSE(failed.passed);
  EXPECT_EQ(failed.report,
            "the check of this host exited with code 127: no kernel for this processor");
  const Checked wordy =
      check(script("yes something | head -c 40000 >&2; echo 'the last' >&2; exit 1"));
  EXPECT_LT(wordy.report.size(), 2200u);
  EXPECT_TRUE(wordy.report.ends_with("the last")) << wordy.report;
  EXPECT_EQ(check(script("echo 'disk: slow'; echo more >&2; exit 19")).report, "disk: slow");
}

// A check that a disk holds in the kernel, where SIGKILL does not reach it.
class StuckHostCheckTest : public HostCheckerTest {
 protected:
  StuckHostCheckTest() : disk_(HungFileSystem::mount_at(folder_.path() / "disk")) {
    const Path program = script("exec cat \"$3/file\"");
    checker_.emplace(loop_,
                     HostCheckerOptions{.rank_binary = program,
                                        .directory = folder_.path() / "disk",
                                        .limit = std::chrono::milliseconds(1)},
                     [this](bool passed, std::string report) {
                       reports_.push_back({passed, std::move(report)});
                       loop_.stop();
                     });
    EXPECT_TRUE(checker_->begin().ok());
    disk_->take_call();
    loop_.run();
  }
  const std::unique_ptr<HungFileSystem> disk_;
  EventLoop loop_;
  std::vector<Checked> reports_;
  std::optional<HostChecker> checker_;
};

TEST_F(StuckHostCheckTest, HasFailedAndNoOtherBeginsBeforeItIsGone) {
  ASSERT_EQ(reports_.size(), 1u);
  EXPECT_FALSE(reports_[0].passed);
  EXPECT_NE(reports_[0].report.find("did not end within"), std::string::npos) << reports_[0].report;
  const Status refused = checker_->begin();
  EXPECT_EQ(refused.code(), Code::kUnavailable);
  EXPECT_NE(refused.message().find("still stuck"), std::string::npos) << refused.message();
  disk_->release();
  EXPECT_TRUE(wait_until([&] { return checker_->begin().ok(); }, kPatience));
  loop_.run();
  EXPECT_EQ(reports_.size(), 2u) << "the stuck one is told of once";
}

TEST_F(StuckHostCheckTest, DoesNotKeepTheDaemonFromEnding) {
  checker_.reset();
  disk_->release();
}

}  // namespace
}  // namespace penstock
