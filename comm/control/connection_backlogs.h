// Bounds what a peer can make ZeroMQ hold: it keeps all frames of a message until the last one has
// come, counts only whole messages against its queue bounds, and so lets one connection take all
// memory with a message that never ends.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace penstock {

// What may have come over one connection without having been handed on: several of the largest
// messages. ZeroMQ takes at most 32 times as much memory, for frames of no bytes.
inline constexpr uint64_t kBacklogBytesMax = uint64_t{64} << 20;

// What arrived at each TCP connection is asked of the kernel. Not thread-safe.
class ConnectionBacklogs {
 public:
  // Of a connection that another owns; its descriptor may be closed and used again at any time.
  void opened(int fd);
  void closed(int fd) { connections_.erase(fd); }
  void handed_on(int fd, uint64_t frame_bytes);

  struct Excess {
    std::string address;
    uint64_t byte_count = 0;
  };
  // Shuts down connections over kBacklogBytesMax. Looks at kChecksMax of them; the next call goes
  // on with the next.
  std::vector<Excess> shut_down_excessive();
  static constexpr int kChecksMax = 1024;

 private:
  struct Connection {
    uint64_t cookie = 0;  // the socket's own, never used again
    int64_t opened_ns = 0;
    uint64_t handed_on_bytes = 0;
  };

  std::map<int, Connection> connections_;  // by descriptor
  int next_ = 0;                           // descriptor
};

}  // namespace penstock
