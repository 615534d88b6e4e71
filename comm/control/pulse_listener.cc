#include "comm/control/pulse_listener.h"

namespace penstock {
namespace {

// Per turn: more than the socket's buffer holds only while somebody floods it.
constexpr int kBatchMax = 20'000;

}  // namespace

Result<std::unique_ptr<PulseListener>> PulseListener::bind(EventLoop& loop,
                                                           const std::string& endpoint,
                                                           Handler handler) {
  PENSTOCK_TRY_ASSIGN(const SocketAddress address, resolve_endpoint(endpoint));
  PENSTOCK_TRY_ASSIGN(FileDescriptor fd, bind_datagrams(address));
  // Out of make_unique's reach: the constructor is private.
  std::unique_ptr<PulseListener> made(new PulseListener(loop, std::move(fd), std::move(handler)));
  made->watch_ = loop.watch_readable(made->fd_.get(), [raw = made.get()] { raw->hear_all(); });
  return made;
}

PulseListener::~PulseListener() {
  loop_.unwatch(watch_);
}

void PulseListener::hear_all() {
  for (int i = 0; i < kBatchMax; ++i) {
    std::array<std::byte, kPulseBytes + 1> datagram;  // a longer one shows as longer
    SocketAddress from;
    from.size = sizeof from.storage;
    const ssize_t count = recvfrom(fd_.get(), datagram.data(), datagram.size(), 0,
                                   reinterpret_cast<sockaddr*>(&from.storage), &from.size);
    if (count < 0) return;
    const auto pulse = decode_pulse({datagram.data(), static_cast<size_t>(count)});
    if (!pulse || pulse->is_answer || !handler_(*pulse, from)) continue;
    Pulse answer = *pulse;
    answer.is_answer = true;
    const auto bytes = encode_pulse(answer);
    // One that cannot be sent is as good as lost: the next pulse is answered again.
    sendto(fd_.get(), bytes.data(), bytes.size(), 0, from.get(), from.size);
  }
}

}  // namespace penstock
