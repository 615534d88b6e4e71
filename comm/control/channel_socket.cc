#include "comm/control/channel_socket.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <zmq.h>

#include <array>
#include <cerrno>

#include "comm/control/channel.h"
#include "comm/control/message.h"

namespace penstock {
namespace {

// Messages handled per turn of the loop, so that one busy peer does not starve timers and other
// sockets.
constexpr int kBatchMax = 64;
// Frames dropped in one go, of a message that has too many.
constexpr int kSkippedFramesMax = 4096;
constexpr Duration kBacklogCheckInterval = std::chrono::milliseconds(100);
constexpr int kReconnectMinMs = 10;
constexpr int kReconnectMaxMs = 1000;
// A connection that says nothing at all for this long is closed: ZeroMQ answers these by itself,
// also while the peer's loop is busy, so only a dead host or a broken network is silent.
constexpr int kPingIntervalMs = 2000;
constexpr int kPingTimeoutMs = 10000;
constexpr int kHandshakeMs = 5000;
// While the process is stopped; workers find out so that it is (pulse_thread.h). The system may
// allow less.
constexpr int kConnectionsWaitingMax = 4096;

constexpr int kMonitoredEvents =
    ZMQ_EVENT_ACCEPTED | ZMQ_EVENT_CONNECTED | ZMQ_EVENT_HANDSHAKE_SUCCEEDED |
    ZMQ_EVENT_DISCONNECTED | ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL |
    ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL | ZMQ_EVENT_HANDSHAKE_FAILED_AUTH;

Status zmq_status(int error_number, const std::string& what) {
  const std::string message = fmt::format("{}: {}", what, zmq_strerror(error_number));
  switch (error_number) {
    case EADDRINUSE:
      return already_exists(fmt::format(
          "{}: the address is in use; stop the other program or choose another port", what));
    case EINVAL:
    case EPROTONOSUPPORT:
    case ENODEV:
    case ENOCOMPATPROTO:
    case ENAMETOOLONG:
      return invalid_argument(message);
    case EADDRNOTAVAIL:
      return invalid_argument(fmt::format("{}: this machine has no such address", what));
    case EACCES:
    case EPERM:
      return permission_denied(message);
    default:
      return internal_error(message);
  }
}

Status set_option(void* socket, int option, int value) {
  if (zmq_setsockopt(socket, option, &value, sizeof value) == 0) return {};
  return zmq_status(errno, fmt::format("ZeroMQ option {}", option));
}

int file_descriptor_of(void* socket) {
  int fd = -1;
  size_t size = sizeof fd;
  const int rc = zmq_getsockopt(socket, ZMQ_FD, &fd, &size);
  PENSTOCK_CHECK(rc == 0, errno);
  return fd;
}

// What a lossy link swallows is sent again after the same time each time, not after twice as long:
// a control connection has few small segments under way, and adds to no congestion. ZeroMQ's own
// threads may have closed the descriptor already, so whatever goes wrong is no error.
void send_again_soon(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS, &on, sizeof on);
}

// Closes itself; zmq_msg_t owns a buffer once received into.
struct Message {
  Message() { zmq_msg_init(&message); }
  ~Message() { zmq_msg_close(&message); }
  Message(const Message&) = delete;
  Message& operator=(const Message&) = delete;
  bool receive(void* socket) { return zmq_msg_recv(&message, socket, ZMQ_DONTWAIT) >= 0; }
  bool more() const { return zmq_msg_more(&message) != 0; }
  Bytes bytes() {
    return {static_cast<const std::byte*>(zmq_msg_data(&message)), zmq_msg_size(&message)};
  }
  // Of the connection it came over; -1 when ZeroMQ does not say.
  int source() { return zmq_msg_get(&message, ZMQ_SRCFD); }
  zmq_msg_t message;
};

}  // namespace

