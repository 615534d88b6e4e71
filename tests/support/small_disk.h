// A file system that is soon full, for tests of what happens then.
#pragma once

#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <unistd.h>

#include <string>

#include "comm/base/check.h"
#include "comm/base/file.h"

namespace penstock {

// A tmpfs of a given size, in a mount name space of this process, so that nothing outlives the
// test. Without root it is made in a user name space of its own.
class SmallDisk {
 public:
  SmallDisk(const Path& where, uint64_t bytes) : where_(where) {
    const uid_t user = geteuid();
    const gid_t group = getegid();
    const int flags = user == 0 ? CLONE_NEWNS : CLONE_NEWUSER | CLONE_NEWNS;
    PENSTOCK_CHECK(unshare(flags) == 0, errno);
    if (user != 0) {
      tell_kernel("/proc/self/setgroups", "deny");
      tell_kernel("/proc/self/uid_map", fmt::format("0 {} 1", user));
      tell_kernel("/proc/self/gid_map", fmt::format("0 {} 1", group));
    }
    PENSTOCK_CHECK(mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0, errno);
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
  static void tell_kernel(const Path& file, const std::string& text) {
    const auto opened = open_file(file, O_WRONLY);
    PENSTOCK_CHECK(opened.ok(), file.string());
    // These files take neither offsets nor a sync.
    PENSTOCK_CHECK(::write(opened->get(), text.data(), text.size()) == std::ssize(text), errno);
  }

  Path where_;
};

}  // namespace penstock
