#include "ops/cli/partial_folder.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>

#include <utility>

namespace penstock {

Result<PartialFolder> PartialFolder::create(const Path& final_path) {
  std::error_code error;
  if (std::filesystem::exists(std::filesystem::symlink_status(final_path, error))) {
    return already_exists(
        fmt::format("{} exists; name a folder that does not", final_path.string()));
  }
  PartialFolder folder;
  folder.final_path_ = final_path;
  const Path path = final_path.string() + ".partial";
  PENSTOCK_TRY(create_directories_durably(path));
  PENSTOCK_TRY_ASSIGN(folder.lock_, open_file(path, O_RDONLY | O_DIRECTORY));
  if (::flock(folder.lock_.get(), LOCK_EX | LOCK_NB) != 0) {
    return failed_precondition(fmt::format(
        "another export is writing {}; wait for it, or choose another folder", path.string()));
  }
  folder.path_ = path;  // ours from here on, with what an export that died left in it
  for (const auto& entry : std::filesystem::directory_iterator(path, error)) {
    std::filesystem::remove_all(entry.path(), error);
  }
  if (error) return errno_status(error.value(), "empty " + path.string());
  return folder;
}

PartialFolder::PartialFolder(PartialFolder&& other) noexcept
    : path_(std::exchange(other.path_, {})),
      final_path_(std::move(other.final_path_)),
      lock_(std::move(other.lock_)) {}

PartialFolder::~PartialFolder() {
  std::error_code error;  // what cannot be removed now, the next export removes
  if (!path_.empty()) std::filesystem::remove_all(path_, error);
}

Status PartialFolder::publish() {
  PENSTOCK_TRY(sync_directory(path_));
  PENSTOCK_TRY(rename_no_replace(path_, final_path_));
  path_.clear();
  return sync_directory(final_path_.parent_path());
}

}  // namespace penstock
