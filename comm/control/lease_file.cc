#include "comm/control/lease_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

namespace penstock {
namespace {

Result<int64_t*> map_word(const FileDescriptor& memory, int protection) {
  void* const mapping = mmap(nullptr, sizeof(int64_t), protection, MAP_SHARED, memory.get(), 0);
  if (mapping == MAP_FAILED) return errno_status(errno, "map a lease");
  return static_cast<int64_t*>(mapping);
}

}  // namespace

Result<LeaseFile> LeaseFile::create() {
  FileDescriptor memory(memfd_create("penstock-lease", MFD_CLOEXEC));
  if (!memory.valid()) return errno_status(errno, "memfd_create");
  if (ftruncate(memory.get(), sizeof(int64_t)) != 0) return errno_status(errno, "ftruncate");
  PENSTOCK_TRY_ASSIGN(int64_t * word, map_word(memory, PROT_READ | PROT_WRITE));
  LeaseFile lease(std::move(memory), word);
  lease.set(kEndless);
  return lease;
}

Result<LeaseFile> LeaseFile::open(const Path& path) {
  PENSTOCK_TRY_ASSIGN(FileDescriptor memory, open_file(path, O_RDONLY));
  struct stat found = {};
  if (fstat(memory.get(), &found) != 0) return errno_status(errno, path.string());
  if (found.st_size != sizeof(int64_t)) return data_loss(path.string() + " is no lease");
  PENSTOCK_TRY_ASSIGN(int64_t * word, map_word(memory, PROT_READ));
  return LeaseFile(std::move(memory), word);
}

LeaseFile::~LeaseFile() {
  if (word_ != nullptr) munmap(word_, sizeof(int64_t));
}

Path LeaseFile::path() const {
  return fmt::format("/proc/{}/fd/{}", getpid(), memory_.get());
}

int64_t LeaseFile::end_ns() const {
  return std::atomic_ref(*word_).load(std::memory_order_relaxed);
}

void LeaseFile::set(int64_t end_ns) {
  std::atomic_ref(*word_).store(end_ns, std::memory_order_relaxed);
}

void LeaseFile::extend_to(int64_t end_ns) {
  std::atomic_ref word(*word_);
  int64_t before = word.load(std::memory_order_relaxed);
  while ((before == kEndless || before < end_ns) && !word.compare_exchange_weak(before, end_ns)) {
  }
}

}  // namespace penstock
