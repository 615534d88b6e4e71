#include "checkpoint/file_system.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

namespace penstock {
namespace {

class RealFile : public WritableFile {
 public:
  RealFile(Path path, FileDescriptor file) : path_(std::move(path)), file_(std::move(file)) {}

  Status reserve(uint64_t bytes) override {
    if (bytes == 0) return {};
    int result = 0;
    do {
      result = ::fallocate(file_.get(), 0, 0, static_cast<off_t>(bytes));
    } while (result != 0 && errno == EINTR);
    if (result == 0) return {};
    // Some network file systems cannot reserve: then the disk is found full by a write, a little
    // later.
    if (errno != EOPNOTSUPP && errno != ENOSYS) {
      return errno_status(errno == EFBIG ? ENOSPC : errno,
                          fmt::format("reserve {} bytes for {}", bytes, path_.string()));
    }
    if (::ftruncate(file_.get(), static_cast<off_t>(bytes)) != 0) {
      return errno_status(errno, "ftruncate " + path_.string());
    }
    return {};
  }
  Status write_at(uint64_t offset, Bytes bytes) override {
    return penstock::write_at(file_.get(), path_, offset, bytes);
  }
  Status sync() override {
    if (::fdatasync(file_.get()) != 0) return errno_status(errno, "fdatasync " + path_.string());
    return {};
  }
  Status close() override { return file_.close(path_); }

 private:
  Path path_;
  FileDescriptor file_;
};

class RealFileSystem : public FileSystem {
 public:
  Result<std::unique_ptr<WritableFile>> create(const Path& path) override {
    PENSTOCK_TRY_ASSIGN(FileDescriptor file, open_file(path, O_WRONLY | O_CREAT | O_EXCL));
    return std::unique_ptr<WritableFile>(std::make_unique<RealFile>(path, std::move(file)));
  }
  Status rename_no_replace(const Path& from, const Path& to) override {
    return penstock::rename_no_replace(from, to);
  }
  Status remove(const Path& path) override {
    if (::unlink(path.c_str()) != 0) return errno_status(errno, "unlink " + path.string());
    return {};
  }
  Status sync_directory(const Path& directory) override {
    return penstock::sync_directory(directory);
  }
};

}  // namespace

FileSystem& real_file_system() {
  static RealFileSystem files;
  return files;
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
