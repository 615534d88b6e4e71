// The stream of one rank's state: both sides on real sockets, and all that a hostile one may send.
#include "comm/control/state_stream.h"

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <array>
#include <optional>
#include <thread>
#include <vector>

#include "comm/base/random.h"
#include "tests/support/cluster.h"

namespace penstock {
namespace {

using std::chrono::milliseconds;

StreamRequest store_request() {
  return {.kind = StreamKind::kStore,
          .key = {1, 2},
          .job = {7},
          .epoch = {3},
          .rank = {5},
          .step = 40,
          .contents = {8, 9},
          .byte_count = 1000};
}

// Not a whole number of blocks, and no two of them alike.
std::vector<std::byte> some_state() {
  std::vector<std::byte> state(3 * kStreamBlockBytes + 12345);
  Random random(6, 0);
  for (std::byte& byte : state) byte = static_cast<std::byte>(random.next());
  return state;
}

class StateStreamTest : public ::testing::Test {
 protected:
  StateStreamTest() {
    std::array<int, 2> fds = {};
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds.data()), 0);
    raw_fd = fds[0];
    our_fd = fds[1];
    raw.emplace(FileDescriptor(fds[0]));
    ours.emplace(FileDescriptor(fds[1]));
  }
  // Bytes as the other side may send them, whatever they are.
  void put(Bytes bytes) {
    ASSERT_EQ(::send(raw_fd, bytes.data(), bytes.size(), MSG_NOSIGNAL), std::ssize(bytes));
  }

  int raw_fd = -1;
  int our_fd = -1;
  std::optional<StateConnection> raw;
  std::optional<StateConnection> ours;
};

TEST(StateStreamCodecTest, RequestsAndAnswersComeBackAsTheyWere) {
  StreamRequest request = store_request();
  EXPECT_EQ(*decode_stream_request(encode_stream_request(request)), request);
  request.kind = StreamKind::kFetch;
  request.contents = {};
  request.byte_count = 0;
  EXPECT_EQ(*decode_stream_request(encode_stream_request(request)), request);
  const StreamAnswer answer{Code::kNotFound, {4, 5}, 77};
  EXPECT_EQ(*decode_stream_answer(encode_stream_answer(answer)), answer);
}

