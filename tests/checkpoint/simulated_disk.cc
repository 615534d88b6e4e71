#include "tests/checkpoint/simulated_disk.h"

#include <fcntl.h>

#include <algorithm>
#include <deque>

#include "comm/base/check.h"

namespace penstock::checkpoint_test {

// The changes are made on the real disk at once; lose_power() takes them back.
class SimulatedFile : public WritableFile {
 public:
  SimulatedFile(SimulatedDisk& disk, Path path, std::unique_ptr<WritableFile> file)
      : disk_(disk), path_(std::move(path)), file_(std::move(file)) {}
  // Of writes under way when the process died, each reached the disk wholly, half or not at all.
  ~SimulatedFile() override {
    Random random(static_cast<uint64_t>(disk_.call_count()), started_.size());
    for (const auto& [offset, bytes] : started_) {
      (void)file_->write_at(offset, bytes.first(bytes.size() * random.below(3) / 2));
    }
  }

  Status reserve(uint64_t bytes) override {
    disk_.wait();
    const std::lock_guard lock(disk_.mutex_);
    PENSTOCK_TRY(disk_.next_call("reserve " + path_.string()));
    disk_.unsynced_files_.try_emplace(path_, 0);
    return file_->reserve(bytes);
  }
  Status write_at(uint64_t offset, Bytes bytes) override {
    disk_.wait();
    const std::lock_guard lock(disk_.mutex_);
    disk_.unsynced_files_[path_] = 0;
    const Status failed = disk_.next_call("write " + path_.string());
    // A write that is interrupted by the crash is torn.
    if (disk_.tears_writes() && bytes.size() > 1) {
      PENSTOCK_TRY(file_->write_at(offset, bytes.first(bytes.size() / 2)));
    }
    PENSTOCK_TRY(failed);
    return file_->write_at(offset, bytes);
  }
  Status start_write(uint64_t offset, Bytes bytes) override {
    disk_.wait();
    const std::lock_guard lock(disk_.mutex_);
    disk_.unsynced_files_[path_] = 0;
    PENSTOCK_TRY(disk_.next_call("start " + path_.string()));
    started_.emplace_back(offset, bytes);
    disk_.most_under_way_ = std::max(disk_.most_under_way_, started_.size());
    return {};
  }
  Status finish_write() override {
    PENSTOCK_CHECK(!started_.empty(), path_.string());
    const auto [offset, bytes] = started_.front();
    PENSTOCK_TRY(write_at(offset, bytes));
    started_.pop_front();
    return {};
  }
  Status sync() override {
    disk_.wait();
    const std::lock_guard lock(disk_.mutex_);
    PENSTOCK_TRY(disk_.next_call("fdatasync " + path_.string()));
    if (disk_.file_syncs_work_) disk_.unsynced_files_.erase(path_);
    return {};
  }
  Status close() override {
    disk_.wait();
    const std::lock_guard lock(disk_.mutex_);
    PENSTOCK_TRY(disk_.next_call("close " + path_.string()));
    return file_->close();
  }

 private:
  SimulatedDisk& disk_;
  const Path path_;
  std::unique_ptr<WritableFile> file_;
  std::deque<std::pair<uint64_t, Bytes>> started_;  // offset and bytes, oldest first
};

void SimulatedDisk::wait() const {
  if (wait_) wait_();
}

Status SimulatedDisk::next_call(const std::string& what) {
  if (crashed()) return unavailable("the process is gone: " + what);
  calls_.push_back(what);
  if (crashed()) return unavailable("the process is gone: " + what);
  if (call_count() == failing_call_) return {failing_code_, "injected: " + what};
  return {};
}

void SimulatedDisk::move_unsynced(const Path& from, const Path& to) {
  const auto unsynced = unsynced_files_.find(from);
  if (unsynced == unsynced_files_.end()) return;
  unsynced_files_[to] = unsynced->second;
  unsynced_files_.erase(from);
}

Status SimulatedDisk::bury(const Path& path) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return not_found(path.string());
  PENSTOCK_TRY(real_file_system().rename_no_replace(path, next_grave()));
  move_unsynced(path, next_grave());
  return {};
}

void SimulatedDisk::forget_unsynced_names(const Path& directory) {
  if (!directory_syncs_work_) return;
  std::erase_if(unsynced_names_,
                [&](const NameChange& c) { return c.path.parent_path() == directory; });
}

Result<std::unique_ptr<WritableFile>> SimulatedDisk::create(const Path& path) {
  wait();
  const std::lock_guard lock(mutex_);
  PENSTOCK_TRY(next_call("create " + path.string()));
  PENSTOCK_TRY_ASSIGN(std::unique_ptr<WritableFile> file, real_file_system().create(path));
  unsynced_names_.push_back({Kind::kCreate, path, {}, {}});
  return std::unique_ptr<WritableFile>(
      std::make_unique<SimulatedFile>(*this, path, std::move(file)));
}

