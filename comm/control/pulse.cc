#include "comm/control/pulse.h"

#include <netdb.h>
#include <netinet/in.h>

#include <cerrno>
#include <limits>

namespace penstock {
namespace {

constexpr uint64_t kPulseMagic = 0x31455355'4c504e50;  // "PNPULSE1"
constexpr uint32_t kAnswerFlag = 1;
constexpr int kBacklog = 16;
// Of a thousand workers for a second: they wait there while the coordinator does something else.
constexpr int kReceiveBufferBytes = 4 << 20;

struct Layout {
  uint64_t magic;
  uint64_t worker;
  uint64_t incarnation;
  uint64_t sequence;
  uint32_t flags;
  uint32_t life_port;
};
static_assert(sizeof(Layout) == kPulseBytes);

Result<FileDescriptor> open_datagrams(const SocketAddress& address) {
  const int fd = ::socket(address.storage.ss_family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return errno_status(errno, "socket for pulses");
  return FileDescriptor(fd);
}

}  // namespace

std::array<std::byte, kPulseBytes> encode_pulse(const Pulse& pulse) {
  const Layout layout = {kPulseMagic,
                         pulse.worker.value,
                         pulse.incarnation,
                         pulse.sequence,
                         pulse.is_answer ? kAnswerFlag : 0,
                         pulse.life_port};
  std::array<std::byte, kPulseBytes> datagram;
  std::memcpy(datagram.data(), &layout, sizeof layout);
  return datagram;
}

std::optional<Pulse> decode_pulse(Bytes datagram) {
  Layout layout = {};
  if (datagram.size() != sizeof layout) return std::nullopt;
  std::memcpy(&layout, datagram.data(), sizeof layout);
  if (layout.magic != kPulseMagic || layout.flags > kAnswerFlag) return std::nullopt;
  if (layout.worker == 0 || layout.incarnation == 0) return std::nullopt;
  if (layout.life_port > std::numeric_limits<uint16_t>::max()) return std::nullopt;
  return Pulse{{layout.worker},
               layout.incarnation,
               layout.sequence,
               static_cast<uint16_t>(layout.life_port),
               layout.flags == kAnswerFlag};
}

Result<SocketAddress> resolve_endpoint(const std::string& endpoint) {
  constexpr std::string_view kTcp = "tcp://";
  const size_t colon = endpoint.rfind(':');
  if (!endpoint.starts_with(kTcp) || colon == std::string::npos || colon <= kTcp.size()) {
    return invalid_argument(fmt::format("endpoint \"{}\" is not tcp://host:port", endpoint));
  }
  std::string host = endpoint.substr(kTcp.size(), colon - kTcp.size());
  addrinfo hints = {};
  hints.ai_family = AF_INET;
  hints.ai_socktype = SOCK_DGRAM;
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
    hints.ai_family = AF_INET6;
  }
  addrinfo* found = nullptr;
  const int error = getaddrinfo(host.c_str(), endpoint.c_str() + colon + 1, &hints, &found);
  if (error != 0) return not_found(fmt::format("{}: {}", endpoint, gai_strerror(error)));
  SocketAddress address;
  address.size = found->ai_addrlen;
  std::memcpy(&address.storage, found->ai_addr, found->ai_addrlen);
  freeaddrinfo(found);
  return address;
}

Result<FileDescriptor> bind_datagrams(const SocketAddress& address) {
  PENSTOCK_TRY_ASSIGN(FileDescriptor fd, open_datagrams(address));
  // Less than asked for is what the system allows, and will do.
  setsockopt(fd.get(), SOL_SOCKET, SO_RCVBUF, &kReceiveBufferBytes, sizeof kReceiveBufferBytes);
  if (bind(fd.get(), address.get(), address.size) != 0) return errno_status(errno, "bind over UDP");
  return fd;
}

Result<FileDescriptor> connect_datagrams(const SocketAddress& address) {
  PENSTOCK_TRY_ASSIGN(FileDescriptor fd, open_datagrams(address));
  if (connect(fd.get(), address.get(), address.size) != 0) return errno_status(errno, "connect");
  return fd;
}

SocketAddress with_port(const SocketAddress& address, uint16_t port) {
  SocketAddress changed = address;
  // In one place of both versions' addresses.
  static_assert(offsetof(sockaddr_in, sin_port) == offsetof(sockaddr_in6, sin6_port));
  reinterpret_cast<sockaddr_in*>(&changed.storage)->sin_port = htons(port);
  return changed;
}

Result<FileDescriptor> listen_beside(const FileDescriptor& socket, uint16_t* port) {
  SocketAddress local;
  local.size = sizeof local.storage;
  auto* const raw = reinterpret_cast<sockaddr*>(&local.storage);
  if (getsockname(socket.get(), raw, &local.size) != 0) return errno_status(errno, "getsockname");
  local = with_port(local, 0);
  const int family = local.storage.ss_family;
  FileDescriptor listening(::socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!listening.valid()) return errno_status(errno, "socket");
  if (bind(listening.get(), local.get(), local.size) != 0) return errno_status(errno, "bind");
  if (listen(listening.get(), kBacklog) != 0) return errno_status(errno, "listen");
  if (getsockname(listening.get(), raw, &local.size) != 0)
    return errno_status(errno, "getsockname");
  *port = ntohs(reinterpret_cast<const sockaddr_in*>(raw)->sin_port);
  return listening;
}

}  // namespace penstock
