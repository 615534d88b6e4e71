// Writes that go on while their caller works, through the kernel's io_uring. liburing is confined
// to write_ring.cc.
#pragma once

#include <memory>

#include "comm/base/bytes.h"
#include "comm/base/status.h"

namespace penstock {

// Owned by one thread. Destroying it while writes are under way is a bug: their memory would be
// read on.
class WriteRing {
 public:
  struct Done {
    uint64_t tag = 0;    // as submitted
    int64_t result = 0;  // bytes written, or a negative errno
  };
  virtual ~WriteRing() = default;
  // Starts one; `bytes` are borrowed until wait() has returned its tag. An error: it was not
  // started.
  virtual Status submit(int fd, uint64_t offset, Bytes bytes, uint64_t tag) = 0;
  // Waits for one that was started and has not been returned yet; they end in any order.
  virtual Done wait() = 0;
};

// For up to `depth` writes at a time. kUnavailable where the kernel, its settings, a seccomp filter
// or the limit of locked memory refuses.
Result<std::unique_ptr<WriteRing>> make_write_ring(unsigned depth);

}  // namespace penstock
