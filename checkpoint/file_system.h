// Every change a checkpoint store makes to a disk goes through this interface, so that a test can
// fail, tear or lose any one of them. Reads use comm/base/file.h directly.
#pragma once

#include <memory>

#include "comm/base/bytes.h"
#include "comm/base/file.h"
#include "comm/base/status.h"

namespace penstock {

// A file being written, owned by one thread. Destroying it closes it without a word: call close().
class WritableFile {
 public:
  virtual ~WritableFile() = default;
  // Allocates the disk space of the first `bytes` bytes, so that a full disk is known before the
  // first write. The file's length becomes `bytes`.
  virtual Status reserve(uint64_t bytes) = 0;
  virtual Status write_at(uint64_t offset, Bytes bytes) = 0;
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

// create, write, sync, close. On an error the file is removed. Its name is durable only after
// sync_directory().
Status write_new_file(FileSystem& files, const Path& path, Bytes bytes);

}  // namespace penstock
