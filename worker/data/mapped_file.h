// A whole file, mapped read-only.
#pragma once

#include "comm/base/bytes.h"
#include "comm/base/file.h"

namespace penstock {

// Thread-safe: constant after construction. Move-only; unmaps in its destructor. The file must not
// shrink while it is mapped: touching a page that is gone is a SIGBUS.
class MappedFile {
 public:
  static Result<MappedFile> open(const Path& path);
  MappedFile() = default;
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  Bytes bytes() const { return bytes_; }

 private:
  Bytes bytes_;  // empty for an empty file
};

}  // namespace penstock
