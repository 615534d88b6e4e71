#include "comm/control/channel.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <zmq.h>

#include "comm/base/file.h"
#include "comm/control/codec.h"
#include "comm/control/connection_backlogs.h"
#include "tests/control/loop_support.h"

namespace penstock {
namespace {

constexpr const char* kAnyPort = "tcp://127.0.0.1:0";

StepReport report_of(int64_t step) {
  return {.job = {1}, .epoch = {1}, .step = step, .loss = 1.0, .grad_norm = 1.0};
}

struct Received {
  PeerId peer;
  ControlMessage message;
};

// A router that keeps what it receives.
struct Router {
  Router(EventLoop& loop, const std::string& endpoint) {
    auto bound = RouterChannel::bind(
        loop, endpoint,
        {[this](const PeerId& peer, ControlMessage message) {
           received.push_back({peer, std::move(message)});
         },
         [this](const Rejection& rejection) { rejections.push_back(rejection); }});
    EXPECT_TRUE(bound.ok()) << bound.status().to_string();
    if (bound.ok()) channel = std::move(bound).value();
  }
  std::unique_ptr<RouterChannel> channel;
  std::vector<Received> received;
  std::vector<Rejection> rejections;
};

// A dealer that keeps what it receives and counts its connections.
struct Dealer {
  Dealer(EventLoop& loop, const std::string& endpoint, DealerOptions options = {}) {
    auto connected = DealerChannel::connect(
        loop, endpoint, std::move(options),
        {[this](ControlMessage message) { received.push_back(std::move(message)); },
         [this] { ++connections; }, [this] { ++disconnections; },
         [this](const Rejection& rejection) { rejections.push_back(rejection); }});
    EXPECT_TRUE(connected.ok()) << connected.status().to_string();
    if (connected.ok()) channel = std::move(connected).value();
  }
  std::unique_ptr<DealerChannel> channel;
  std::vector<ControlMessage> received;
  std::vector<Rejection> rejections;
  int connections = 0;
  int disconnections = 0;
};

uint16_t port_of(const std::string& endpoint) {
  return static_cast<uint16_t>(std::stoi(endpoint.substr(endpoint.rfind(':') + 1)));
}

FileDescriptor connect_plain_tcp(const std::string& endpoint) {
  FileDescriptor fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(port_of(endpoint));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  return fd;
}

// A ZeroMQ peer that does not keep our rules.
struct RawDealer {
  explicit RawDealer(const std::string& endpoint) {
    context = zmq_ctx_new();
    socket = zmq_socket(context, ZMQ_DEALER);
    const int linger = 0;
    zmq_setsockopt(socket, ZMQ_LINGER, &linger, sizeof linger);
    EXPECT_EQ(zmq_connect(socket, endpoint.c_str()), 0);
  }
  ~RawDealer() {
    zmq_close(socket);
    zmq_ctx_term(context);
  }
  void send(const std::string& bytes, int flags = 0) {
    EXPECT_EQ(zmq_send(socket, bytes.data(), bytes.size(), flags), static_cast<int>(bytes.size()));
  }
  void* context = nullptr;
  void* socket = nullptr;
};

std::string text_of(const ControlMessage& message) {
  const std::vector<std::byte> frame = encode(message);
  return std::string(as_text(frame));
}

TEST(ChannelTest, PortZeroReportsTheRealPort) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  EXPECT_GT(port_of(router.channel->endpoint()), 0);
}

TEST(ChannelTest, AVersionSixAddressWorksWhereTheHostHasOne) {
  EventLoop loop;
  const std::string endpoint = "tcp://[::1]:0";
  if (const auto tried =
          RouterChannel::bind(loop, endpoint, {.on_message = [](auto&&...) {}, .on_rejected = {}});
      !tried.ok()) {
    EXPECT_NE(tried.status().message().find("[::1]"), std::string::npos);
    return;
  }
  Router router(loop, endpoint);
  Dealer dealer(loop, router.channel->endpoint());
  ASSERT_TRUE(dealer.channel->send(report_of(5)).ok());
  EXPECT_TRUE(run_until(loop, [&] { return router.received.size() == 1; }));
}

TEST(ChannelTest, AMessageAndItsAnswerArrive) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  Dealer dealer(loop, router.channel->endpoint());
  const ControlMessage question = report_of(5);
  ASSERT_TRUE(dealer.channel->send(question).ok());
  ASSERT_TRUE(run_until(loop, [&] { return router.received.size() == 1; }));
  EXPECT_EQ(router.received[0].message, question);
  const ControlMessage answer = CheckpointOutcome{{1}, {1}, 5, true, ""};
  ASSERT_TRUE(router.channel->send(router.received[0].peer, answer).ok());
  ASSERT_TRUE(run_until(loop, [&] { return dealer.received.size() == 1; }));
  EXPECT_EQ(dealer.received[0], answer);
  EXPECT_TRUE(dealer.channel->connected());
}