TEST(StateStreamCodecTest, EveryChangedBitIsFound) {
  const auto request = encode_stream_request(store_request());
  for (size_t bit = 0; bit < 8 * request.size(); ++bit) {
    auto changed = request;
    changed[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_EQ(decode_stream_request(changed).status().code(), Code::kInvalidArgument) << bit;
  }
  const auto answer = encode_stream_answer({Code::kOk, {4, 5}, 77});
  for (size_t bit = 0; bit < 8 * answer.size(); ++bit) {
    auto changed = answer;
    changed[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_EQ(decode_stream_answer(changed).status().code(), Code::kInvalidArgument) << bit;
  }
  EXPECT_FALSE(decode_stream_request(Bytes(request).first(95)).ok());
  EXPECT_FALSE(decode_stream_answer(Bytes(answer).first(47)).ok());
  EXPECT_FALSE(decode_stream_request({}).ok());
}

TEST(StateStreamCodecTest, FieldsOutOfRangeAreRefused) {
  const auto refused = [](auto change) {
    StreamRequest request = store_request();
    change(request);
    return !decode_stream_request(encode_stream_request(request)).ok();
  };
  EXPECT_TRUE(refused([](StreamRequest& r) { r.kind = static_cast<StreamKind>(3); }));
  EXPECT_TRUE(refused([](StreamRequest& r) { r.job = {}; }));
  EXPECT_TRUE(refused([](StreamRequest& r) { r.epoch = {}; }));
  EXPECT_TRUE(refused([](StreamRequest& r) { r.rank = {-1}; }));
  EXPECT_TRUE(refused([](StreamRequest& r) { r.step = 0; }));
  EXPECT_TRUE(refused([](StreamRequest& r) { r.byte_count = 0; })) << "nothing to store";
  EXPECT_TRUE(refused([](StreamRequest& r) { r.byte_count = kStreamedStateBytesMax + 1; }));
  EXPECT_TRUE(refused([](StreamRequest& r) { r.kind = StreamKind::kFetch; })) << "with a size";
  const auto answer = encode_stream_answer({Code::kOk, {}, kStreamedStateBytesMax + 1});
  EXPECT_FALSE(decode_stream_answer(answer).ok());
  EXPECT_FALSE(decode_stream_answer(encode_stream_answer({static_cast<Code>(99), {}, 0})).ok());
}

TEST_F(StateStreamTest, AStateArrivesBitForBit) {
  const std::vector<std::byte> state = some_state();
  std::vector<size_t> announced;
  std::thread sender([&] {
    EXPECT_TRUE(raw->ask(store_request(), kPatience).ok());
    const auto pace = [&](size_t bytes) {
      announced.push_back(bytes);
      return Status();
    };
    EXPECT_TRUE(raw->send_state(state, kPatience, pace).ok());
  });
  const Result<StreamRequest> request = ours->hear_request(kPatience);
  ASSERT_TRUE(request.ok()) << request.status().to_string();
  EXPECT_EQ(*request, store_request());
  EXPECT_TRUE(ours->answer({}, kPatience).ok());
  std::vector<std::byte> received(state.size());
  const Status status = ours->receive_state(received, kPatience);
  sender.join();
  ASSERT_TRUE(status.ok()) << status.to_string();
  EXPECT_EQ(received, state);
  EXPECT_EQ(announced,
            (std::vector<size_t>{kStreamBlockBytes, kStreamBlockBytes, kStreamBlockBytes, 12345}));
}

TEST_F(StateStreamTest, ARefusalIsItsCode) {
  std::thread caller([&] {
    EXPECT_EQ(raw->ask(store_request(), kPatience).status().code(), Code::kPermissionDenied);
  });
  EXPECT_TRUE(ours->hear_request(kPatience).ok());
  EXPECT_TRUE(ours->answer({Code::kPermissionDenied, {}, 0}, kPatience).ok());
  caller.join();
}

TEST_F(StateStreamTest, ABlockThatIsNotWhatItsDigestSaysIsFound) {
  std::vector<std::byte> block(100, std::byte{7});
  const Digest digest = digest_of(block);
  block[99] ^= std::byte{1};
  put(Bytes(reinterpret_cast<const std::byte*>(&digest), sizeof digest));
  put(block);
  std::vector<std::byte> into(block.size());
  EXPECT_EQ(ours->receive_state(into, kPatience).code(), Code::kDataLoss);
}

TEST_F(StateStreamTest, AStreamThatEndsBeforeItsStateDoesIsFound) {
  const std::vector<std::byte> state = some_state();
  std::thread sender([&] {
    EXPECT_TRUE(raw->send_state(Bytes(state).first(kStreamBlockBytes), kPatience).ok());
    raw->shut_down();
  });
  std::vector<std::byte> into(state.size());
  EXPECT_EQ(ours->receive_state(into, kPatience).code(), Code::kUnavailable);
  sender.join();
}

TEST_F(StateStreamTest, SilenceAndNonsenseEndIt) {
  std::vector<std::byte> into(8);
  EXPECT_EQ(ours->receive_state(into, milliseconds(20)).code(), Code::kDeadlineExceeded);
  EXPECT_EQ(ours->hear_request(milliseconds(20)).status().code(), Code::kDeadlineExceeded);
  put(std::vector<std::byte>(kStreamRequestBytes, std::byte{0x47}));
  EXPECT_EQ(ours->hear_request(kPatience).status().code(), Code::kInvalidArgument);
  put(std::vector<std::byte>(kStreamAnswerBytes, std::byte{0x47}));
  EXPECT_EQ(ours->hear_answer(kPatience).status().code(), Code::kInvalidArgument);
}

TEST_F(StateStreamTest, WhatIsSentBeforeABlockMayEndIt) {
  const std::vector<std::byte> state = some_state();
  const Status ended = raw->send_state(state, kPatience, [](size_t) { return aborted("fenced"); });
  EXPECT_EQ(ended.code(), Code::kAborted);
}

TEST_F(StateStreamTest, AnotherThreadMayEndAWait) {
  std::thread waiter([&] {
    std::vector<std::byte> into(8);
    EXPECT_EQ(ours->receive_state(into, kPatience).code(), Code::kUnavailable);
  });
  put(std::vector<std::byte>(4));  // of a digest
  const auto took_it = [&] {
    int unread = -1;
    EXPECT_EQ(::ioctl(our_fd, FIONREAD, &unread), 0);
    return unread == 0;
  };
  EXPECT_TRUE(wait_until(took_it, kPatience)) << "it does not wait for more";
  ours->shut_down();
  waiter.join();
}

TEST(StateConnectionTest, NobodyThereIsUnavailable) {
  // A port that was given to this process, which does not listen on it.
  FileDescriptor bound(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  ASSERT_EQ(::bind(bound.get(), reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(::getsockname(bound.get(), reinterpret_cast<sockaddr*>(&address), &size), 0);
  const auto to = fmt::format("127.0.0.1:{}", ntohs(address.sin_port));
  EXPECT_EQ(StateConnection::connect(to, kPatience).status().code(), Code::kUnavailable);
  EXPECT_FALSE(StateConnection::connect("nowhere", kPatience).ok());
}

}  // namespace
}  // namespace penstock
