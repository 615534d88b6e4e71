#include "worker/engine/measured_transport.h"

#include <algorithm>
#include <utility>

#include "comm/base/clock.h"

namespace penstock {

TransferHandle MeasuredTransport::send(Rank peer, Tag tag, Bytes bytes) {
  ++activity_.post_count;
  activity_.sent_bytes += static_cast<int64_t>(bytes.size());
  return inner_.send(peer, tag, bytes);
}

TransferHandle MeasuredTransport::receive(Rank peer, Tag tag, MutableBytes into) {
  ++activity_.post_count;
  return inner_.receive(peer, tag, into);
}

Result<uint64_t> MeasuredTransport::wait(TransferHandle handle, int64_t* completed_ns) {
  const int64_t begin = monotonic_ns();
  int64_t completed = 0;
  Result<uint64_t> moved = inner_.wait(handle, &completed);
  const int64_t end = monotonic_ns();
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
