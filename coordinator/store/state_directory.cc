#include "coordinator/store/state_directory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <array>
#include <cerrno>

namespace penstock {

// Its holder writes into the file who it is, for the next one to name.
Result<FileDescriptor> lock_state_directory(const Path& directory) {
  constexpr uint64_t kHolderBytesMax = 256;
  PENSTOCK_TRY(create_directories_durably(directory));
  const Path path = directory / "LOCK";
  PENSTOCK_TRY_ASSIGN(FileDescriptor fd, open_file(path, O_RDWR | O_CREAT));
  if (flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) return errno_status(errno, "lock " + path.string());
    const Result<std::string> holder = read_file(path, kHolderBytesMax);
    return already_exists(fmt::format(
        "state directory {} is in use by another coordinator{}; stop it or choose another "
        "directory",
        directory.string(), holder.ok() ? ", " + holder->substr(0, holder->find('\n')) : ""));
  }
  std::array<char, 64> host = {};
  if (gethostname(host.data(), host.size() - 1) != 0) host[0] = '\0';
  const std::string self = fmt::format("process {} on {}\n", getpid(), host.data());
  if (ftruncate(fd.get(), 0) != 0) return errno_status(errno, "truncate " + path.string());
  PENSTOCK_TRY(write_at(fd.get(), path, 0, as_bytes(self)));
  return fd;
}

}  // namespace penstock
