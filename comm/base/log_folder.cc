#include "comm/base/log_folder.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace penstock {
namespace {

constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kStatBlockBytes = 512;  // the unit of st_blocks, whatever the file system's is

struct Log {
  Path path;
  uint64_t bytes = 0;  // on the disk
};

struct JobFolder {
  Path path;
  std::vector<Log> logs;
  uint64_t bytes = 0;
  int64_t written_ns = 0;  // newest of its logs
};

Result<uint64_t> bytes_on_disk(int fd, const Path& path) {
  struct stat info = {};
  if (::fstat(fd, &info) != 0) return errno_status(errno, "fstat " + path.string());
  return static_cast<uint64_t>(info.st_blocks) * kStatBlockBytes;
}

Result<JobFolder> look_at(const Path& path) {
  JobFolder folder;
  folder.path = path;
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(path));
  for (const std::string& name : names) {
    struct stat info = {};
    const Path log = path / name;
    if (::lstat(log.c_str(), &info) != 0 || !S_ISREG(info.st_mode)) continue;
    folder.logs.push_back({log, static_cast<uint64_t>(info.st_blocks) * kStatBlockBytes});
    folder.bytes += folder.logs.back().bytes;
    const int64_t written_ns = info.st_mtim.tv_sec * int64_t{1'000'000'000} + info.st_mtim.tv_nsec;
    folder.written_ns = std::max(folder.written_ns, written_ns);
  }
  return folder;
}

// Turns the older half of a log's text into a hole; all of it where the file system has no holes to
// punch.
Status drop_older_half(JobFolder& folder, Log& log) {
  PENSTOCK_TRY_ASSIGN(const FileDescriptor fd, open_file(log.path, O_WRONLY | O_NOFOLLOW));
  const off_t begin = ::lseek(fd.get(), 0, SEEK_DATA);
  const off_t end = ::lseek(fd.get(), 0, SEEK_END);
  if (begin < 0 || end <= begin) return {};
  const auto half = static_cast<off_t>((begin + (end - begin) / 2) / kPageBytes * kPageBytes);
  if (half > begin) {
    const int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    const bool punched = ::fallocate(fd.get(), mode, begin, half - begin) == 0;
    if (!punched && (::ftruncate(fd.get(), 0) != 0 || ::ftruncate(fd.get(), end) != 0)) {
      return errno_status(errno, "shorten " + log.path.string());
    }
  }
  PENSTOCK_TRY_ASSIGN(const uint64_t left, bytes_on_disk(fd.get(), log.path));
  folder.bytes -= std::min(folder.bytes, log.bytes - std::min(log.bytes, left));
  log.bytes = left;
  return {};
}

Status bound_job(JobFolder& folder, const LogBounds& bounds) {
  for (Log& log : folder.logs) {
    if (log.bytes > bounds.file_bytes_max) PENSTOCK_TRY(drop_older_half(folder, log));
  }
  while (folder.bytes > bounds.job_bytes_max) {
    const auto longest =
        std::max_element(folder.logs.begin(), folder.logs.end(),
                         [](const Log& a, const Log& b) { return a.bytes < b.bytes; });
    const uint64_t before = longest->bytes;
    PENSTOCK_TRY(drop_older_half(folder, *longest));
    if (longest->bytes >= before) return {};  // nothing but a page each is left
  }
  return {};
}

}  // namespace

Status bound_logs(const Path& root, const LogBounds& bounds) {
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(root));
  std::vector<JobFolder> folders;
  uint64_t total = 0;
  for (const std::string& name : names) {
    std::error_code error;
    if (!std::filesystem::is_directory(root / name, error)) continue;
    PENSTOCK_TRY_ASSIGN(JobFolder folder, look_at(root / name));
    PENSTOCK_TRY(bound_job(folder, bounds));
    total += folder.bytes;
    folders.push_back(std::move(folder));
  }
  std::sort(folders.begin(), folders.end(),
            [](const auto& a, const auto& b) { return a.written_ns < b.written_ns; });
  for (size_t i = 0; i + 1 < folders.size() && total > bounds.total_bytes_max; ++i) {
    std::error_code error;
    std::filesystem::remove_all(folders[i].path, error);
    if (error) return errno_status(error.value(), "remove " + folders[i].path.string());
    total -= folders[i].bytes;
  }
  return {};
}

}  // namespace penstock
