#include "worker/data/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>

namespace penstock {

Result<MappedFile> MappedFile::open(const Path& path) {
  PENSTOCK_TRY_ASSIGN(const FileDescriptor file, open_file(path, O_RDONLY));
  struct stat info;
  if (::fstat(file.get(), &info) != 0) return errno_status(errno, "stat " + path.string());
  if (!S_ISREG(info.st_mode)) return invalid_argument(path.string() + " is not a regular file");
  MappedFile mapped;
  if (info.st_size == 0) return mapped;
  void* address = ::mmap(nullptr, info.st_size, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (address == MAP_FAILED) return errno_status(errno, "map " + path.string());
  mapped.bytes_ = {static_cast<const std::byte*>(address), static_cast<size_t>(info.st_size)};
  return mapped;
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

}  // namespace penstock
