// A transport that remembers a digest of all that a rank sends and receives, so that two passes
// over the same instructions can be compared. The first transfer that differs tells whose fault it
// is: a rank that sends what it did not send before, although nothing it received differed until
// then, has computed something else.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "comm/base/hash.h"
#include "comm/data/forwarding_transport.h"

namespace penstock {

struct TransferDifference {
  bool sent = false;  // by this rank; else received
  Rank peer;
  Tag tag;
};

// Borrows `inner`, which must outlive it. Same threads as `inner`.
class AuditedTransport : public ForwardingTransport {
 public:
  using ForwardingTransport::ForwardingTransport;

  TransferHandle send(Rank peer, Tag tag, Bytes bytes) override;
  TransferHandle receive(Rank peer, Tag tag, MutableBytes into) override;
  Result<uint64_t> wait(TransferHandle handle, int64_t* completed_ns) override;

  // What is posted from now on is of pass 0 or 1, and remembered. REQUIRES: nothing is under way.
  void begin_pass(size_t pass);
  // Ends pass 1. The first transfer of pass 0 that pass 1 did not repeat bit for bit: of those
  // between two ranks with one tag, in their order.
  std::optional<TransferDifference> end_passes();

 private:
  struct Transfer {
    TransferDifference what;
    Digest digest;
  };
  struct UnderWay {
    uint32_t handle = 0;
    TransferDifference what;
    MutableBytes into;
  };
  std::optional<size_t> pass_;
  std::array<std::vector<Transfer>, 2> passes_;
  std::vector<UnderWay> receiving_;
};

}  // namespace penstock
