// A mount name space of this process's own, so that what a test mounts does not outlive it.
#pragma once

#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <unistd.h>

#include <string>

#include "comm/base/check.h"
#include "comm/base/file.h"

namespace penstock {

inline void tell_kernel(const Path& file, const std::string& text) {
  const auto opened = open_file(file, O_WRONLY);
  PENSTOCK_CHECK(opened.ok(), file.string());
  // These files take neither offsets nor a sync.
  PENSTOCK_CHECK(::write(opened->get(), text.data(), text.size()) == std::ssize(text), errno);
}

// Without root it is in a user name space of its own. REQUIRES: the process has one thread.
inline void enter_private_mounts() {
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
}

}  // namespace penstock
