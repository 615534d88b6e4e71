// The base of transports that do something more with what another one moves.
#pragma once

#include "comm/data/transport.h"

namespace penstock {

// Hands everything on. Borrows `inner`, which must outlive it. Same threads as `inner`.
class ForwardingTransport : public Transport {
 public:
  explicit ForwardingTransport(Transport& inner) : inner_(inner) {}

  Rank rank() const override { return inner_.rank(); }
  int32_t world_size() const override { return inner_.world_size(); }
  TransferHandle send(Rank peer, Tag tag, Bytes bytes) override {
    return inner_.send(peer, tag, bytes);
  }
  TransferHandle receive(Rank peer, Tag tag, MutableBytes into) override {
    return inner_.receive(peer, tag, into);
  }
  Result<uint64_t> wait(TransferHandle handle, int64_t* completed_ns) override {
    return inner_.wait(handle, completed_ns);
  }
  bool done(TransferHandle handle) override { return inner_.done(handle); }
  void abort() override { inner_.abort(); }
  uint64_t bytes_sent() const override { return inner_.bytes_sent(); }

 private:
  Transport& inner_;
};

}  // namespace penstock
