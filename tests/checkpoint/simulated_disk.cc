#include "tests/checkpoint/simulated_disk.h"

#include <fcntl.h>

#include <algorithm>

namespace penstock::checkpoint_test {

class SimulatedFile : public WritableFile {
 public:
  SimulatedFile(SimulatedDisk& disk, Path path, std::unique_ptr<WritableFile> file)
      : disk_(disk), path_(std::move(path)), file_(std::move(file)) {}

  Status reserve(uint64_t bytes) override {
    PENSTOCK_TRY(disk_.next_call("reserve " + path_.string()));
    disk_.unsynced_files_.insert(path_);
    return file_->reserve(bytes);
  }
  Status write_at(uint64_t offset, Bytes bytes) override {
    disk_.unsynced_files_.insert(path_);
    const Status failed = disk_.next_call("write " + path_.string());
    // A write that is interrupted by the crash is torn.
    if (disk_.crashed() && bytes.size() > 1) {
      PENSTOCK_TRY(file_->write_at(offset, bytes.first(bytes.size() / 2)));
    }
    PENSTOCK_TRY(failed);
    return file_->write_at(offset, bytes);
  }
  Status sync() override {
    PENSTOCK_TRY(disk_.next_call("fdatasync " + path_.string()));
    if (disk_.file_syncs_work_) disk_.unsynced_files_.erase(path_);
    return {};
  }
  Status close() override {
    PENSTOCK_TRY(disk_.next_call("close " + path_.string()));
    return file_->close();
  }

 private:
  SimulatedDisk& disk_;
  const Path path_;
  std::unique_ptr<WritableFile> file_;
};

Status SimulatedDisk::next_call(const std::string& what) {
  if (crashed()) return unavailable("the process is gone: " + what);
  ++call_count_;
  if (crashed()) return unavailable("the process is gone: " + what);
  if (call_count_ == failing_call_) return {failing_code_, "injected: " + what};
  return {};
}

Result<std::unique_ptr<WritableFile>> SimulatedDisk::create(const Path& path) {
  PENSTOCK_TRY(next_call("create " + path.string()));
  PENSTOCK_TRY_ASSIGN(std::unique_ptr<WritableFile> file, real_file_system().create(path));
  unsynced_names_.push_back({Kind::kCreate, path, {}});
  return std::unique_ptr<WritableFile>(
      std::make_unique<SimulatedFile>(*this, path, std::move(file)));
}

Status SimulatedDisk::rename_no_replace(const Path& from, const Path& to) {
  PENSTOCK_TRY(next_call("rename " + from.string()));
  PENSTOCK_TRY(real_file_system().rename_no_replace(from, to));
  unsynced_names_.push_back({Kind::kRename, from, to});
  if (unsynced_files_.erase(from) > 0) unsynced_files_.insert(to);
  return {};
}

Status SimulatedDisk::remove(const Path& path) {
  PENSTOCK_TRY(next_call("unlink " + path.string()));
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return not_found(path.string());
  const Path grave = graveyard_ / std::to_string(call_count_);
  PENSTOCK_TRY(real_file_system().rename_no_replace(path, grave));
  unsynced_names_.push_back({Kind::kRemove, path, grave});
  return {};
}

Status SimulatedDisk::sync_directory(const Path& directory) {
  PENSTOCK_TRY(next_call("fsync " + directory.string()));
  if (!directory_syncs_work_) return {};
  std::erase_if(unsynced_names_,
                [&](const NameChange& c) { return c.path.parent_path() == directory; });
  return {};
}

void SimulatedDisk::damage(const Path& path, Random& random) const {
  const auto file = open_file(path, O_RDWR);
  if (!file.ok()) return;  // its name was lost as well
  const uint64_t size = std::filesystem::file_size(path);
  const std::vector<std::byte> zeros(4096);
  for (uint64_t page = 0; page < size; page += zeros.size()) {
    if (random.below(2) == 0) continue;
    const uint64_t count = std::min<uint64_t>(zeros.size(), size - page);
    PENSTOCK_CHECK(write_at(file->get(), path, page, Bytes(zeros).first(count)).ok());
  }
  if (random.below(2) == 0) std::filesystem::resize_file(path, random.below(size + 1));
}

void SimulatedDisk::lose_power(uint64_t seed) {
  Random random(seed, 0);
  for (const Path& path : unsynced_files_) damage(path, random);
  for (auto change = unsynced_names_.rbegin(); change != unsynced_names_.rend(); ++change) {
    if (random.below(2) == 0) continue;  // this one reached the disk
    std::error_code error;
    switch (change->kind) {
      case Kind::kCreate:
        std::filesystem::remove(change->path, error);
        break;
      case Kind::kRename:
        std::filesystem::rename(change->other, change->path, error);
        break;
      case Kind::kRemove:
        std::filesystem::rename(change->other, change->path, error);
        break;
    }
  }
}

}  // namespace penstock::checkpoint_test
