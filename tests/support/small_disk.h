// A file system that is soon full, for tests of what happens then.
#pragma once

#include "tests/support/private_mounts.h"

namespace penstock {

// A tmpfs of a given size, in a mount name space of this process, so that nothing outlives the
// test. Without root it is made in a user name space of its own.
class SmallDisk {
 public:
  SmallDisk(const Path& where, uint64_t bytes) : where_(where) {
    enter_private_mounts();
    std::filesystem::create_directories(where);
    const std::string options = fmt::format("size={}", bytes);
    PENSTOCK_CHECK(mount("tmpfs", where.c_str(), "tmpfs", 0, options.c_str()) == 0, errno);
  }
  ~SmallDisk() { umount2(where_.c_str(), MNT_DETACH); }

  // Takes all space that is left.
  void fill() const {
    const auto file = open_file(where_ / "filler", O_WRONLY | O_CREAT);
    PENSTOCK_CHECK(file.ok());
    const std::string block(4096, 'x');
    uint64_t offset = 0;
    while (write_at(file->get(), where_ / "filler", offset, as_bytes(block)).ok())
      offset += block.size();
  }
  void free() const { std::filesystem::remove(where_ / "filler"); }

 private:
  Path where_;
};

}  // namespace penstock