Status SimulatedDisk::rename_no_replace(const Path& from, const Path& to) {
  wait();
  const std::lock_guard lock(mutex_);
  PENSTOCK_TRY(next_call("rename " + from.string()));
  PENSTOCK_TRY(real_file_system().rename_no_replace(from, to));
  unsynced_names_.push_back({Kind::kRename, from, to, {}});
  move_unsynced(from, to);
  return {};
}

Status SimulatedDisk::remove(const Path& path) {
  wait();
  return rocksdb_remove(path);
}

Status SimulatedDisk::sync_directory(const Path& directory) {
  wait();
  return rocksdb_sync_directory(directory);
}

Status SimulatedDisk::rocksdb_create(const Path& path) {
  const std::lock_guard lock(mutex_);
  PENSTOCK_TRY(next_call("create " + path.string()));
  std::error_code error;
  if (!std::filesystem::exists(path, error)) {
    unsynced_names_.push_back({Kind::kCreate, path, {}, {}});
  }
  unsynced_files_[path] = 0;
  return {};
}

Status SimulatedDisk::rocksdb_write(const Path& path, uint64_t offset) {
  const std::lock_guard lock(mutex_);
  const auto [unsynced, added] = unsynced_files_.try_emplace(path, offset);
  unsynced->second = std::min(unsynced->second, offset);
  return next_call("write " + path.string());
}

Status SimulatedDisk::rocksdb_sync(const Path& path, uint64_t size) {
  const std::lock_guard lock(mutex_);
  PENSTOCK_TRY(next_call("fdatasync " + path.string()));
  if (!file_syncs_work_) return {};
  unsynced_files_[path] = size;
  return {};
}

Status SimulatedDisk::rocksdb_rename(const Path& from, const Path& to) {
  const std::lock_guard lock(mutex_);
  PENSTOCK_TRY(next_call("rename " + from.string()));
  NameChange change{Kind::kRename, from, to, {}};
  if (bury(to).ok()) change.replaced = next_grave();
  PENSTOCK_TRY(real_file_system().rename_no_replace(from, to));
  unsynced_names_.push_back(std::move(change));
  move_unsynced(from, to);
  return {};
}

Status SimulatedDisk::rocksdb_remove(const Path& path) {
  const std::lock_guard lock(mutex_);
  PENSTOCK_TRY(next_call("unlink " + path.string()));
  PENSTOCK_TRY(bury(path));
  unsynced_names_.push_back({Kind::kRemove, path, next_grave(), {}});
  return {};
}

Status SimulatedDisk::rocksdb_create_directory(const Path& path) {
  const std::lock_guard lock(mutex_);
  PENSTOCK_TRY(next_call("mkdir " + path.string()));
  std::error_code error;
  if (!std::filesystem::exists(path, error)) {
    unsynced_names_.push_back({Kind::kCreate, path, {}, {}});
  }
  return {};
}

Status SimulatedDisk::rocksdb_sync_directory(const Path& directory) {
  const std::lock_guard lock(mutex_);
  PENSTOCK_TRY(next_call("fsync " + directory.string()));
  forget_unsynced_names(directory);
  return {};
}

void SimulatedDisk::damage(const Path& path, uint64_t synced_bytes, Random& random) {
  const auto file = open_file(path, O_RDWR);
  if (!file.ok()) return;  // its name was lost as well
  const uint64_t size = std::filesystem::file_size(path);
  constexpr uint64_t kPage = 4096;
  const std::vector<std::byte> zeros(kPage);
  for (uint64_t page = synced_bytes / kPage * kPage; page < size; page += kPage) {
    if (random.below(2) == 0) continue;
    const uint64_t begin = std::max(page, synced_bytes);
    const uint64_t end = std::min(page + kPage, size);
    if (begin >= end) continue;
    PENSTOCK_CHECK(write_at(file->get(), path, begin, Bytes(zeros).first(end - begin)).ok());
  }
  if (size > synced_bytes && random.below(2) == 0) {
    std::filesystem::resize_file(path, synced_bytes + random.below(size - synced_bytes + 1));
  }
}

void SimulatedDisk::lose_power(uint64_t seed) {
  const std::lock_guard lock(mutex_);
  Random random(seed, 0);
  for (const auto& [path, synced_bytes] : unsynced_files_) damage(path, synced_bytes, random);
  for (auto change = unsynced_names_.rbegin(); change != unsynced_names_.rend(); ++change) {
    if (random.below(2) == 0) continue;  // this one reached the disk
    std::error_code error;
    switch (change->kind) {
      case Kind::kCreate:
        std::filesystem::remove_all(change->path, error);
        break;
      case Kind::kRename:
        std::filesystem::rename(change->other, change->path, error);
        if (!change->replaced.empty()) {
          std::filesystem::rename(change->replaced, change->other, error);
        }
        break;
      case Kind::kRemove:
        std::filesystem::rename(change->other, change->path, error);
        break;
    }
  }
}

}  // namespace penstock::checkpoint_test
