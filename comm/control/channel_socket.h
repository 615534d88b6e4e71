// One ZeroMQ socket with its monitor, driven by an EventLoop. Internal to channel.cc: the only file
// beside channel_socket.cc that includes this.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "comm/base/bytes.h"
#include "comm/base/status.h"
#include "comm/control/connection_backlogs.h"
#include "comm/control/event_loop.h"

namespace penstock {

enum class ZmqKind { kRouter, kDealer };

// kShutDown: by us, because too much of it waited (connection_backlogs.h): byte_count.
enum class ZmqEvent { kConnected, kDisconnected, kHandshakeFailed, kShutDown };

struct ZmqSocketOptions {
  ZmqKind kind = ZmqKind::kDealer;
  std::string identity;           // dealer only; empty: none
  bool queue_unconnected = true;  // dealer only
};

// One whole message. The views hold during the callback.
struct ZmqMessage {
  Bytes identity;  // router only
  Bytes payload;
  size_t payload_parts = 0;  // anything but 1 is no message of ours
  uint64_t byte_count = 0;   // of all payload parts
};

// Loop thread only. Held by shared_ptr because a callback may drop its owner; close() then ends all
// callbacks.
class ZmqSocket : public std::enable_shared_from_this<ZmqSocket> {
 public:
  struct Handlers {
    std::function<void(const ZmqMessage&)> on_message;
    std::function<void(ZmqEvent, const std::string& address, uint64_t byte_count)> on_event;
  };

  static Result<std::shared_ptr<ZmqSocket>> open(EventLoop& loop, const ZmqSocketOptions& options);
  explicit ZmqSocket(EventLoop& loop) : loop_(loop) {}  // for open()
  ~ZmqSocket();

  // Returns the endpoint really bound.
  Result<std::string> bind(const std::string& endpoint);
  Status connect(const std::string& endpoint);
  // Begins calling `handlers`, from the loop, never from here.
  void start(Handlers handlers);
  // Sends what is queued for at most the linger time; no callback runs afterwards. Idempotent.
  void close();

  // `identity` empty: a dealer's send. Never blocks. Codes as RouterChannel::send.
  Status send(const std::string& identity, Bytes payload);

 private:
  Status configure(const ZmqSocketOptions& options);
  Status open_monitor();
  Status ping_over_network(const std::string& endpoint);
  Status allow_ipv6(const std::string& endpoint);
  void drain();
  void drain_monitor();
  bool receive_one();
  bool skip_frames();
  void deliver(Bytes identity, Bytes payload);
  void shut_down_excessive();
  bool receive_event();
  void schedule_drain();
  bool readable(void* socket) const;

  EventLoop& loop_;
  ZmqKind kind_ = ZmqKind::kDealer;
  Handlers handlers_;
  void* context_ = nullptr;  // owned; nullptr once closed
  void* socket_ = nullptr;   // owned
  void* monitor_ = nullptr;  // owned
  WatchId socket_watch_;
  WatchId monitor_watch_;
  TimerId backlog_timer_;
  bool drain_scheduled_ = false;
  ConnectionBacklogs backlogs_;  // router over TCP only
  // Of the message being received, beyond its first frame.
  bool skipping_ = false;  // it has several frames, which makes it none of ours
  std::string skipped_identity_;
  size_t parts_ = 0;
  uint64_t byte_count_ = 0;
};

}  // namespace penstock
