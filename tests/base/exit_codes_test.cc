#include "comm/base/exit_codes.h"

#include <gtest/gtest.h>

#include <csignal>

namespace penstock {
namespace {

bool sound(ExitCode code) {
  return leaves_sound_state(static_cast<int>(code), 0);
}

TEST(ExitCodesTest, AStateIsSoundUnlessItsRankMayHaveWrittenAnything) {
  for (const ExitCode code :
       {ExitCode::kOk, ExitCode::kPeerLost, ExitCode::kUnreachable, ExitCode::kPreempted}) {
    EXPECT_TRUE(sound(code)) << static_cast<int>(code);
  }
  for (const ExitCode code : {ExitCode::kFailure, ExitCode::kOutOfMemory, ExitCode::kDataCorrupt,
                              ExitCode::kDiverged, ExitCode::kMiscomputed}) {
    EXPECT_FALSE(sound(code)) << static_cast<int>(code);
  }
  EXPECT_TRUE(leaves_sound_state(-1, SIGKILL));
  EXPECT_TRUE(leaves_sound_state(-1, SIGTERM));
  for (const int signal : {SIGSEGV, SIGABRT, SIGBUS}) {
    EXPECT_FALSE(leaves_sound_state(-1, signal)) << signal;
  }
}

}  // namespace
}  // namespace penstock