Result<std::shared_ptr<ZmqSocket>> ZmqSocket::open(EventLoop& loop,
                                                   const ZmqSocketOptions& options) {
  const auto socket = std::make_shared<ZmqSocket>(loop);
  socket->context_ = zmq_ctx_new();
  if (socket->context_ == nullptr) return zmq_status(errno, "zmq_ctx_new");
  const int type = options.kind == ZmqKind::kRouter ? ZMQ_ROUTER : ZMQ_DEALER;
  socket->socket_ = zmq_socket(socket->context_, type);
  if (socket->socket_ == nullptr) return zmq_status(errno, "zmq_socket");
  PENSTOCK_TRY(socket->configure(options));
  PENSTOCK_TRY(socket->open_monitor());
  return socket;
}

Status ZmqSocket::configure(const ZmqSocketOptions& options) {
  kind_ = options.kind;
  PENSTOCK_TRY(set_option(socket_, ZMQ_LINGER, kLingerMs));
  PENSTOCK_TRY(set_option(socket_, ZMQ_SNDHWM, kQueuedFramesMax));
  PENSTOCK_TRY(set_option(socket_, ZMQ_RCVHWM, kQueuedFramesMax));
  PENSTOCK_TRY(set_option(socket_, ZMQ_HANDSHAKE_IVL, kHandshakeMs));
  const int64_t frame_bytes_max = kFrameBytesMax;
  if (zmq_setsockopt(socket_, ZMQ_MAXMSGSIZE, &frame_bytes_max, sizeof frame_bytes_max) != 0) {
    return zmq_status(errno, "ZMQ_MAXMSGSIZE");
  }
  if (kind_ == ZmqKind::kRouter) {
    PENSTOCK_TRY(set_option(socket_, ZMQ_BACKLOG, kConnectionsWaitingMax));
    PENSTOCK_TRY(set_option(socket_, ZMQ_ROUTER_MANDATORY, 1));
    return set_option(socket_, ZMQ_ROUTER_HANDOVER, 1);
  }
  PENSTOCK_TRY(set_option(socket_, ZMQ_RECONNECT_IVL, kReconnectMinMs));
  PENSTOCK_TRY(set_option(socket_, ZMQ_RECONNECT_IVL_MAX, kReconnectMaxMs));
  PENSTOCK_TRY(set_option(socket_, ZMQ_IMMEDIATE, options.queue_unconnected ? 0 : 1));
  const std::string& identity = options.identity;
  if (identity.empty()) return {};
  if (zmq_setsockopt(socket_, ZMQ_ROUTING_ID, identity.data(), identity.size()) != 0) {
    return zmq_status(errno, fmt::format("identity \"{}\"", identity));
  }
  return {};
}

Status ZmqSocket::open_monitor() {
  constexpr const char* kMonitorEndpoint = "inproc://monitor";  // the context is this socket's own
  if (zmq_socket_monitor(socket_, kMonitorEndpoint, kMonitoredEvents) != 0) {
    return zmq_status(errno, "zmq_socket_monitor");
  }
  monitor_ = zmq_socket(context_, ZMQ_PAIR);
  if (monitor_ == nullptr) return zmq_status(errno, "zmq_socket");
  PENSTOCK_TRY(set_option(monitor_, ZMQ_LINGER, 0));
  if (zmq_connect(monitor_, kMonitorEndpoint) != 0) return zmq_status(errno, kMonitorEndpoint);
  return {};
}

ZmqSocket::~ZmqSocket() {
  close();
}

void ZmqSocket::close() {
  loop_.unwatch(socket_watch_);
  loop_.unwatch(monitor_watch_);
  loop_.cancel(backlog_timer_);
  handlers_ = {};
  if (socket_ != nullptr) {
    zmq_socket_monitor(socket_, nullptr, 0);
    if (monitor_ != nullptr) zmq_close(monitor_);
    zmq_close(socket_);
  }
  socket_ = nullptr;
  monitor_ = nullptr;
  if (context_ != nullptr) {
    // Waits for the linger time at most; interrupted by signals, which have their own handlers.
    while (zmq_ctx_term(context_) != 0 && errno == EINTR) {
    }
  }
  context_ = nullptr;
}

