// Moves tagged byte ranges between the ranks of one attempt of one job.
//
// Messages between one pair of ranks with one tag are delivered in order; different tags are
// independent. Buffers are borrowed until wait() returns for their handle. One thread (the rank's
// compute thread) calls everything here; a transport may make progress on a thread of its own,
// which sleeps when nothing moves. A peer that dies makes every operation on it fail with
// kUnavailable: a rank never waits for the dead longer than the failure detector of the transport
// needs, and never repairs itself; it exits.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/base/bytes.h"
#include "comm/base/ids.h"
#include "comm/base/status.h"

namespace penstock {

// 40 bits are the caller's; a transport adds source and epoch itself.
struct Tag {
  uint64_t value = 0;
};
inline constexpr uint64_t kTagBits = 40;

// An operation under way. Valid until waited for; each is waited for exactly once.
struct TransferHandle {
  uint32_t index = UINT32_MAX;
  // Whom it waits for: noted by who asks (worker/engine/measured_transport.h), not by transports.
  int32_t peer = -1;
  bool sends = false;
  bool valid() const { return index != UINT32_MAX; }
};

class Transport {
 public:
  virtual ~Transport() = default;

  virtual Rank rank() const = 0;
  virtual int32_t world_size() const = 0;

  // Starts sending `bytes` to `peer`. REQUIRES: peer != rank(), tag.value < 2^kTagBits.
  virtual TransferHandle send(Rank peer, Tag tag, Bytes bytes) = 0;
  // Starts receiving at most `into.size()` bytes from `peer`.
  virtual TransferHandle receive(Rank peer, Tag tag, MutableBytes into) = 0;
  // Blocks until the operation is complete. The bytes moved, or why not: kUnavailable when the peer
  // is gone, kDataLoss when the message was longer than the buffer, kDeadlineExceeded past the
  // timeout given at construction. `completed_ns`, where given, gets when the transport saw it
  // complete (monotonic_ns()), which may be long before it is waited for.
  virtual Result<uint64_t> wait(TransferHandle handle, int64_t* completed_ns = nullptr) = 0;
  // Whether wait() would return at once. Makes progress.
  virtual bool done(TransferHandle handle) = 0;
  // Fails every operation under way and every later one with kAborted. Any thread; idempotent;
  // never blocks on a peer. The way out for a rank that must stop while its compute thread is
  // inside wait().
  virtual void abort() = 0;
  // Payload bytes handed to send() since construction. Any thread.
  virtual uint64_t bytes_sent() const = 0;
};

}  // namespace penstock