TEST(ChannelTest, LocalSocketsWorkAsWell) {
  EventLoop loop;
  const std::string path =
      ::testing::TempDir() + "/penstock_channel_test." + std::to_string(getpid()) + ".socket";
  Router router(loop, "ipc://" + path);
  Dealer dealer(loop, router.channel->endpoint());
  ASSERT_TRUE(dealer.channel->send(report_of(1)).ok());
  EXPECT_TRUE(run_until(loop, [&] { return router.received.size() == 1; }));
}

TEST(ChannelTest, TheChosenIdentityIsThePeersName) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  Dealer dealer(loop, router.channel->endpoint(), {.identity = "worker-7"});
  ASSERT_TRUE(dealer.channel->send(report_of(1)).ok());
  ASSERT_TRUE(run_until(loop, [&] { return router.received.size() == 1; }));
  EXPECT_EQ(router.received[0].peer, "worker-7");
}

TEST(ChannelTest, OfTwoPeersWithOneIdentityTheNewerWins) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  Dealer older(loop, router.channel->endpoint(), {.identity = "twin"});
  ASSERT_TRUE(older.channel->send(report_of(1)).ok());
  ASSERT_TRUE(run_until(loop, [&] { return router.received.size() == 1; }));
  Dealer newer(loop, router.channel->endpoint(), {.identity = "twin"});
  ASSERT_TRUE(newer.channel->send(report_of(2)).ok());
  ASSERT_TRUE(run_until(loop, [&] { return router.received.size() == 2; }));
  ASSERT_TRUE(router.channel->send("twin", report_of(3)).ok());
  EXPECT_TRUE(run_until(loop, [&] { return newer.received.size() == 1; }));
  EXPECT_TRUE(older.received.empty());
}

TEST(ChannelTest, ManyMessagesArriveInOrder) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  Dealer dealer(loop, router.channel->endpoint());
  constexpr int64_t kCount = 5000;
  for (int64_t step = 1; step <= kCount; ++step) {
    ASSERT_TRUE(dealer.channel->send(report_of(step)).ok());
  }
  ASSERT_TRUE(run_until(loop, [&] { return router.received.size() == kCount; }));
  for (int64_t step = 1; step <= kCount; ++step) {
    ASSERT_EQ(std::get<StepReport>(router.received[static_cast<size_t>(step - 1)].message).step,
              step);
  }
}

// Sending inside a handler swallows ZMQ_FD's edge: the next message must arrive all the same.
TEST(ChannelTest, PingPongNeverStalls) {
  EventLoop loop;
  std::unique_ptr<RouterChannel> router;
  auto bound = RouterChannel::bind(loop, kAnyPort,
                                   {[&](const PeerId& peer, ControlMessage message) {
                                      EXPECT_TRUE(router->send(peer, message).ok());
                                    },
                                    nullptr});
  ASSERT_TRUE(bound.ok()) << bound.status().to_string();
  router = std::move(bound).value();
  std::unique_ptr<DealerChannel> dealer;
  int64_t last = 0;
  auto connected = DealerChannel::connect(loop, router->endpoint(), {},
                                          {[&](ControlMessage message) {
                                             last = std::get<StepReport>(message).step;
                                             EXPECT_TRUE(dealer->send(report_of(last + 1)).ok());
                                           },
                                           nullptr, nullptr, nullptr});
  ASSERT_TRUE(connected.ok()) << connected.status().to_string();
  dealer = std::move(connected).value();
  ASSERT_TRUE(dealer->send(report_of(1)).ok());
  EXPECT_TRUE(run_until(loop, [&] { return last >= 2000; }));
}