// Only across a network can the other side vanish without the system closing its connection; a
// process that is merely stopped for a while must not lose a local one.
Status ZmqSocket::ping_over_network(const std::string& endpoint) {
  if (endpoint.rfind("tcp://", 0) != 0) return {};
  PENSTOCK_TRY(set_option(socket_, ZMQ_HEARTBEAT_IVL, kPingIntervalMs));
  return set_option(socket_, ZMQ_HEARTBEAT_TIMEOUT, kPingTimeoutMs);
}

// Only where it is asked for: with it, "localhost" could mean ::1 where the other side listens on
// 127.0.0.1.
Status ZmqSocket::allow_ipv6(const std::string& endpoint) {
  if (endpoint.rfind("tcp://[", 0) != 0) return {};
  return set_option(socket_, ZMQ_IPV6, 1);
}

Result<std::string> ZmqSocket::bind(const std::string& endpoint) {
  PENSTOCK_TRY(ping_over_network(endpoint));
  PENSTOCK_TRY(allow_ipv6(endpoint));
  if (zmq_bind(socket_, endpoint.c_str()) != 0) {
    return zmq_status(errno, fmt::format("bind {}", endpoint));
  }
  std::array<char, 1024> bound{};
  size_t size = bound.size();
  if (zmq_getsockopt(socket_, ZMQ_LAST_ENDPOINT, bound.data(), &size) != 0) {
    return zmq_status(errno, fmt::format("endpoint of {}", endpoint));
  }
  return std::string(bound.data());
}

Status ZmqSocket::connect(const std::string& endpoint) {
  PENSTOCK_TRY(ping_over_network(endpoint));
  PENSTOCK_TRY(allow_ipv6(endpoint));
  if (zmq_connect(socket_, endpoint.c_str()) == 0) return {};
  return zmq_status(errno, fmt::format("connect {}", endpoint));
}

void ZmqSocket::start(Handlers handlers) {
  handlers_ = std::move(handlers);
  socket_watch_ = loop_.watch_readable(file_descriptor_of(socket_), [this] { drain(); });
  monitor_watch_ = loop_.watch_readable(file_descriptor_of(monitor_), [this] { drain_monitor(); });
  if (kind_ == ZmqKind::kRouter) {
    backlog_timer_ = loop_.call_every(kBacklogCheckInterval, [this] { shut_down_excessive(); });
  }
  // What arrived before the watches does not signal again.
  schedule_drain();
}

bool ZmqSocket::readable(void* socket) const {
  if (socket == nullptr) return false;
  int events = 0;
  size_t size = sizeof events;
  if (zmq_getsockopt(socket, ZMQ_EVENTS, &events, &size) != 0) return false;
  return (events & ZMQ_POLLIN) != 0;
}

// ZMQ_FD is edge-triggered and any call on the socket may swallow the edge, so whoever called one
// looks at ZMQ_EVENTS afterwards and comes back when there is something left.
void ZmqSocket::schedule_drain() {
  if (drain_scheduled_) return;
  drain_scheduled_ = true;
  loop_.post([weak = weak_from_this()] {
    const auto self = weak.lock();
    if (self == nullptr) return;
    self->drain_scheduled_ = false;
    self->drain();
    self->drain_monitor();
  });
}

void ZmqSocket::drain() {
  const auto self = shared_from_this();  // a handler may drop the channel
  for (int i = 0; i < kBatchMax && readable(socket_); ++i) {
    if (!receive_one()) break;
  }
  if (readable(socket_)) schedule_drain();
}

void ZmqSocket::drain_monitor() {
  const auto self = shared_from_this();
  for (int i = 0; i < kBatchMax && readable(monitor_); ++i) {
    if (!receive_event()) break;
  }
  if (readable(monitor_)) schedule_drain();
}

