#include "checkpoint/file_system.h"

namespace penstock {

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
