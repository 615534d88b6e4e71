#include "comm/control/lifelines.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "comm/base/clock.h"

namespace penstock {
namespace {

// After which a line that the network broke, or that never stood, is tried anew.
constexpr Duration kRest = std::chrono::seconds(1);
// For what the process had sent to be read.
constexpr Duration kLastMessages = std::chrono::milliseconds(10);

bool same_address(const SocketAddress& a, const SocketAddress& b) {
  return a.size == b.size && std::memcmp(&a.storage, &b.storage, a.size) == 0;
}

int pending_error(int fd) {
  int error_number = 0;
  socklen_t size = sizeof error_number;
  if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error_number, &size) != 0) return errno;
  return error_number;
}

}  // namespace

Lifelines::~Lifelines() {
  for (auto& [worker, line] : lines_) let_go(line);
}

void Lifelines::hold(WorkerId worker, uint64_t incarnation, const SocketAddress& address) {
  Line& line = lines_[worker];
  if (line.incarnation != incarnation || !same_address(line.address, address)) {
    let_go(line);
    line = {};
    line.incarnation = incarnation;
    line.address = address;
  }
  const bool busy = line.socket.valid() || line.timer != TimerId{};
  if (!busy && monotonic_ns() >= line.not_before_ns) connect(worker);
}

void Lifelines::let_go(Line& line) {
  loop_.unwatch(line.watch);
  loop_.cancel(line.timer);
  line.watch = {};
  line.timer = {};
  line.socket = FileDescriptor();
}

void Lifelines::rest(Line& line, Duration span) {
  let_go(line);
  line.not_before_ns = monotonic_ns() + span.count();
}

void Lifelines::connect(WorkerId worker) {
  Line& line = lines_.at(worker);
  let_go(line);
  const int family = line.address.storage.ss_family;
  line.socket = FileDescriptor(::socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!line.socket.valid()) return rest(line, kRest);
  if (::connect(line.socket.get(), line.address.get(), line.address.size) != 0) {
    if (errno == ECONNREFUSED) return refused(worker);
    if (errno != EINPROGRESS) return rest(line, kRest);
  }
  // Nobody ever says anything on it: when there is something to read, it is over.
  line.watch = loop_.watch_readable(line.socket.get(), [this, worker] { look(worker); });
}

void Lifelines::look(WorkerId worker) {
  Line& line = lines_.at(worker);
  const int error_number = pending_error(line.socket.get());
  if (error_number == ECONNREFUSED) return refused(worker);
  if (error_number == ECONNRESET) return ended(worker);
  if (error_number != 0) return rest(line, kRest);
  char byte = 0;
  const ssize_t count = recv(line.socket.get(), &byte, 1, 0);
  if (count == 0 || (count < 0 && errno == ECONNRESET)) return ended(worker);
  if (count < 0 && errno == EAGAIN) return;
  line.stood = false;  // something else listens there
  rest(line, kRest);
}

// Of a connection that stood. Whether it was the last, the next attempt shows.
void Lifelines::ended(WorkerId worker) {
  Line& line = lines_.at(worker);
  let_go(line);
  line.stood = true;
  line.timer = loop_.call_after(line.pause, [this, worker] { connect(worker); });
  line.pause = std::min(2 * line.pause, kPauseMax);
}

void Lifelines::refused(WorkerId worker) {
  Line& line = lines_.at(worker);
  if (!line.stood) return rest(line, kRest);
  let_go(line);
  line.timer = loop_.call_after(kLastMessages, [this, worker] {
    const uint64_t incarnation = lines_.at(worker).incarnation;
    lines_.erase(worker);
    on_gone_(worker, incarnation);
  });
}

}  // namespace penstock