TEST(ChannelTest, AnUnknownPeerIsUnavailable) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  EXPECT_EQ(router.channel->send("nobody", report_of(1)).code(), Code::kUnavailable);
  EXPECT_EQ(router.channel->send("", report_of(1)).code(), Code::kUnavailable);
}

TEST(ChannelTest, APortInUseIsNamed) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  const std::string endpoint = router.channel->endpoint();
  const auto second =
      RouterChannel::bind(loop, endpoint, {[](const PeerId&, ControlMessage) {}, {}});
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.status().code(), Code::kAlreadyExists);
  EXPECT_NE(second.status().message().find(endpoint), std::string::npos);
}

TEST(ChannelTest, ANonsenseEndpointIsInvalid) {
  EventLoop loop;
  for (const char* endpoint : {"", "localhost", "http://127.0.0.1:1", "tcp://127.0.0.1:99999"}) {
    const auto router =
        RouterChannel::bind(loop, endpoint, {[](const PeerId&, ControlMessage) {}, {}});
    EXPECT_EQ(router.status().code(), Code::kInvalidArgument) << endpoint;
    const auto dealer =
        DealerChannel::connect(loop, endpoint, {}, {[](ControlMessage) {}, {}, {}, {}});
    EXPECT_EQ(dealer.status().code(), Code::kInvalidArgument) << endpoint;
  }
}

TEST(ChannelTest, AnAddressOfAnotherMachineCannotBeBound) {
  EventLoop loop;
  const auto router =
      RouterChannel::bind(loop, "tcp://192.0.2.1:0", {[](const PeerId&, ControlMessage) {}, {}});
  ASSERT_FALSE(router.ok());
  EXPECT_NE(router.status().message().find("192.0.2.1"), std::string::npos);
}

TEST(ChannelTest, AnIdentityTooLongIsInvalid) {
  EventLoop loop;
  const auto dealer =
      DealerChannel::connect(loop, "tcp://127.0.0.1:1", {.identity = std::string(256, 'i')},
                             {[](ControlMessage) {}, {}, {}, {}});
  EXPECT_EQ(dealer.status().code(), Code::kInvalidArgument);
}

TEST(ChannelTest, AWrongMessageIsRefusedAtTheSender) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  Dealer dealer(loop, router.channel->endpoint());
  const Status status = dealer.channel->send(RanksStopped{{0}, {1}});
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_NE(status.message().find("job"), std::string::npos);
}

TEST(ChannelTest, AMessageOverTheFrameLimitIsRefusedAtTheSender) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  Dealer dealer(loop, router.channel->endpoint());
  BeginTraining begin = {.job = {1}, .epoch = {1}, .addresses = {}};
  begin.addresses.assign(kFrameBytesMax / kAddressBytesMax + 1, std::string(kAddressBytesMax, 'a'));
  const Status status = dealer.channel->send(begin);
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_NE(status.message().find(std::to_string(kFrameBytesMax)), std::string::npos);
}

TEST(ChannelTest, AGarbageFrameIsCountedReportedAndHarmless) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  RawDealer raw(router.channel->endpoint());
  raw.send("this is no message at all");
  ASSERT_TRUE(run_until(loop, [&] { return router.rejections.size() == 1; }));
  EXPECT_EQ(router.channel->frames_rejected(), 1U);
  EXPECT_EQ(router.channel->frames_received(), 1U);
  EXPECT_FALSE(router.rejections[0].peer.empty());
  EXPECT_EQ(router.rejections[0].byte_count, 25U);
  EXPECT_EQ(router.rejections[0].reason.code(), Code::kInvalidArgument);
  raw.send(text_of(report_of(8)));
  EXPECT_TRUE(run_until(loop, [&] { return router.received.size() == 1; }));
}

TEST(ChannelTest, AMessageOfSeveralFramesIsRefused) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  RawDealer raw(router.channel->endpoint());
  raw.send(text_of(report_of(1)), ZMQ_SNDMORE);
  raw.send(text_of(report_of(2)), ZMQ_SNDMORE);
  raw.send("third");
  ASSERT_TRUE(run_until(loop, [&] { return router.rejections.size() == 1; }));
  EXPECT_NE(router.rejections[0].reason.message().find("3 frames"), std::string::npos);
  EXPECT_TRUE(router.received.empty());
}

