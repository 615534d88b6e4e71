// Reads and writes that go on while their caller works, through the kernel's io_uring. liburing is
// confined to disk_ring.cc.
#pragma once

#include <functional>
#include <memory>

#include "comm/base/bytes.h"
#include "comm/base/status.h"

namespace penstock {

// Owned by one thread. Destroying it while anything is under way is a bug: memory that is not its
// own would be used on.
class DiskRing {
 public:
  struct Done {
    uint64_t tag = 0;    // as submitted
    int64_t result = 0;  // bytes written or read, or a negative errno
  };
  virtual ~DiskRing() = default;
  // Start one; the memory is borrowed until wait() has returned its tag. An error: it was not
  // started.
  virtual Status submit_write(int fd, uint64_t offset, Bytes bytes, uint64_t tag) = 0;
  virtual Status submit_read(int fd, uint64_t offset, MutableBytes into, uint64_t tag) = 0;
  // Waits for one that was started and has not been returned yet; they end in any order.
  virtual Done wait() = 0;
};

// For up to `depth` at a time. kUnavailable where the kernel, its settings, a seccomp filter or the
// limit of locked memory refuses.
Result<std::unique_ptr<DiskRing>> make_disk_ring(unsigned depth);

// How checkpoints use the disk.
struct DiskOptions {
  bool direct = true;  // false: as on a file system without O_DIRECT
  std::function<Result<std::unique_ptr<DiskRing>>(unsigned depth)> make_ring = make_disk_ring;
};

}  // namespace penstock
