#include "comm/data/ucx_address.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "comm/base/random.h"

namespace penstock {
namespace {

UcxAddress example() {
  return {
      Rank{3}, Epoch{9}, {.host = 0x1234, .pid = 77, .start_ticks = 5}, std::string("\0ab\xff", 4)};
}

TEST(UcxAddressTest, DecodingGivesBackWhatWasEncodedInPrintableText) {
  const std::string text = encode_ucx_address(example());
  EXPECT_EQ(text.find_first_not_of("0123456789abcdef"), std::string::npos);
  const auto decoded = decode_ucx_address(text);
  ASSERT_TRUE(decoded.ok()) << decoded.status().to_string();
  EXPECT_EQ(*decoded, example());
}

TEST(UcxAddressTest, EveryTruncationIsRefused) {
  const std::string text = encode_ucx_address(example());
  for (size_t size = 0; size < text.size(); ++size) {
    EXPECT_EQ(decode_ucx_address(text.substr(0, size)).status().code(), Code::kInvalidArgument);
  }
}

TEST(UcxAddressTest, EveryChangedCharacterIsRefused) {
  const std::string text = encode_ucx_address(example());
  for (size_t at = 0; at < text.size(); ++at) {
    for (const char replacement : {'0', 'f', 'G', '\0'}) {
      std::string damaged = text;
      damaged[at] = replacement;
      if (damaged == text) continue;
      EXPECT_EQ(decode_ucx_address(damaged).status().code(), Code::kInvalidArgument) << at;
    }
  }
}

TEST(UcxAddressTest, RandomTextIsRefused) {
  Random random(4, 0);
  for (int i = 0; i < 1000; ++i) {
    std::string text(random.below(200), '\0');
    for (char& character : text) character = "0123456789abcdef"[random.below(16)];
    EXPECT_EQ(decode_ucx_address(text).status().code(), Code::kInvalidArgument);
  }
}

TEST(ProcessIdentityTest, TwoReadingsOfOneProcessAgree) {
  const auto first = own_process_identity();
  const auto second = own_process_identity();
  ASSERT_TRUE(first.ok()) << first.status().to_string();
  EXPECT_EQ(*first, *second);
  EXPECT_EQ(first->pid, getpid());
}

TEST(ProcessIdentityTest, WatchOfALivingProcessTurnsReadableWhenItEnds) {
  int start[2];
  int identity_pipe[2];
  ASSERT_EQ(pipe(start), 0);
  ASSERT_EQ(pipe(identity_pipe), 0);
  const pid_t child = fork();
  if (child == 0) {
    const auto identity = own_process_identity();
    const ssize_t written = ::write(identity_pipe[1], &*identity, sizeof(ProcessIdentity));
    char byte = 0;
    const ssize_t got = ::read(start[0], &byte, 1);  // until told to go
    _exit(written > 0 && got == 1 ? 0 : 1);
  }
  ProcessIdentity identity;
  ASSERT_EQ(::read(identity_pipe[0], &identity, sizeof(identity)), ssize_t{sizeof(identity)});
  const auto watch = watch_process(identity);
  ASSERT_TRUE(watch.ok()) << watch.status().to_string();
  pollfd fd = {watch->get(), POLLIN, 0};
  EXPECT_EQ(poll(&fd, 1, 0), 0);
  ASSERT_EQ(kill(child, SIGKILL), 0);
  EXPECT_EQ(poll(&fd, 1, 5000), 1);
  // Dead but not yet waited for, it can still be watched; after that it is gone.
  EXPECT_TRUE(watch_process(identity).ok());
  ASSERT_EQ(waitpid(child, nullptr, 0), child);
  EXPECT_EQ(watch_process(identity).status().code(), Code::kUnavailable);
  for (const int descriptor : {start[0], start[1], identity_pipe[0], identity_pipe[1]}) {
    ::close(descriptor);
  }
}

TEST(ProcessIdentityTest, AnotherProcessWithTheSameNumberIsNotTakenForTheOneThatEnded) {
  ProcessIdentity identity = *own_process_identity();
  ++identity.start_ticks;
  EXPECT_EQ(watch_process(identity).status().code(), Code::kUnavailable);
}

TEST(ProcessIdentityTest, ProcessOfAnotherHostIsNotWatched) {
  ProcessIdentity identity = *own_process_identity();
  ++identity.host;
  const auto watch = watch_process(identity);
  ASSERT_TRUE(watch.ok());
  EXPECT_FALSE(watch->valid());
}

}  // namespace
}  // namespace penstock