TEST(ChannelTest, AMessageOfAHundredThousandFramesIsOneRefusalAndHarmsNobodyElse) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  Dealer dealer(loop, router.channel->endpoint());
  RawDealer raw(router.channel->endpoint());
  for (int i = 1; i < 100'000; ++i) raw.send("four", ZMQ_SNDMORE);
  raw.send("last");
  raw.send(text_of(report_of(7)));
  ASSERT_TRUE(dealer.channel->send(report_of(1)).ok());
  ASSERT_TRUE(run_until(loop, [&] { return router.received.size() == 2; }));
  ASSERT_EQ(router.rejections.size(), 1U);
  EXPECT_EQ(router.rejections[0].byte_count, 400'000U);
  EXPECT_NE(router.rejections[0].reason.message().find("100000 frames"), std::string::npos);
  EXPECT_EQ(router.channel->frames_rejected(), 1U);
}

// The beginning of ZeroMQ's protocol (ZMTP 3.0, rfc.zeromq.org/spec/23) as a dealer speaks it.
std::string zmtp_hello() {
  std::string greeting("\xff\0\0\0\0\0\0\0\0\x7f\x03\0NULL", 16);
  greeting.resize(64, '\0');
  const std::string ready(
      "\x05READY\x0bSocket-Type\0\0\0\x06"
      "DEALER",
      28);
  return greeting + '\x04' + static_cast<char>(ready.size()) + ready;
}

// ZeroMQ keeps the frames of a message until its last one comes.
TEST(ChannelTest, AMessageThatNeverEndsClosesItsConnectionAndHarmsNobodyElse) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  Dealer dealer(loop, router.channel->endpoint());
  const FileDescriptor raw = connect_plain_tcp(router.channel->endpoint());
  std::string waiting = zmtp_hello();
  uint64_t sent_bytes = 0;
  bool cut_off = false;
  const std::string frame =
      std::string("\x03\0\0\0\0\0\x10\0\0", 9) + std::string(1 << 20, 'x');  // more to come
  const TimerId feed = loop.call_every(std::chrono::milliseconds(2), [&] {
    if (waiting.empty()) waiting = frame;
    const ssize_t count =
        send(raw.get(), waiting.data(), waiting.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    cut_off = count < 0 && errno != EAGAIN;
    if (count > 0) waiting.erase(0, static_cast<size_t>(count));
    if (count > 0) sent_bytes += static_cast<uint64_t>(count);
  });
  EXPECT_TRUE(run_until(loop, [&] { return cut_off; }));
  loop.cancel(feed);
  EXPECT_GT(sent_bytes, kBacklogBytesMax);
  ASSERT_EQ(router.rejections.size(), 1U);
  EXPECT_EQ(router.rejections[0].reason.code(), Code::kResourceExhausted);
  EXPECT_TRUE(router.rejections[0].address.starts_with("127.0.0.1:"))
      << router.rejections[0].address;
  EXPECT_GT(router.rejections[0].byte_count, kBacklogBytesMax);
  ASSERT_TRUE(dealer.channel->send(report_of(1)).ok());
  EXPECT_TRUE(run_until(loop, [&] { return router.received.size() == 1; }));
  EXPECT_EQ(dealer.disconnections, 0);
}

// However much comes, what is handed on is no backlog.
TEST(ChannelTest, AConnectionThatIsKeptUpWithMaySendWithoutEnd) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  Dealer dealer(loop, router.channel->endpoint());
  const LogChunk chunk = {{1}, {1}, {0}, 0, std::string(kTextBytesMax, 'x')};
  uint64_t sent_bytes = 0;
  EXPECT_TRUE(run_until(loop, [&] {
    router.received.clear();
    if (dealer.channel->send(chunk).ok()) sent_bytes += chunk.text.size();
    return sent_bytes > 3 * kBacklogBytesMax;
  }));
  run_for(loop, std::chrono::milliseconds(250));
  EXPECT_TRUE(router.rejections.empty());
  EXPECT_EQ(dealer.disconnections, 0);
}

TEST(ChannelTest, AnEmptyFrameIsRefused) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  RawDealer raw(router.channel->endpoint());
  raw.send("");
  EXPECT_TRUE(run_until(loop, [&] { return router.rejections.size() == 1; }));
}

