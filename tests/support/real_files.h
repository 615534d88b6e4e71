// The real disk, for tests that change a part of what it does.
#pragma once

#include "checkpoint/file_system.h"

namespace penstock {

class RealFiles : public FileSystem {
 public:
  Result<std::unique_ptr<WritableFile>> create(const Path& path) override {
    return real_file_system().create(path);
  }
  Status rename_no_replace(const Path& from, const Path& to) override {
    return real_file_system().rename_no_replace(from, to);
  }
  Status remove(const Path& path) override { return real_file_system().remove(path); }
  Status sync_directory(const Path& directory) override {
    return real_file_system().sync_directory(directory);
  }
};

}  // namespace penstock
