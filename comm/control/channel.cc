#include "comm/control/channel.h"

#include <charconv>

#include "comm/base/log.h"
#include "comm/control/channel_socket.h"
#include "comm/control/codec.h"

namespace penstock {
namespace {

constexpr size_t kIdentityBytesMax = 255;

// ZeroMQ takes a port's low 16 bits; 99999 must not silently become 34463.
Status check_endpoint(const std::string& endpoint) {
  constexpr std::string_view kTcp = "tcp://";
  if (endpoint.rfind("ipc://", 0) == 0 && endpoint.size() > 6) return {};
  const size_t colon = endpoint.rfind(':');
  if (endpoint.rfind(kTcp, 0) == 0 && colon != std::string::npos && colon > kTcp.size()) {
    const char* const begin = endpoint.data() + colon + 1;
    const char* const end = endpoint.data() + endpoint.size();
    uint16_t port = 0;
    const auto [rest, error] = std::from_chars(begin, end, port);
    if (error == std::errc() && rest == end) return {};
  }
  return invalid_argument(fmt::format(
      "endpoint \"{}\" is neither tcp://address:port with a port of 0 to 65535 nor ipc://path",
      endpoint));
}

// The frame of a message that the other side will accept.
Result<std::vector<std::byte>> checked_frame(const ControlMessage& message) {
  PENSTOCK_TRY(check_message(message));
  std::vector<std::byte> frame = encode(message);
  if (frame.size() <= kFrameBytesMax) return frame;
  return invalid_argument(fmt::format("{}: its frame of {} bytes exceeds {}", message_name(message),
                                      frame.size(), kFrameBytesMax));
}

Result<ControlMessage> decode_message(const ZmqMessage& message) {
  if (message.payload_parts != 1) {
    return invalid_argument(fmt::format("a message of {} frames, not 1", message.payload_parts));
  }
  return decode(message.payload);
}

}  // namespace

struct RouterChannel::Impl {
  void on_message(const ZmqMessage& raw) {
    ++frames_received;
    const PeerId peer(as_text(raw.identity));
    Result<ControlMessage> message = decode_message(raw);
    if (message.ok()) {
      // Copies of handlers: they may destroy this channel.
      const auto deliver = handlers.on_message;
      deliver(peer, std::move(message).value());
      return;
    }
    reject({.peer = peer, .address = "", .byte_count = raw.byte_count, .reason = message.status()});
  }

  void on_event(ZmqEvent event, const std::string& address, uint64_t byte_count) {
    Status reason;
    if (event == ZmqEvent::kHandshakeFailed) {
      reason = invalid_argument("a connection that does not speak ZeroMQ's protocol");
    } else if (event == ZmqEvent::kShutDown) {
      reason = resource_exhausted(fmt::format(
          "{} bytes of {} waited to be handled, more than {}: a message that does not end, or more "
          "than can be kept up with; its connection was closed",
          byte_count, address, kBacklogBytesMax));
    }
    if (!reason.ok()) {
      reject({.peer = "", .address = address, .byte_count = byte_count, .reason = reason});
    }
  }

  void reject(const Rejection& rejection) {
    ++frames_rejected;
    // A peer that sends nothing but garbage must not fill the log: 1, 2, 4, 8, … are enough.
    if ((frames_rejected & (frames_rejected - 1)) == 0) {
      log_warning("refused control frame {} on {}: {}", frames_rejected, endpoint,
                  rejection.reason.message());
    }
    const auto report = handlers.on_rejected;
    if (report) report(rejection);
  }