bool ZmqSocket::receive_one() {
  if (skipping_) return skip_frames();
  Message identity;
  if (kind_ == ZmqKind::kRouter && !identity.receive(socket_)) return false;
  Message payload;
  bool more = kind_ == ZmqKind::kDealer || identity.more();
  parts_ = 0;
  byte_count_ = 0;
  if (more) {
    if (!payload.receive(socket_)) return false;
    more = payload.more();
    parts_ = 1;
    byte_count_ = payload.bytes().size();
    if (kind_ == ZmqKind::kRouter) backlogs_.handed_on(payload.source(), byte_count_);
  }
  if (more) {
    skipping_ = true;
    skipped_identity_ = as_text(identity.bytes());
    return skip_frames();
  }
  deliver(identity.bytes(), payload.bytes());
  return true;
}

// A message may have millions of frames: they are dropped a few thousand a turn.
bool ZmqSocket::skip_frames() {
  for (int i = 0; i < kSkippedFramesMax; ++i) {
    Message surplus;
    if (!surplus.receive(socket_)) return false;
    parts_ += 1;
    byte_count_ += surplus.bytes().size();
    if (kind_ == ZmqKind::kRouter) {
      backlogs_.handed_on(surplus.source(), surplus.bytes().size());
    }
    if (surplus.more()) continue;
    skipping_ = false;
    deliver(as_bytes(skipped_identity_), {});
    return true;
  }
  return true;
}

void ZmqSocket::deliver(Bytes identity, Bytes payload) {
  // A copy: the handler may close this socket, and close() clears handlers_.
  const auto on_message = handlers_.on_message;
  on_message({identity, payload, parts_, byte_count_});
}

void ZmqSocket::shut_down_excessive() {
  const auto self = shared_from_this();  // a handler may drop the channel
  for (const ConnectionBacklogs::Excess& excess : backlogs_.shut_down_excessive()) {
    const auto on_event = handlers_.on_event;
    if (on_event) on_event(ZmqEvent::kShutDown, excess.address, excess.byte_count);
  }
}

bool ZmqSocket::receive_event() {
  Message header;
  if (!header.receive(monitor_)) return false;
  uint16_t kind = 0;
  int32_t value = 0;  // a descriptor, or why it failed
  PENSTOCK_CHECK(header.bytes().size() == sizeof kind + sizeof value, header.bytes().size());
  std::memcpy(&kind, header.bytes().data(), sizeof kind);
  std::memcpy(&value, header.bytes().data() + sizeof kind, sizeof value);
  Message address;
  if (!header.more() || !address.receive(monitor_)) return false;
  if (kind == ZMQ_EVENT_ACCEPTED || kind == ZMQ_EVENT_CONNECTED) {
    send_again_soon(value);
    if (kind == ZMQ_EVENT_ACCEPTED) backlogs_.opened(value);
    return true;
  }
  ZmqEvent event = ZmqEvent::kHandshakeFailed;
  if (kind == ZMQ_EVENT_HANDSHAKE_SUCCEEDED) event = ZmqEvent::kConnected;
  if (kind == ZMQ_EVENT_DISCONNECTED) {
    event = ZmqEvent::kDisconnected;
    backlogs_.closed(value);
  }
  // A connection's pipe is attached by a command that reading ZMQ_EVENTS processes: the handler may
  // send at once.
  if (readable(socket_)) schedule_drain();
  const auto on_event = handlers_.on_event;
  on_event(event, std::string(as_text(address.bytes())), 0);
  return true;
}

Status ZmqSocket::send(const std::string& identity, Bytes payload) {
  PENSTOCK_CHECK(socket_ != nullptr);
  int rc = 0;
  if (!identity.empty()) {
    rc = zmq_send(socket_, identity.data(), identity.size(), ZMQ_DONTWAIT | ZMQ_SNDMORE);
  }
  if (rc >= 0) rc = zmq_send(socket_, payload.data(), payload.size(), ZMQ_DONTWAIT);
  const int error_number = errno;
  if (readable(socket_)) schedule_drain();
  if (rc >= 0) return {};
  if (error_number == EHOSTUNREACH) return unavailable("no such peer is connected");
  if (error_number == EAGAIN) {
    return resource_exhausted(
        fmt::format("the connection's queue of {} frames is full, or there "
                    "is no connection",
                    kQueuedFramesMax));
  }
  return zmq_status(error_number, "send");
}

}  // namespace penstock
