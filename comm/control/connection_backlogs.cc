#include "comm/control/connection_backlogs.h"

#include <arpa/inet.h>
#include <linux/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <optional>

#include "comm/base/clock.h"
#include "comm/base/ip_address.h"

namespace penstock {
namespace {

// Around a frame on the wire.
constexpr uint64_t kFrameOverheadBytesMax = 9;
// Greeting, pings and their answers are handed to nobody.
constexpr double kProtocolBytesPerSecond = 1024;

template <typename T>
std::optional<T> socket_option(int fd, int level, int name) {
  T value = {};
  socklen_t size = sizeof value;
  if (getsockopt(fd, level, name, &value, &size) != 0) return std::nullopt;
  return value;
}

std::optional<uint64_t> cookie_of(int fd) {
  return socket_option<uint64_t>(fd, SOL_SOCKET, SO_COOKIE);
}

std::string peer_of(int fd) {
  sockaddr_storage peer = {};
  socklen_t size = sizeof peer;
  std::array<char, INET6_ADDRSTRLEN> text = {};
  if (getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &size) != 0) return "?";
  const auto* v4 = reinterpret_cast<const sockaddr_in*>(&peer);
  const auto* v6 = reinterpret_cast<const sockaddr_in6*>(&peer);
  const bool is_v6 = peer.ss_family == AF_INET6;
  const void* address = is_v6 ? static_cast<const void*>(&v6->sin6_addr) : &v4->sin_addr;
  if (inet_ntop(peer.ss_family, address, text.data(), text.size()) == nullptr) return "?";
  return host_and_port(text.data(), ntohs(is_v6 ? v6->sin6_port : v4->sin_port));
}

}  // namespace

void ConnectionBacklogs::opened(int fd) {
  closed(fd);
  const std::optional<uint64_t> cookie = cookie_of(fd);
  if (cookie) connections_[fd] = {*cookie, monotonic_ns(), 0};
}

void ConnectionBacklogs::handed_on(int fd, uint64_t frame_bytes) {
  const auto connection = connections_.find(fd);
  if (connection == connections_.end()) return;
  connection->second.handed_on_bytes += frame_bytes + kFrameOverheadBytesMax;
}

std::vector<ConnectionBacklogs::Excess> ConnectionBacklogs::shut_down_excessive() {
  std::vector<Excess> excess;
  auto at = connections_.lower_bound(next_);
  for (int checks = 0; checks < kChecksMax && at != connections_.end(); ++checks) {
    const auto& [fd, connection] = *at;
    const auto info = socket_option<tcp_info>(fd, IPPROTO_TCP, TCP_INFO);
    if (!info || cookie_of(fd) != connection.cookie) {
      at = connections_.erase(at);
      continue;
    }
    const double age_seconds = to_seconds(Duration(monotonic_ns() - connection.opened_ns));
    const auto protocol_bytes = static_cast<uint64_t>(age_seconds * kProtocolBytesPerSecond);
    const uint64_t accounted = connection.handed_on_bytes + protocol_bytes + kBacklogBytesMax;
    if (info->tcpi_bytes_received > accounted) {
      excess.push_back({peer_of(fd), info->tcpi_bytes_received - connection.handed_on_bytes});
      shutdown(fd, SHUT_RDWR);
      at = connections_.erase(at);
      continue;
    }
    ++at;
  }
  next_ = at == connections_.end() ? 0 : at->first;
  return excess;
}

}  // namespace penstock