  std::shared_ptr<ZmqSocket> socket;
  Handlers handlers;
  std::string endpoint;
  uint64_t frames_received = 0;
  uint64_t frames_rejected = 0;
};

RouterChannel::RouterChannel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
RouterChannel::~RouterChannel() {
  impl_->socket->close();
}

Result<std::unique_ptr<RouterChannel>> RouterChannel::bind(EventLoop& loop,
                                                           const std::string& endpoint,
                                                           Handlers handlers) {
  PENSTOCK_CHECK(handlers.on_message != nullptr);
  PENSTOCK_TRY(check_endpoint(endpoint));
  auto impl = std::make_unique<Impl>();
  const ZmqSocketOptions router_options = {
      .kind = ZmqKind::kRouter, .identity = "", .queue_unconnected = true};
  PENSTOCK_TRY_ASSIGN(impl->socket, ZmqSocket::open(loop, router_options));
  PENSTOCK_TRY_ASSIGN(impl->endpoint, impl->socket->bind(endpoint));
  impl->handlers = std::move(handlers);
  Impl* const raw = impl.get();  // outlives the socket's callbacks: the destructor closes first
  impl->socket->start({[raw](const ZmqMessage& message) { raw->on_message(message); },
                       [raw](ZmqEvent event, const std::string& address, uint64_t byte_count) {
                         raw->on_event(event, address, byte_count);
                       }});
  return std::make_unique<RouterChannel>(std::move(impl));
}

const std::string& RouterChannel::endpoint() const {
  return impl_->endpoint;
}
uint64_t RouterChannel::frames_received() const {
  return impl_->frames_received;
}
uint64_t RouterChannel::frames_rejected() const {
  return impl_->frames_rejected;
}

Status RouterChannel::send(const PeerId& peer, const ControlMessage& message) {
  if (peer.empty()) return unavailable("no such peer is connected: its id is empty");
  PENSTOCK_TRY_ASSIGN(const std::vector<std::byte> frame, checked_frame(message));
  return impl_->socket->send(peer, frame);
}

struct DealerChannel::Impl {
  void on_message(const ZmqMessage& raw) {
    Result<ControlMessage> message = decode_message(raw);
    if (message.ok()) {
      const auto deliver = handlers.on_message;
      deliver(std::move(message).value());
      return;
    }
    log_warning("refused control frame from {}: {}", endpoint, message.status().message());
    const auto report = handlers.on_rejected;
    if (report) {
      report({.peer = "",
              .address = endpoint,
              .byte_count = raw.byte_count,
              .reason = message.status()});
    }
  }

  void on_event(ZmqEvent event) {
    const bool now_connected = event == ZmqEvent::kConnected;
    if (now_connected == connected) return;  // a failed attempt is no disconnection
    connected = now_connected;
    const auto notify = connected ? handlers.on_connected : handlers.on_disconnected;
    if (notify) notify();
  }

  std::shared_ptr<ZmqSocket> socket;
  Handlers handlers;
  std::string endpoint;
  bool queue_while_disconnected = true;
  bool connected = false;
};

DealerChannel::DealerChannel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
DealerChannel::~DealerChannel() {
  impl_->socket->close();
}

Result<std::unique_ptr<DealerChannel>> DealerChannel::connect(EventLoop& loop,
                                                              const std::string& endpoint,
                                                              DealerOptions options,
                                                              Handlers handlers) {
  PENSTOCK_CHECK(handlers.on_message != nullptr);
  PENSTOCK_TRY(check_endpoint(endpoint));
  if (options.identity.size() > kIdentityBytesMax) {
    return invalid_argument(fmt::format("an identity of {} bytes, at most {} are allowed",
                                        options.identity.size(), kIdentityBytesMax));
  }
  auto impl = std::make_unique<Impl>();
  PENSTOCK_TRY_ASSIGN(
      impl->socket, ZmqSocket::open(loop, {.kind = ZmqKind::kDealer,
                                           .identity = options.identity,
                                           .queue_unconnected = options.queue_while_disconnected}));
  PENSTOCK_TRY(impl->socket->connect(endpoint));
  impl->handlers = std::move(handlers);
  impl->endpoint = endpoint;
  impl->queue_while_disconnected = options.queue_while_disconnected;
  Impl* const raw = impl.get();  // outlives the socket's callbacks: the destructor closes first
  impl->socket->start(
      {[raw](const ZmqMessage& message) { raw->on_message(message); },
       [raw](ZmqEvent event, const std::string&, uint64_t) { raw->on_event(event); }});
  return std::make_unique<DealerChannel>(std::move(impl));
}

bool DealerChannel::connected() const {
  return impl_->connected;
}

Status DealerChannel::send(const ControlMessage& message) {
  if (!impl_->connected && !impl_->queue_while_disconnected) {
    return unavailable(fmt::format("not connected to {}", impl_->endpoint));
  }
  PENSTOCK_TRY_ASSIGN(const std::vector<std::byte> frame, checked_frame(message));
  return impl_->socket->send("", frame);
}

}  // namespace penstock
