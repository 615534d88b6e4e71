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

// What this process's name space mounts from now on stays in it. kFailedPrecondition in a chroot
// whose / is no mount point: only a mount can be made private, and one made there without would be
// seen by everybody, and stay.
inline Status make_mounts_private() {
  if (mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0) return {};
  if (errno != EINVAL) return errno_status(errno, "make the mounts of this process private");
  return failed_precondition(
      "/ is no mount point, as in a plain chroot, so this process can mount nothing for itself; "
      "bind the chroot's folder onto itself before entering it: mount --bind DIR DIR; chroot DIR");
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
  const Status made_private = make_mounts_private();
  PENSTOCK_CHECK(made_private.ok(), made_private.message());
}

}  // namespace penstock
