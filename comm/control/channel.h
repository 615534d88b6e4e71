// Control-plane connections over ZeroMQ: RouterChannel is the side that binds and serves many
// peers, DealerChannel the side that connects to one and reconnects by itself. Both carry whole
// ControlMessages; frames are decoded here and nobody past this header sees one.
//
// Delivery: in order per connection, at most once. What was on its way when a connection broke is
// lost; who needs more repeats (message.h says per message who does).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "comm/base/status.h"
#include "comm/control/event_loop.h"
#include "comm/control/message.h"

namespace penstock {

// Frames waiting in one connection's queue, per direction. A send beyond it is kResourceExhausted.
inline constexpr int kQueuedFramesMax = 10000;

// ZeroMQ's routing id of one peer: bytes, opaque, at most 255. Stable over reconnects only when the
// peer chose it.
using PeerId = std::string;

// What a RouterChannel refused: what is no message of one frame, or a connection that does not
// speak the protocol, or of which more than kBacklogBytesMax (connection_backlogs.h) waited.
struct Rejection {
  PeerId peer;          // empty when the peer never got as far as having one
  std::string address;  // of a refused connection, when known
  uint64_t byte_count = 0;
  Status reason;
};

// Loop thread only. Borrows the loop, which must outlive it. Destruction sends what is queued for
// at most kLingerMs and closes.
class RouterChannel {
 public:
  struct Handlers {
    std::function<void(const PeerId&, ControlMessage)> on_message;
    std::function<void(const Rejection&)> on_rejected;  // may be empty
  };

  // `endpoint`: "tcp://127.0.0.1:7070", "tcp://[::1]:7070" (port 0: any free one) or
  // "ipc:///path/of/socket".
  // kAlreadyExists when it is in use; kInvalidArgument when it is no endpoint. Handlers run on the
  // loop, never from inside bind().
  static Result<std::unique_ptr<RouterChannel>> bind(EventLoop& loop, const std::string& endpoint,
                                                     Handlers handlers);
  ~RouterChannel();
  RouterChannel(const RouterChannel&) = delete;
  RouterChannel& operator=(const RouterChannel&) = delete;

  // What is really bound, with the real port; a DealerChannel can connect to it.
  const std::string& endpoint() const;
  // Queues one message. kUnavailable: no such peer is connected (nothing is kept for it).
  // kResourceExhausted: its queue is full. kInvalidArgument: check_message() or kFrameBytesMax
  // refuses the message.
  Status send(const PeerId& peer, const ControlMessage& message);

  uint64_t frames_received() const;  // rejected ones included
  uint64_t frames_rejected() const;  // refused frames and connections

  struct Impl;
  explicit RouterChannel(std::unique_ptr<Impl> impl);  // for bind(); nobody else has an Impl

 private:
  std::unique_ptr<Impl> impl_;
};

struct DealerOptions {
  // Routing id to present, 1 to 255 bytes, not starting with a zero byte; empty: the router invents
  // one per connection. Of two connections with one id the router keeps the newer.
  std::string identity;
  // What send() does while there is no connection. True: messages wait, at most kQueuedFramesMax.
  // False: send() is kUnavailable, and what was queued when a connection breaks is dropped, so that
  // the first message of every connection is the one on_connected sends.
  bool queue_while_disconnected = true;
};

// Loop thread only. Borrows the loop, which must outlive it. Destruction sends what is queued for
// at most kLingerMs and closes.
class DealerChannel {
 public:
  struct Handlers {
    std::function<void(ControlMessage)> on_message;
    std::function<void()> on_connected;                 // after each (re)connection; may be empty
    std::function<void()> on_disconnected;              // may be empty
    std::function<void(const Rejection&)> on_rejected;  // a frame that is no message; may be empty
  };

  // Starts connecting; returns at once, also while nobody listens. Retries forever, between 10 ms
  // and 1 s apart. kInvalidArgument when `endpoint` is none. Handlers run on the loop, never from
  // inside connect() or send().
  static Result<std::unique_ptr<DealerChannel>> connect(EventLoop& loop,
                                                        const std::string& endpoint,
                                                        DealerOptions options, Handlers handlers);
  ~DealerChannel();
  DealerChannel(const DealerChannel&) = delete;
  DealerChannel& operator=(const DealerChannel&) = delete;

  bool connected() const;  // as last told to on_connected/on_disconnected
  // Queues one message. kUnavailable: not connected, and the options say not to wait.
  // kResourceExhausted: the queue is full. kInvalidArgument: check_message() or kFrameBytesMax
  // refuses the message.
  Status send(const ControlMessage& message);

  struct Impl;
  explicit DealerChannel(std::unique_ptr<Impl> impl);  // for connect(); nobody else has an Impl

 private:
  std::unique_ptr<Impl> impl_;
};

inline constexpr int kLingerMs = 1000;

}  // namespace penstock
