// Files: reading whole bounded ones, and the durable write, rename and directory-sync steps that
// every commit point is made of. Errors carry the path. No function here retries a failed fsync:
// the kernel may have dropped the pages, so the only cure is a new file.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "comm/base/bytes.h"
#include "comm/base/status.h"

namespace penstock {

using Path = std::filesystem::path;

// Owns one descriptor; closes it. Move-only.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor();
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  int release() { return std::exchange(fd_, -1); }
  // Closes now and reports what close() said; later calls do nothing.
  Status close(const Path& path);

 private:
  int fd_ = -1;
};

// open(2) with O_CLOEXEC.
Result<FileDescriptor> open_file(const Path& path, int flags, unsigned mode = 0644);

// The whole file. kResourceExhausted when it is larger than bytes_max.
Result<std::string> read_file(const Path& path, uint64_t bytes_max);

// The same for files that others may have put there: a symbolic link, a directory, a pipe or a
// device is kDataLoss, and never followed, waited for or read.
Result<std::string> read_plain_file(const Path& path, uint64_t bytes_max);
// Opens such a file for reading; its size goes to *byte_count.
Result<FileDescriptor> open_plain_file(const Path& path, uint64_t* byte_count);
// Names of all entries of a directory, sorted; none when it does not exist. Any other failure is an
// error: a list that is not whole must not be taken for one.
Result<std::vector<std::string>> file_names(const Path& directory);

// Exactly `into.size()` bytes at `offset`; kDataLoss when the file ends before.
Status read_at(int fd, const Path& path, uint64_t offset, MutableBytes into);
// All of `bytes` at `offset`, however many calls that takes.
Status write_at(int fd, const Path& path, uint64_t offset, Bytes bytes);

// Creates or replaces `path` with `bytes`, data synced. The name is durable only after
// sync_directory().
Status write_and_sync(const Path& path, Bytes bytes);
// write_and_sync to `path`.tmp, rename over `path`, sync the directory: readers see old or new,
// whole.
Status replace_file_durably(const Path& path, Bytes bytes);
// Renames; fails with kAlreadyExists when `to` exists.
Status rename_no_replace(const Path& from, const Path& to);
Status sync_directory(const Path& directory);
// mkdir -p; the name of every directory it made is durable, as is that of one it found.
Status create_directories_durably(const Path& directory);

// Where a program keeps its state when it is not told: $XDG_STATE_HOME/penstock/<folder>, else
// ~/.local/state/penstock/<folder>.
Path default_state_dir(const std::string& folder);

}  // namespace penstock
