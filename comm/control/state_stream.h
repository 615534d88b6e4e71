// One rank's state on its way from host to host: from a daemon to the one that keeps a copy of it,
// and from there to a rank that goes on from it.
//
//   caller                                  daemon that was called
//   request (kStreamRequestBytes)  ──────►  who, what, and the daemon's key; all else is refused
//                                  ◄──────  answer (kStreamAnswerBytes)
//   kStore: blocks                 ──────►
//                                  ◄──────  a second answer: all of it is there, and kept
//   kFetch:                        ◄──────  blocks
//
// A block is a digest (16 bytes) and the kStreamBlockBytes it is of, of the last one fewer: how
// much is to come is known from the request or the answer, and never from the blocks. Fields are
// little-endian. What is received is untrusted until its digest was compared.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>

#include "comm/base/bytes.h"
#include "comm/base/clock.h"
#include "comm/base/file.h"
#include "comm/base/hash.h"
#include "comm/base/ids.h"

namespace penstock {

enum class StreamKind : uint32_t { kStore = 1, kFetch = 2 };

struct StreamRequest {
  StreamKind kind = StreamKind::kFetch;
  Digest key;  // of the daemon that is called, who gave it to the coordinator
  JobId job;
  Epoch epoch;  // whose ranks trained the state
  Rank rank;
  int64_t step = 0;
  Digest contents = {};     // kStore: as HeldStateIdentity
  uint64_t byte_count = 0;  // kStore: of the state; else 0
  bool operator==(const StreamRequest&) const = default;
};

struct StreamAnswer {
  Code code = Code::kOk;  // why not
  Digest contents = {};   // kFetch
  uint64_t byte_count = 0;
  bool operator==(const StreamAnswer&) const = default;
};

inline constexpr size_t kStreamRequestBytes = 96;
inline constexpr size_t kStreamAnswerBytes = 48;
inline constexpr size_t kStreamBlockBytes = 1 << 20;
inline constexpr uint64_t kStreamedStateBytesMax = uint64_t{1} << 42;

std::array<std::byte, kStreamRequestBytes> encode_stream_request(const StreamRequest& request);
// kInvalidArgument: it is none, or a field is out of its range.
Result<StreamRequest> decode_stream_request(Bytes bytes);
std::array<std::byte, kStreamAnswerBytes> encode_stream_answer(const StreamAnswer& answer);
Result<StreamAnswer> decode_stream_answer(Bytes bytes);

// One connection; a socket that does not block. One thread at a time, but shut_down(). Everything
// has a deadline: kDeadlineExceeded; kUnavailable: the other side is gone.
class StateConnection {
 public:
  explicit StateConnection(FileDescriptor socket) : socket_(std::move(socket)) {}
  // `address` as "host:port".
  static Result<StateConnection> connect(const std::string& address, Duration patience);

  // Asks, and hears the answer; the code of a refusal comes back as Status.
  Result<StreamAnswer> ask(const StreamRequest& request, Duration patience);
  Result<StreamAnswer> hear_answer(Duration patience);
  Result<StreamRequest> hear_request(Duration patience);
  Status answer(const StreamAnswer& answer, Duration patience);

  // All of `state`, `before_block` before each block; what that returns, when it is no Ok, ends it.
  Status send_state(Bytes state, Duration patience_per_block,
                    const std::function<Status(size_t block_bytes)>& before_block = {});
  // kDataLoss: a digest does not fit, and what is in `state` is of no use.
  Status receive_state(MutableBytes state, Duration patience_per_block);

  // On any thread, while another one waits in any of the above: that fails.
  void shut_down() const;

 private:
  Status send(Bytes bytes, int64_t deadline_ns);
  Status receive(MutableBytes bytes, int64_t deadline_ns);
  Status wait(short events, int64_t deadline_ns) const;

  FileDescriptor socket_;
};

}  // namespace penstock
