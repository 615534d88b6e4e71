#include "worker/engine/measured_transport.h"

#include "comm/base/clock.h"

namespace penstock {

Result<uint64_t> MeasuredTransport::wait(TransferHandle handle) {
  const int64_t begin = monotonic_ns();
  Result<uint64_t> moved = inner_.wait(handle);
  waited_ns_ += monotonic_ns() - begin;
  return moved;
}

}  // namespace penstock