// ZeroMQ closes the connection before a byte of the frame is kept; other peers notice nothing.
TEST(ChannelTest, AnOversizedFrameNeverArrivesAndHarmsNobodyElse) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  Dealer dealer(loop, router.channel->endpoint());
  ASSERT_TRUE(dealer.channel->send(report_of(1)).ok());
  ASSERT_TRUE(run_until(loop, [&] { return router.received.size() == 1; }));
  {
    RawDealer raw(router.channel->endpoint());
    raw.send(std::string(kFrameBytesMax + 8, 'x'));
    ASSERT_TRUE(dealer.channel->send(report_of(2)).ok());
    ASSERT_TRUE(run_until(loop, [&] { return router.received.size() == 2; }));
    run_for(loop, std::chrono::milliseconds(200));
  }
  EXPECT_EQ(router.channel->frames_received(), 2U);
  EXPECT_EQ(dealer.disconnections, 0);
}

// Bytes of other protocols and random ones, on the port itself.
TEST(ChannelTest, GarbageOnTheRawPortIsHarmless) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  std::string wrong_greeting("\xff\0\0\0\0\0\0\0\x01\x7f", 10);
  wrong_greeting += std::string("\x03\0", 2) + std::string(52, 'Z');
  const std::vector<std::string> garbage = {
      "GET / HTTP/1.1\r\nHost: x\r\n\r\n", std::string(100000, '\0'), std::string(64, '\xff'),
      wrong_greeting, "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS hello"};
  std::vector<FileDescriptor> sockets;
  for (const std::string& bytes : garbage) {
    sockets.push_back(connect_plain_tcp(router.channel->endpoint()));
    // MSG_NOSIGNAL: the router may close a connection at once.
    send(sockets.back().get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
  }
  EXPECT_TRUE(run_until(loop, [&] { return router.channel->frames_rejected() >= 1; }));
  sockets.clear();
  Dealer dealer(loop, router.channel->endpoint());
  ASSERT_TRUE(dealer.channel->send(report_of(3)).ok());
  ASSERT_TRUE(run_until(loop, [&] { return router.received.size() == 1; }));
  EXPECT_EQ(router.received[0].message, ControlMessage(report_of(3)));
}

TEST(ChannelTest, ADealerRefusesGarbageFromItsRouter) {
  EventLoop loop;
  void* context = zmq_ctx_new();
  void* raw = zmq_socket(context, ZMQ_DEALER);
  ASSERT_EQ(zmq_bind(raw, "tcp://127.0.0.1:*"), 0);
  std::array<char, 256> endpoint{};
  size_t size = endpoint.size();
  ASSERT_EQ(zmq_getsockopt(raw, ZMQ_LAST_ENDPOINT, endpoint.data(), &size), 0);
  {
    Dealer dealer(loop, endpoint.data());
    ASSERT_TRUE(run_until(loop, [&] { return dealer.connections == 1; }));
    ASSERT_EQ(zmq_send(raw, "rubbish", 7, 0), 7);
    EXPECT_TRUE(run_until(loop, [&] { return dealer.rejections.size() == 1; }));
    EXPECT_TRUE(dealer.received.empty());
  }
  zmq_close(raw);
  zmq_ctx_term(context);
}

TEST(ChannelTest, QueuedMessagesWaitForTheRouter) {
  EventLoop loop;
  std::string endpoint;
  {
    Router router(loop, kAnyPort);
    endpoint = router.channel->endpoint();
  }
  Dealer dealer(loop, endpoint);
  ASSERT_TRUE(dealer.channel->send(report_of(1)).ok());
  EXPECT_FALSE(dealer.channel->connected());
  Router router(loop, endpoint);
  EXPECT_TRUE(run_until(loop, [&] { return router.received.size() == 1; }));
}

TEST(ChannelTest, AnUnqueuedSendWithoutConnectionIsUnavailable) {
  EventLoop loop;
  std::string endpoint;
  {
    Router router(loop, kAnyPort);
    endpoint = router.channel->endpoint();
  }
  Dealer dealer(loop, endpoint, {.identity = "d", .queue_while_disconnected = false});
  EXPECT_EQ(dealer.channel->send(report_of(1)).code(), Code::kUnavailable);
}

