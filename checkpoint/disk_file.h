// Files on the real disk: large writes past the page cache (O_DIRECT), several at once (io_uring),
// and as plain writes wherever one of the two is refused. What ends up on the disk is the same.
#pragma once

#include <functional>
#include <memory>

#include "checkpoint/file_system.h"
#include "checkpoint/write_ring.h"

namespace penstock {

struct DiskOptions {
  bool direct = true;  // false: as on a file system without O_DIRECT
  std::function<Result<std::unique_ptr<WriteRing>>()> make_ring = [] {
    return make_write_ring(kStartedWritesMax);
  };
};

// Thread-safe. real_file_system() is one with the options above.
std::unique_ptr<FileSystem> make_disk(DiskOptions options);

}  // namespace penstock
