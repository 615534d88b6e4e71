// Pulses over real sockets on loopback: the daemon's thread and the coordinator's listener.
#include "comm/control/pulse.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "comm/control/channel.h"
#include "comm/control/pulse_listener.h"
#include "comm/control/pulse_thread.h"
#include "tests/control/loop_support.h"

namespace penstock {
namespace {

using std::chrono::milliseconds;

constexpr WorkerId kWorker{3};
constexpr uint64_t kIncarnation = 77;
constexpr Duration kBeat = milliseconds(40);
constexpr Duration kLease = milliseconds(400);

TEST(PulseTest, WhatIsEncodedIsDecoded) {
  const Pulse pulse = {kWorker, kIncarnation, 9, 40'000, true};
  EXPECT_EQ(decode_pulse(encode_pulse(pulse)), pulse);
}

TEST(PulseTest, NothingElseIsAPulse) {
  const auto good = encode_pulse({kWorker, kIncarnation, 9, 0, false});
  ASSERT_TRUE(decode_pulse(good));
  EXPECT_FALSE(decode_pulse(Bytes(good).first(kPulseBytes - 1)));
  EXPECT_FALSE(decode_pulse({}));
  std::vector<std::byte> longer(good.begin(), good.end());
  longer.push_back(std::byte{0});
  EXPECT_FALSE(decode_pulse(longer));
  auto wrong_magic = good;
  wrong_magic[0] ^= std::byte{1};
  EXPECT_FALSE(decode_pulse(wrong_magic));
  auto unknown_flag = good;
  unknown_flag[32] ^= std::byte{2};
  EXPECT_FALSE(decode_pulse(unknown_flag));
  auto no_port = good;
  no_port[38] ^= std::byte{1};
  EXPECT_FALSE(decode_pulse(no_port)) << "65536";
  EXPECT_FALSE(decode_pulse(encode_pulse({WorkerId{0}, kIncarnation, 9, 0, false})));
  EXPECT_FALSE(decode_pulse(encode_pulse({kWorker, 0, 9, 0, false})));
}

TEST(PulseTest, EndpointsAreResolvedAsZeroMqTakesThem) {
  EXPECT_EQ(resolve_endpoint("tcp://127.0.0.1:7071").value().storage.ss_family, AF_INET);
  EXPECT_EQ(resolve_endpoint("tcp://[::1]:7071").value().storage.ss_family, AF_INET6);
  EXPECT_EQ(resolve_endpoint("ipc:///tmp/x").status().code(), Code::kInvalidArgument);
  EXPECT_EQ(resolve_endpoint("tcp://nothing").status().code(), Code::kInvalidArgument);
}

class PulseLoopTest : public ::testing::Test {
 protected:
  // On the port of a control channel, as the coordinator has it.
  PulseLoopTest() {
    channel_ = RouterChannel::bind(loop_, "tcp://127.0.0.1:0",
                                   {[](const PeerId&, const ControlMessage&) {}, {}})
                   .value();
    listener_ = PulseListener::bind(loop_, channel_->endpoint(), [this](const Pulse& pulse, auto&) {
                  heard_.push_back(pulse);
                  return answers_;
                }).value();
    thread_ =
        PulseThread::start(channel_->endpoint(), kIncarnation, LeaseFile::create().value()).value();
  }
  bool hear(size_t count) {
    return run_until(loop_, [&] { return heard_.size() >= count; });
  }

  // Whether the lease comes to end later than it does now.
  bool lease_grows() {
    const int64_t end_ns = thread_->lease().end_ns();
    return run_until(loop_, [&] { return thread_->lease().end_ns() > end_ns; });
  }
  // Until long after it could have been asked for again.
  bool lease_stays() {
    const int64_t end_ns = thread_->lease().end_ns();
    run_for(loop_, 3 * kLease);
    return thread_->lease().end_ns() == end_ns && monotonic_ns() > end_ns;
  }

  EventLoop loop_;
  std::unique_ptr<RouterChannel> channel_;
  std::vector<Pulse> heard_;
  bool answers_ = true;
  std::unique_ptr<PulseListener> listener_;
  std::unique_ptr<PulseThread> thread_;
};

TEST_F(PulseLoopTest, ARegisteredWorkerPulsesAndIsAnswered) {
  run_for(loop_, milliseconds(100));
  EXPECT_TRUE(heard_.empty()) << "nobody has told it yet who it is";
  thread_->registered({kWorker, kBeat, kLease, monotonic_ns()});
  ASSERT_TRUE(hear(20));
  uint64_t last = 0;
  for (const Pulse& pulse : heard_) {
    EXPECT_EQ(pulse.worker, kWorker);
    EXPECT_EQ(pulse.incarnation, kIncarnation);
    EXPECT_GT(pulse.sequence, last);
    last = pulse.sequence;
  }
  EXPECT_TRUE(run_until(loop_, [&] { return thread_->answers() >= 20; }));
}

TEST_F(PulseLoopTest, WhatIsNotTakenNoteOfIsNotAnswered) {
  answers_ = false;
  thread_->registered({kWorker, kBeat, kLease, monotonic_ns()});
  ASSERT_TRUE(hear(20));
  EXPECT_EQ(thread_->answers(), 0U);
}

TEST_F(PulseLoopTest, OneThatIsCutOffNeitherSendsNorHears) {
  thread_->registered({kWorker, kBeat, kLease, monotonic_ns()});
  ASSERT_TRUE(hear(5));
  thread_->cut_off(true);
  run_for(loop_, milliseconds(50));  // what was on its way
  const size_t heard = heard_.size();
  const uint64_t answers = thread_->answers();
  run_for(loop_, milliseconds(200));
  EXPECT_EQ(heard_.size(), heard);
  EXPECT_EQ(thread_->answers(), answers);
  thread_->cut_off(false);
  EXPECT_TRUE(hear(heard + 5));
}

// Neither loop turns: the thread goes on sending, and what came waits for the listener.
TEST_F(PulseLoopTest, PulsesOfABusyTimeAreThereWhenSomebodyLooks) {
  thread_->registered({kWorker, kBeat, kLease, monotonic_ns()});
  ASSERT_TRUE(hear(5));
  const size_t before = heard_.size();
  // As long as it takes, without this thread's loop.
  const int64_t end_ns = monotonic_ns() + Duration(std::chrono::seconds(240)).count();
  while (monotonic_ns() < end_ns && heard_.size() < before + 30) {
    const int64_t busy_until_ns = monotonic_ns() + Duration(milliseconds(100)).count();
    while (monotonic_ns() < busy_until_ns) {
    }
    listener_->hear_all();
  }
  EXPECT_GE(heard_.size(), before + 30);
}

TEST_F(PulseLoopTest, StrangeDatagramsAreIgnored) {
  const SocketAddress address = resolve_endpoint(channel_->endpoint()).value();
  const FileDescriptor stranger = connect_datagrams(address).value();
  for (const size_t size : {0, 1, 39, 40, 41, 1400, 9000}) {
    const std::vector<std::byte> garbage(size, std::byte{0x5a});
    ASSERT_EQ(send(stranger.get(), garbage.data(), size, 0), static_cast<ssize_t>(size));
  }
  auto answer = encode_pulse({kWorker, kIncarnation, 1, 0, true});  // not ours to hear
  ASSERT_EQ(send(stranger.get(), answer.data(), answer.size(), 0),
            static_cast<ssize_t>(answer.size()));
  thread_->registered({kWorker, kBeat, kLease, monotonic_ns()});
  ASSERT_TRUE(hear(3));
  EXPECT_TRUE(std::all_of(heard_.begin(), heard_.end(),
                          [](const Pulse& pulse) { return !pulse.is_answer; }));
}

TEST_F(PulseLoopTest, TheLeaseIsEndlessUntilACoordinatorHasSetOne) {
  EXPECT_EQ(thread_->lease().end_ns(), LeaseFile::kEndless);
  thread_->registered({kWorker, kBeat, Duration(0), monotonic_ns()});
  ASSERT_TRUE(hear(5));
  EXPECT_EQ(thread_->lease().end_ns(), LeaseFile::kEndless) << "of an older coordinator";
  const int64_t asked_ns = monotonic_ns();
  answers_ = false;
  thread_->registered({kWorker, kBeat, kLease, asked_ns});
  EXPECT_EQ(thread_->lease().end_ns(), asked_ns + kLease.count());
  EXPECT_EQ(LeaseFile::open(thread_->lease().path()).value().end_ns(), asked_ns + kLease.count());
}

TEST_F(PulseLoopTest, AnswersMakeTheLeaseLongerFromWhenTheirPulsesWereSent) {
  thread_->registered({kWorker, kBeat, kLease, monotonic_ns()});
  ASSERT_TRUE(hear(5));
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(lease_grows());
    EXPECT_LE(thread_->lease().end_ns(), monotonic_ns() + kLease.count());
  }
  thread_->cut_off(true);
  run_for(loop_, milliseconds(50));  // what was on its way
  EXPECT_TRUE(lease_stays());
}

TEST_F(PulseLoopTest, WhatWasHeardByAnotherWayMakesItLongerToo) {
  answers_ = false;
  thread_->registered({kWorker, kBeat, kLease, monotonic_ns()});
  const int64_t sent_ns = monotonic_ns() + 1'000'000;
  thread_->heard(sent_ns);
  EXPECT_EQ(thread_->lease().end_ns(), sent_ns + kLease.count());
  thread_->heard(sent_ns - 1);
  EXPECT_EQ(thread_->lease().end_ns(), sent_ns + kLease.count()) << "never shorter";
}

// It runs and can be reached, and has not taken note: it may have given the worker up.
TEST_F(PulseLoopTest, ACoordinatorThatRunsAndDoesNotAnswerLetsTheLeaseEnd) {
  answers_ = false;
  thread_->registered({kWorker, kBeat, kLease, monotonic_ns()});
  ASSERT_TRUE(hear(5));
  run_for(loop_, milliseconds(50));
  EXPECT_TRUE(lease_stays());
}

TEST_F(PulseLoopTest, WhereThereIsNoCoordinatorTheLeaseGoesOn) {
  thread_->registered({kWorker, kBeat, kLease, monotonic_ns()});
  ASSERT_TRUE(hear(5));
  listener_.reset();
  channel_.reset();  // its host refuses connections now
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(lease_grows());
}

// The system accepts connections for it, up to a number, and nobody speaks.
TEST_F(PulseLoopTest, WhileTheCoordinatorIsStoppedTheLeaseGoesOn) {
  thread_->registered({kWorker, kBeat, kLease, monotonic_ns()});
  ASSERT_TRUE(hear(5));
  const std::string endpoint = channel_->endpoint();
  listener_.reset();
  channel_.reset();
  const SocketAddress address = resolve_endpoint(endpoint).value();
  const FileDescriptor mute(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int on = 1;
  ASSERT_EQ(::setsockopt(mute.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on), 0);
  ASSERT_EQ(::bind(mute.get(), address.get(), address.size), 0);
  ASSERT_EQ(::listen(mute.get(), 100), 0);
  const FileDescriptor datagrams = bind_datagrams(address).value();  // which nobody reads
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(lease_grows());
}

}  // namespace
}  // namespace penstock
