// Files on the real disk: large writes past the page cache (O_DIRECT), several at once (io_uring),
// and as plain writes wherever one of the two is refused. What ends up on the disk is the same.
#pragma once

#include <memory>

#include "checkpoint/disk_ring.h"
#include "checkpoint/file_system.h"

namespace penstock {

// Thread-safe. real_file_system() is one with the options above.
std::unique_ptr<FileSystem> make_disk(DiskOptions options);

}  // namespace penstock
