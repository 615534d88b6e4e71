#include "comm/base/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>

namespace penstock {

FileDescriptor::~FileDescriptor() {
  if (fd_ >= 0) ::close(fd_);
}

Status FileDescriptor::close(const Path& path) {
  if (fd_ < 0) return {};
  if (::close(std::exchange(fd_, -1)) != 0) return errno_status(errno, "close " + path.string());
  return {};
}

Result<FileDescriptor> open_file(const Path& path, int flags, unsigned mode) {
  const int fd = ::open(path.c_str(), flags | O_CLOEXEC, mode);
  if (fd < 0) return errno_status(errno, "open " + path.string());
  return FileDescriptor(fd);
}

namespace {

Result<std::string> read_all(const FileDescriptor& file, const Path& path, uint64_t bytes_max) {
  std::string content;
  char chunk[65536];
  while (true) {
    const ssize_t count = ::read(file.get(), chunk, sizeof(chunk));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno_status(errno, "read " + path.string());
    if (count == 0) return content;
    if (content.size() + count > bytes_max) {
      return resource_exhausted(
          fmt::format("{} is larger than the {} bytes allowed here", path.string(), bytes_max));
    }
    content.append(chunk, count);
  }
}

}  // namespace

Result<std::string> read_file(const Path& path, uint64_t bytes_max) {
  PENSTOCK_TRY_ASSIGN(const FileDescriptor file, open_file(path, O_RDONLY));
  return read_all(file, path, bytes_max);
}

Result<std::string> read_plain_file(const Path& path, uint64_t bytes_max) {
  uint64_t byte_count = 0;
  PENSTOCK_TRY_ASSIGN(const FileDescriptor file, open_plain_file(path, &byte_count));
  return read_all(file, path, bytes_max);
}

Result<FileDescriptor> open_plain_file(const Path& path, uint64_t* byte_count) {
  // O_NONBLOCK: opening a pipe would wait for its other end.
  Result<FileDescriptor> file = open_file(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
  if (std::error_code error; !file.ok() && std::filesystem::is_symlink(path, error)) {
    return data_loss(path.string() + " is a symbolic link; it must be a file");
  }
  if (!file.ok()) return file;
  struct stat info = {};
  if (::fstat(file->get(), &info) != 0) return errno_status(errno, "fstat " + path.string());
  if (!S_ISREG(info.st_mode)) return data_loss(path.string() + " is not a regular file");
  *byte_count = static_cast<uint64_t>(info.st_size);
  return file;
}

Result<std::vector<std::string>> file_names(const Path& directory) {
  std::vector<std::string> names;
  std::error_code error;
  std::filesystem::directory_iterator entry(directory, error);
  if (error == std::errc::no_such_file_or_directory) return names;
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    names.push_back(entry->path().filename().string());
  }
  if (error) return errno_status(error.value(), "list " + directory.string());
  std::sort(names.begin(), names.end());
  return names;
}

Status read_at(int fd, const Path& path, uint64_t offset, MutableBytes into) {
  while (!into.empty()) {
    const ssize_t count = ::pread(fd, into.data(), into.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno_status(errno, "read " + path.string());
    if (count == 0) {
      return data_loss(
          fmt::format("{} ends at byte {}, {} bytes early", path.string(), offset, into.size()));
    }
    offset += count;
    into = into.subspan(count);
  }
  return {};
}

Status write_at(int fd, const Path& path, uint64_t offset, Bytes bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno_status(errno, "write " + path.string());
    offset += count;
    bytes = bytes.subspan(count);
  }
  return {};
}

Status write_and_sync(const Path& path, Bytes bytes) {
  PENSTOCK_TRY_ASSIGN(FileDescriptor file, open_file(path, O_WRONLY | O_CREAT | O_TRUNC));
  PENSTOCK_TRY(write_at(file.get(), path, 0, bytes));
  if (::fdatasync(file.get()) != 0) return errno_status(errno, "fdatasync " + path.string());
  return file.close(path);
}

Status replace_file_durably(const Path& path, Bytes bytes) {
  const Path temporary = path.string() + ".tmp";
  PENSTOCK_TRY(write_and_sync(temporary, bytes));
  if (::rename(temporary.c_str(), path.c_str()) != 0) {
    return errno_status(errno, "rename " + temporary.string() + " to " + path.string());
  }
  return sync_directory(path.parent_path());
}

Status rename_no_replace(const Path& from, const Path& to) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) != 0) {
    return errno_status(errno, "rename " + from.string() + " to " + to.string());
  }
  return {};
}

Status sync_directory(const Path& directory) {
  const Path path = directory.empty() ? Path(".") : directory;
  PENSTOCK_TRY_ASSIGN(FileDescriptor file, open_file(path, O_RDONLY | O_DIRECTORY));
  if (::fsync(file.get()) != 0) return errno_status(errno, "fsync directory " + path.string());
  return file.close(path);
}

Path default_state_dir(const std::string& folder) {
  const char* const state = std::getenv("XDG_STATE_HOME");
  const char* const home = std::getenv("HOME");
  const bool is_set = state != nullptr && state[0] == '/';
  const Path root = is_set ? Path(state) : Path(home != nullptr ? home : ".") / ".local" / "state";
  return root / "penstock" / folder;
}

Status create_directories_durably(const Path& directory) {
  if (directory.empty()) return {};
  std::error_code error;
  if (!directory.has_filename() && directory.has_relative_path()) {  // "DIR/" is DIR
    return create_directories_durably(directory.parent_path());
  }
  if (std::filesystem::is_directory(directory, error)) {
    // Whoever made it may have been killed before its name was durable. Those above it were synced
    // before it was made. Where we may not write, we have made nothing.
    const Path parent = directory.parent_path();
    const bool ours = ::access(parent.empty() ? "." : parent.c_str(), R_OK | W_OK) == 0;
    return ours ? sync_directory(parent) : Status();
  }
  if (directory.has_parent_path() && directory.parent_path() != directory) {
    PENSTOCK_TRY(create_directories_durably(directory.parent_path()));
  }
  if (::mkdir(directory.c_str(), 0755) != 0 && errno != EEXIST) {
    return errno_status(errno, "mkdir " + directory.string());
  }
  return sync_directory(directory.parent_path());
}

}  // namespace penstock
