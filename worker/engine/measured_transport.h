// A transport that measures how long its caller waits: one per purpose over one real transport, so
// that a step's time can be told apart into waiting for expert peers, for pipeline neighbours and
// for reductions.
#pragma once

#include "comm/data/transport.h"

namespace penstock {

// Borrows `inner`, which must outlive it. Same threads as `inner`.
class MeasuredTransport : public Transport {
 public:
  explicit MeasuredTransport(Transport& inner) : inner_(inner) {}

  Rank rank() const override { return inner_.rank(); }
  int32_t world_size() const override { return inner_.world_size(); }
  TransferHandle send(Rank peer, Tag tag, Bytes bytes) override {
    return inner_.send(peer, tag, bytes);
  }
  TransferHandle receive(Rank peer, Tag tag, MutableBytes into) override {
    return inner_.receive(peer, tag, into);
  }
  Result<uint64_t> wait(TransferHandle handle) override;
  bool done(TransferHandle handle) override { return inner_.done(handle); }
  void abort() override { inner_.abort(); }
  uint64_t bytes_sent() const override { return inner_.bytes_sent(); }

  // Nanoseconds spent inside wait() since construction. Caller's thread only.
  int64_t waited_ns() const { return waited_ns_; }

 private:
  Transport& inner_;
  int64_t waited_ns_ = 0;
};

}  // namespace penstock
