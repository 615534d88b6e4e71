// A folder that a verb writes, and that exists under its name only when it is whole.
#pragma once

#include "comm/base/file.h"
#include "comm/base/status.h"

namespace penstock {

// Lies at "<name>.partial" until publish(); removed with everything in it when that is not called.
class PartialFolder {
 public:
  // kAlreadyExists when there is something of that name; kFailedPrecondition while another process
  // writes it. What one that died left behind is removed.
  static Result<PartialFolder> create(const Path& final_path);
  PartialFolder(PartialFolder&& other) noexcept;
  ~PartialFolder();

  const Path& path() const { return path_; }
  // The rename makes it exist. REQUIRES: the files in it are synced.
  Status publish();

 private:
  PartialFolder() = default;
  Path path_;  // empty: nothing to remove
  Path final_path_;
  FileDescriptor lock_;
};

}  // namespace penstock