TEST(ChannelTest, AQueueThatIsFullSaysSo) {
  EventLoop loop;
  std::string endpoint;
  {
    Router router(loop, kAnyPort);
    endpoint = router.channel->endpoint();
  }
  Dealer dealer(loop, endpoint);
  Status status;
  int accepted = 0;
  while (status.ok() && accepted <= 2 * kQueuedFramesMax) {
    status = dealer.channel->send(RanksStopped{{1}, {1}});
    if (status.ok()) ++accepted;
  }
  EXPECT_EQ(status.code(), Code::kResourceExhausted);
  EXPECT_EQ(accepted, kQueuedFramesMax);
}

// The worker daemon's life with a coordinator that restarts: told of the loss, reconnected by
// itself, and the first thing the new router hears is what on_connected sends, nothing left over
// from before.
TEST(ChannelTest, ADealerReconnectsToARestartedRouter) {
  EventLoop loop;
  auto router = std::make_unique<Router>(loop, kAnyPort);
  const std::string endpoint = router->channel->endpoint();
  Dealer dealer(loop, endpoint, {.identity = "w", .queue_while_disconnected = false});
  ASSERT_TRUE(run_until(loop, [&] { return dealer.connections == 1; }));
  ASSERT_TRUE(dealer.channel->send(report_of(1)).ok());
  ASSERT_TRUE(run_until(loop, [&] { return router->received.size() == 1; }));
  router.reset();
  ASSERT_TRUE(run_until(loop, [&] { return dealer.disconnections == 1; }));
  EXPECT_FALSE(dealer.channel->connected());
  EXPECT_EQ(dealer.channel->send(report_of(2)).code(), Code::kUnavailable);
  router = std::make_unique<Router>(loop, endpoint);
  ASSERT_TRUE(run_until(loop, [&] { return dealer.connections == 2; }));
  ASSERT_TRUE(dealer.channel->send(report_of(3)).ok());
  ASSERT_TRUE(run_until(loop, [&] { return !router->received.empty(); }));
  EXPECT_EQ(router->received[0].message, ControlMessage(report_of(3)));
}

TEST(ChannelTest, AHandlerMaySendAsSoonAsItIsConnected) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  std::unique_ptr<DealerChannel> dealer;
  Status sent = internal_error("not sent");
  auto connected = DealerChannel::connect(
      loop, router.channel->endpoint(), {.identity = "w", .queue_while_disconnected = false},
      {[](ControlMessage) {}, [&] { sent = dealer->send(report_of(1)); }, nullptr, nullptr});
  ASSERT_TRUE(connected.ok()) << connected.status().to_string();
  dealer = std::move(connected).value();
  ASSERT_TRUE(run_until(loop, [&] { return router.received.size() == 1; }));
  EXPECT_TRUE(sent.ok()) << sent.to_string();
}

TEST(ChannelTest, DestructionSendsWhatIsQueued) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  {
    Dealer dealer(loop, router.channel->endpoint());
    for (int64_t step = 1; step <= 100; ++step) {
      ASSERT_TRUE(dealer.channel->send(report_of(step)).ok());
    }
  }
  EXPECT_TRUE(run_until(loop, [&] { return router.received.size() == 100; }));
}

TEST(ChannelTest, AHandlerMayDestroyItsChannel) {
  EventLoop loop;
  Router router(loop, kAnyPort);
  std::unique_ptr<DealerChannel> dealer;
  bool destroyed = false;
  auto connected = DealerChannel::connect(loop, router.channel->endpoint(), {},
                                          {[&](ControlMessage) {
                                             dealer.reset();
                                             destroyed = true;
                                           },
                                           nullptr, nullptr, nullptr});
  ASSERT_TRUE(connected.ok()) << connected.status().to_string();
  dealer = std::move(connected).value();
  ASSERT_TRUE(dealer->send(report_of(1)).ok());
  ASSERT_TRUE(run_until(loop, [&] { return router.received.size() == 1; }));
  ASSERT_TRUE(router.channel->send(router.received[0].peer, report_of(1)).ok());
  ASSERT_TRUE(router.channel->send(router.received[0].peer, report_of(2)).ok());
  EXPECT_TRUE(run_until(loop, [&] { return destroyed; }));
  run_for(loop, std::chrono::milliseconds(20));
}

}  // namespace
}  // namespace penstock
