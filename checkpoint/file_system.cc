#include "checkpoint/file_system.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <cerrno>

namespace penstock {

Status check_room(const Path& folder, uint64_t bytes) {
  std::error_code error;
  const std::filesystem::space_info space = std::filesystem::space(folder, error);
  if (error || space.available >= bytes) return {};  // reserving each file decides
  return resource_exhausted(
      fmt::format("{}: {} bytes are free, {} are needed", folder.string(), space.available, bytes));
}

Result<FileDescriptor> take_lock(const Path& path, std::string_view what_to_do) {
  PENSTOCK_TRY_ASSIGN(FileDescriptor lock, open_file(path, O_RDWR | O_CREAT));
  // An open-file-description lock: it belongs to this descriptor, goes with the process, and also
  // excludes others in the same process.
  struct flock range = {};
  range.l_type = F_WRLCK;
  range.l_whence = SEEK_SET;
  if (::fcntl(lock.get(), F_OFD_SETLK, &range) == 0) return lock;
  if (errno != EAGAIN && errno != EACCES) return errno_status(errno, "lock " + path.string());
  return failed_precondition(fmt::format("another writer holds {}{}", path.string(), what_to_do));
}

Status write_new_file(FileSystem& files, const Path& path, Bytes bytes) {
  PENSTOCK_TRY_ASSIGN(std::unique_ptr<WritableFile> file, files.create(path));
  const auto write = [&]() -> Status {
    PENSTOCK_TRY(file->reserve(bytes.size()));
    PENSTOCK_TRY(file->write_at(0, bytes));
    PENSTOCK_TRY(file->sync());
    return file->close();
  };
  const Status written = write();
  // The first error is the one to report; a file that cannot be removed is swept as an orphan
  // later.
  if (!written.ok() && !files.remove(path).ok()) {
    return written.with_context("incomplete file left behind");
  }
  return written;
}

}  // namespace penstock
