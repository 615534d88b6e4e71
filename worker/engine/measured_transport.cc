#include "worker/engine/measured_transport.h"

#include <algorithm>
#include <utility>

#include "comm/base/clock.h"

namespace penstock {

TransferHandle MeasuredTransport::send(Rank peer, Tag tag, Bytes bytes) {
  ++activity_.post_count;
  activity_.sent_bytes += static_cast<int64_t>(bytes.size());
  TransferHandle handle = ForwardingTransport::send(peer, tag, bytes);
  handle.peer = peer.value;
  handle.sends = true;
  return handle;
}

TransferHandle MeasuredTransport::receive(Rank peer, Tag tag, MutableBytes into) {
  ++activity_.post_count;
  TransferHandle handle = ForwardingTransport::receive(peer, tag, into);
  handle.peer = peer.value;
  return handle;
}

Result<uint64_t> MeasuredTransport::wait(TransferHandle handle, int64_t* completed_ns) {
  const int64_t begin = monotonic_ns();
  flight_.begin_wait(handle.peer, handle.sends, begin);
  int64_t completed = 0;
  Result<uint64_t> moved = ForwardingTransport::wait(handle, &completed);
  const int64_t end = monotonic_ns();
  flight_.end_wait(end);
  waited_ns_ += end - begin;
  if (activity_.wait_count++ == 0) activity_.wait_begin_ns = begin;
  activity_.wait_end_ns = end;
  activity_.completed_ns = std::max(activity_.completed_ns, completed);
  if (completed_ns != nullptr) *completed_ns = completed;
  return moved;
}

TransportActivity MeasuredTransport::take_activity() {
  return std::exchange(activity_, {});
}

}  // namespace penstock
