// Pulses: datagrams by which a worker daemon shows that it is there, several in the time of one
// heartbeat, and by which the coordinator shows that it has taken note.
//
// Heartbeats go over the control channel and say what runs. On a link that loses packets that
// connection is silent for seconds: what is behind a lost segment waits for it to be sent again,
// each time twice as long as before. A pulse waits for nothing before it. Where datagrams do not
// get through at all, heartbeats alone show that a worker is there.
//
// The coordinator listens to them on the port of its control channel, over UDP.
#pragma once

#include <sys/socket.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "comm/base/bytes.h"
#include "comm/base/file.h"
#include "comm/base/ids.h"
#include "comm/base/status.h"

namespace penstock {

struct Pulse {
  WorkerId worker;           // given at registration, never 0
  uint64_t incarnation = 0;  // of the daemon, never 0
  uint64_t sequence = 0;     // strictly increasing per incarnation; an answer repeats it
  uint16_t life_port = 0;    // of the daemon (lifelines.h), on the host it pulses from; 0: none
  bool is_answer = false;
  bool operator==(const Pulse&) const = default;
};

inline constexpr size_t kPulseBytes = 40;
// Pulses in the time of one heartbeat.
inline constexpr int kPulsesPerBeat = 4;

std::array<std::byte, kPulseBytes> encode_pulse(const Pulse& pulse);
// Nothing: the datagram is no pulse of this version.
std::optional<Pulse> decode_pulse(Bytes datagram);

// Of a socket, of IP version 4 or 6.
struct SocketAddress {
  sockaddr_storage storage = {};
  socklen_t size = 0;
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};

// Of "tcp://host:port", as ZeroMQ takes it: version 6 only where the host is in brackets. May wait
// for a name server. kInvalidArgument: it is no such endpoint; kNotFound: the host is not known.
Result<SocketAddress> resolve_endpoint(const std::string& endpoint);

// Non-blocking, bound to that address, or connected to it.
Result<FileDescriptor> bind_datagrams(const SocketAddress& address);
Result<FileDescriptor> connect_datagrams(const SocketAddress& address);

// Listens on a free port of the address that `socket`, a connected one, has on this host; its
// number goes to *port.
Result<FileDescriptor> listen_beside(const FileDescriptor& socket, uint16_t* port);
// The same host, another port.
SocketAddress with_port(const SocketAddress& address, uint16_t port);

}  // namespace penstock
