// Every change a checkpoint store makes to a disk goes through this interface, so that a test can
// fail, tear or lose any one of them. Reads use comm/base/file.h directly.
#pragma once

#include <memory>

#include "comm/base/bytes.h"
#include "comm/base/file.h"
#include "comm/base/status.h"

namespace penstock {

// Writes of which address, offset and size are multiples of this can go straight to the disk.
inline constexpr uint64_t kDirectAlignment = 4096;
// Writes of one file that may be under way at a time.
inline constexpr size_t kStartedWritesMax = 8;

// A file being written, owned by one thread. Destroying it waits for started writes and closes it
// without a word: call close().
class WritableFile {
 public:
  virtual ~WritableFile() = default;
  // Allocates the disk space of the first `bytes` bytes, so that a full disk is known before the
  // first write. The file's length becomes `bytes`.
  virtual Status reserve(uint64_t bytes) = 0;
  // Returns when the bytes are taken. This and all below REQUIRE that every started write is
  // finished.
  virtual Status write_at(uint64_t offset, Bytes bytes) = 0;
  // Starts a write and may return before it ends: `bytes` are borrowed, and must not change, until
  // the finish_write() that is its own. Ranges of started writes do not overlap. Fast for large
  // ones aligned to kDirectAlignment. REQUIRES: fewer than kStartedWritesMax are unfinished.
  virtual Status start_write(uint64_t offset, Bytes bytes) { return write_at(offset, bytes); }
  // Waits for the oldest started write that is not finished, and tells how it ended. After an
  // error the file is to be given up.
  virtual Status finish_write() { return {}; }
  // fdatasync(2). An error is final: the kernel may have dropped the pages, a second call proves
  // nothing.
  virtual Status sync() = 0;
  virtual Status close() = 0;
};

class FileSystem {
 public:
  virtual ~FileSystem() = default;
  // O_CREAT | O_EXCL: kAlreadyExists when the name is taken.
  virtual Result<std::unique_ptr<WritableFile>> create(const Path& path) = 0;
  virtual Status rename_no_replace(const Path& from, const Path& to) = 0;
  virtual Status remove(const Path& path) = 0;
  virtual Status sync_directory(const Path& directory) = 0;
};

// The disk. Thread-safe.
FileSystem& real_file_system();

// kResourceExhausted when the disk of `folder` has less free, so that it is known before the first
// of many files.
Status check_room(const Path& folder, uint64_t bytes);

// Opens or creates a file and locks it until the descriptor is closed or the process ends.
// kFailedPrecondition when somebody else has it locked, in this process or another; `what_to_do`
// ends that sentence.
Result<FileDescriptor> take_lock(const Path& path, std::string_view what_to_do);

// create, write, sync, close. On an error the file is removed. Its name is durable only after
// sync_directory().
Status write_new_file(FileSystem& files, const Path& path, Bytes bytes);

}  // namespace penstock
