// A transport that measures what its caller does with it: one per purpose over one real transport,
// so that waiting for expert peers, for pipeline neighbours and for reductions can be told apart.
// Says in the flight record whom the caller waits for.
#pragma once

#include "comm/data/forwarding_transport.h"
#include "worker/engine/flight_recorder.h"

namespace penstock {

// What happened on a transport in a while.
struct TransportActivity {
  int32_t post_count = 0;  // sends and receives started
  int32_t wait_count = 0;
  int64_t sent_bytes = 0;
  int64_t wait_begin_ns = 0;  // of the first wait
  int64_t wait_end_ns = 0;    // of the last
  int64_t completed_ns = 0;   // of what was waited for, the last to be complete
};

// Borrows `inner` and `flight`, which must outlive it. Same threads as `inner`.
class MeasuredTransport : public ForwardingTransport {
 public:
  MeasuredTransport(Transport& inner, FlightRecorder& flight)
      : ForwardingTransport(inner), flight_(flight) {}

  TransferHandle send(Rank peer, Tag tag, Bytes bytes) override;
  TransferHandle receive(Rank peer, Tag tag, MutableBytes into) override;
  Result<uint64_t> wait(TransferHandle handle, int64_t* completed_ns) override;

  // Nanoseconds spent inside wait() since construction. Caller's thread only, as the next.
  int64_t waited_ns() const { return waited_ns_; }
  // Since the last call, or construction.
  TransportActivity take_activity();

 private:
  FlightRecorder& flight_;
  int64_t waited_ns_ = 0;
  TransportActivity activity_;
};

}  // namespace penstock
