#include "comm/control/state_stream.h"

#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>

#include "comm/base/check.h"
#include "comm/control/pulse.h"

namespace penstock {
namespace {

constexpr uint64_t kRequestMagic = 0x31515254'534e4550;  // "PENSTRQ1"
constexpr uint64_t kAnswerMagic = 0x31415254'534e4550;   // "PENSTRA1"
constexpr int kCodeCount = static_cast<int>(Code::kInternal) + 1;

struct RequestLayout {
  uint64_t magic;
  uint32_t kind;
  uint32_t epoch;
  Digest key;
  uint64_t job;
  int64_t rank;
  int64_t step;
  Digest contents;
  uint64_t byte_count;
  Digest digest;  // of all before it
};
static_assert(sizeof(RequestLayout) == kStreamRequestBytes);

struct AnswerLayout {
  uint64_t magic;
  uint64_t code;
  Digest contents;
  uint64_t byte_count;
  uint64_t digest;  // low half, of all before it
};
static_assert(sizeof(AnswerLayout) == kStreamAnswerBytes);

template <typename Layout>
Bytes before_digest(const Layout& layout) {
  return {reinterpret_cast<const std::byte*>(&layout), offsetof(Layout, digest)};
}

template <typename Layout>
std::array<std::byte, sizeof(Layout)> bytes_of(const Layout& layout) {
  std::array<std::byte, sizeof(Layout)> bytes;
  std::memcpy(bytes.data(), &layout, sizeof layout);
  return bytes;
}

// What fits into one send or receive: the digest and the block it is of.
using DigestBytes = std::array<std::byte, sizeof(Digest)>;

int64_t deadline(Duration patience) {
  return monotonic_ns() + patience.count();
}

}  // namespace

std::array<std::byte, kStreamRequestBytes> encode_stream_request(const StreamRequest& request) {
  RequestLayout layout = {};
  layout.magic = kRequestMagic;
  layout.kind = static_cast<uint32_t>(request.kind);
  layout.epoch = request.epoch.value;
  layout.key = request.key;
  layout.job = request.job.value;
  layout.rank = request.rank.value;
  layout.step = request.step;
  layout.contents = request.contents;
  layout.byte_count = request.byte_count;
  layout.digest = digest_of(before_digest(layout));
  return bytes_of(layout);
}

Result<StreamRequest> decode_stream_request(Bytes bytes) {
  RequestLayout layout;
  if (bytes.size() != sizeof layout) return invalid_argument("no request for a rank's state");
  std::memcpy(&layout, bytes.data(), sizeof layout);
  if (layout.magic != kRequestMagic || layout.digest != digest_of(before_digest(layout))) {
    return invalid_argument("no request for a rank's state");
  }
  const bool stores = layout.kind == static_cast<uint32_t>(StreamKind::kStore);
  const bool fetches = layout.kind == static_cast<uint32_t>(StreamKind::kFetch);
  const bool named = layout.job != 0 && layout.epoch != 0 && layout.rank >= 0 &&
                     layout.rank <= std::numeric_limits<int32_t>::max() && layout.step >= 1;
  const bool sized = stores ? layout.byte_count >= 1 && layout.byte_count <= kStreamedStateBytesMax
                            : layout.byte_count == 0;
  if (!(stores || fetches) || !named || !sized) {
    return invalid_argument("a request for a rank's state has a field out of range");
  }
  return StreamRequest{.kind = static_cast<StreamKind>(layout.kind),
                       .key = layout.key,
                       .job = {layout.job},
                       .epoch = {layout.epoch},
                       .rank = {static_cast<int32_t>(layout.rank)},
                       .step = layout.step,
                       .contents = layout.contents,
                       .byte_count = layout.byte_count};
}

std::array<std::byte, kStreamAnswerBytes> encode_stream_answer(const StreamAnswer& answer) {
  AnswerLayout layout = {};
  layout.magic = kAnswerMagic;
  layout.code = static_cast<uint64_t>(answer.code);
  layout.contents = answer.contents;
  layout.byte_count = answer.byte_count;
  layout.digest = digest_of(before_digest(layout)).low;
  return bytes_of(layout);
}

Result<StreamAnswer> decode_stream_answer(Bytes bytes) {
  AnswerLayout layout;
  if (bytes.size() != sizeof layout) return invalid_argument("no answer about a rank's state");
  std::memcpy(&layout, bytes.data(), sizeof layout);
  const bool sound = layout.magic == kAnswerMagic &&
                     layout.digest == digest_of(before_digest(layout)).low &&
                     layout.code < kCodeCount && layout.byte_count <= kStreamedStateBytesMax;
  if (!sound) return invalid_argument("no answer about a rank's state");
  return StreamAnswer{static_cast<Code>(layout.code), layout.contents, layout.byte_count};
}

Result<StateConnection> StateConnection::connect(const std::string& address, Duration patience) {
  PENSTOCK_TRY_ASSIGN(const SocketAddress to, resolve_endpoint("tcp://" + address));
  const int family = to.storage.ss_family;
  FileDescriptor socket(::socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket.valid()) return errno_status(errno, "socket");
  const int fd = socket.get();
  StateConnection connection(std::move(socket));
  if (::connect(fd, to.get(), to.size) == 0) return connection;
  if (errno == EINPROGRESS) {
    PENSTOCK_TRY(connection.wait(POLLOUT, deadline(patience)));
    int error_number = 0;
    socklen_t size = sizeof error_number;
    if (::getsockopt(fd, SOL_SOCKET, SO_ERROR, &error_number, &size) != 0) error_number = errno;
    if (error_number == 0) return connection;
    errno = error_number;
  }
  return unavailable(fmt::format("connect to {}: {}", address, std::strerror(errno)));
}

Result<StreamAnswer> StateConnection::ask(const StreamRequest& request, Duration patience) {
  PENSTOCK_TRY(send(encode_stream_request(request), deadline(patience)));
  return hear_answer(patience);
}

Result<StreamAnswer> StateConnection::hear_answer(Duration patience) {
  std::array<std::byte, kStreamAnswerBytes> bytes;
  PENSTOCK_TRY(receive(bytes, deadline(patience)));
  PENSTOCK_TRY_ASSIGN(const StreamAnswer answer, decode_stream_answer(bytes));
  if (answer.code == Code::kOk) return answer;
  return Status(answer.code, fmt::format("refused: {}", code_name(answer.code)));
}

Result<StreamRequest> StateConnection::hear_request(Duration patience) {
  std::array<std::byte, kStreamRequestBytes> bytes;
  PENSTOCK_TRY(receive(bytes, deadline(patience)));
  return decode_stream_request(bytes);
}

Status StateConnection::answer(const StreamAnswer& answer, Duration patience) {
  return send(encode_stream_answer(answer), deadline(patience));
}

Status StateConnection::send_state(Bytes state, Duration patience_per_block,
                                   const std::function<Status(size_t)>& before_block) {
  while (!state.empty()) {
    const Bytes block = state.first(std::min(state.size(), kStreamBlockBytes));
    if (before_block) PENSTOCK_TRY(before_block(block.size()));
    const int64_t deadline_ns = deadline(patience_per_block);
    PENSTOCK_TRY(send(std::bit_cast<DigestBytes>(digest_of(block)), deadline_ns));
    PENSTOCK_TRY(send(block, deadline_ns));
    state = state.subspan(block.size());
  }
  return {};
}

Status StateConnection::receive_state(MutableBytes state, Duration patience_per_block) {
  while (!state.empty()) {
    const MutableBytes block = state.first(std::min(state.size(), kStreamBlockBytes));
    const int64_t deadline_ns = deadline(patience_per_block);
    DigestBytes digest;
    PENSTOCK_TRY(receive(digest, deadline_ns));
    PENSTOCK_TRY(receive(block, deadline_ns));
    if (digest_of(block) != std::bit_cast<Digest>(digest)) {
      return data_loss("a block of a rank's state is not what was sent");
    }
    state = state.subspan(block.size());
  }
  return {};
}

void StateConnection::shut_down() const {
  ::shutdown(socket_.get(), SHUT_RDWR);
}

Status StateConnection::send(Bytes bytes, int64_t deadline_ns) {
  while (!bytes.empty()) {
    const ssize_t count = ::send(socket_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (count >= 0) {
      bytes = bytes.subspan(static_cast<size_t>(count));
    } else if (errno == EAGAIN) {
      PENSTOCK_TRY(wait(POLLOUT, deadline_ns));
    } else if (errno != EINTR) {
      return unavailable(fmt::format("send a rank's state: {}", std::strerror(errno)));
    }
  }
  return {};
}

Status StateConnection::receive(MutableBytes bytes, int64_t deadline_ns) {
  while (!bytes.empty()) {
    const ssize_t count = ::recv(socket_.get(), bytes.data(), bytes.size(), 0);
    if (count > 0) {
      bytes = bytes.subspan(static_cast<size_t>(count));
    } else if (count == 0) {
      return unavailable("the other side of a rank's state is gone");
    } else if (errno == EAGAIN) {
      PENSTOCK_TRY(wait(POLLIN, deadline_ns));
    } else if (errno != EINTR) {
      return unavailable(fmt::format("receive a rank's state: {}", std::strerror(errno)));
    }
  }
  return {};
}

Status StateConnection::wait(short events, int64_t deadline_ns) const {
  constexpr int64_t kNanosecondsPerMillisecond = 1'000'000;
  for (;;) {
    const int64_t left_ns = deadline_ns - monotonic_ns();
    if (left_ns <= 0) return deadline_exceeded("a rank's state did not move in time");
    pollfd waiting = {socket_.get(), events, 0};
    const int ready =
        ::poll(&waiting, 1, static_cast<int>(left_ns / kNanosecondsPerMillisecond) + 1);
    if (ready > 0) return {};
    if (ready < 0 && errno != EINTR) return errno_status(errno, "poll");
  }
}

}  // namespace penstock
