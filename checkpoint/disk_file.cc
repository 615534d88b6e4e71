#include "checkpoint/disk_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <deque>

namespace penstock {
namespace {

bool is_aligned(uint64_t offset, Bytes bytes) {
  const auto address = reinterpret_cast<uintptr_t>(bytes.data());
  return (address | offset | bytes.size()) % kDirectAlignment == 0;
}

class DiskFile : public WritableFile {
 public:
  DiskFile(Path path, FileDescriptor file, const DiskOptions& options)
      : path_(std::move(path)), file_(std::move(file)), options_(options) {}
  ~DiskFile() override {
    while (!started_.empty()) (void)finish_write();  // their memory is not ours
  }

  Status reserve(uint64_t bytes) override;
  Status write_at(uint64_t offset, Bytes bytes) override {
    PENSTOCK_CHECK(started_.empty(), path_.string());
    if (direct_ && !is_aligned(offset, bytes)) leave_direct();
    return penstock::write_at(file_.get(), path_, offset, bytes);
  }
  Status start_write(uint64_t offset, Bytes bytes) override;
  Status finish_write() override;
  Status sync() override {
    PENSTOCK_CHECK(started_.empty(), path_.string());
    if (::fdatasync(file_.get()) != 0) return errno_status(errno, "fdatasync " + path_.string());
    return {};
  }
  Status close() override {
    PENSTOCK_CHECK(started_.empty(), path_.string());
    return file_.close(path_);
  }

 private:
  struct Started {
    uint64_t offset = 0;
    Bytes bytes;
    bool done = false;
    Status status;  // when done
  };

  void begin_direct();
  void leave_direct();
  Status settle(uint64_t offset, Bytes bytes, int64_t result);

  const Path path_;
  FileDescriptor file_;
  const DiskOptions options_;  // a copy: a file may outlive its disk
  bool direct_tried_ = false;
  bool direct_ = false;  // the descriptor has O_DIRECT
  std::unique_ptr<DiskRing> ring_;
  std::deque<Started> started_;  // in the order they were started; tags count from first_tag_
  uint64_t first_tag_ = 0;
};

Status DiskFile::reserve(uint64_t bytes) {
  if (bytes == 0) return {};
  int result = 0;
  do {
    result = ::fallocate(file_.get(), 0, 0, static_cast<off_t>(bytes));
  } while (result != 0 && errno == EINTR);
  if (result == 0) return {};
  // Some network file systems cannot reserve: then the disk is found full by a write, a little
  // later.
  if (errno != EOPNOTSUPP && errno != ENOSYS) {
    return errno_status(errno == EFBIG ? ENOSPC : errno,
                        fmt::format("reserve {} bytes for {}", bytes, path_.string()));
  }
  if (::ftruncate(file_.get(), static_cast<off_t>(bytes)) != 0) {
    return errno_status(errno, "ftruncate " + path_.string());
  }
  return {};
}

void DiskFile::begin_direct() {
  direct_tried_ = true;
  if (!options_.direct) return;
  const int flags = ::fcntl(file_.get(), F_GETFL);
  direct_ = flags >= 0 && ::fcntl(file_.get(), F_SETFL, flags | O_DIRECT) == 0;
  if (!direct_) return;
  if (auto ring = options_.make_ring(kStartedWritesMax); ring.ok()) ring_ = *std::move(ring);
}

void DiskFile::leave_direct() {
  direct_ = false;
  const int flags = ::fcntl(file_.get(), F_GETFL);
  // Should this fail, the write that follows does, and says so.
  if (flags >= 0) ::fcntl(file_.get(), F_SETFL, flags & ~O_DIRECT);
}

// What came of a direct write. One that was not taken, or stopped short, goes on through the page
// cache, which takes every length and alignment, or says why not.
Status DiskFile::settle(uint64_t offset, Bytes bytes, int64_t result) {
  if (result == std::ssize(bytes)) return {};
  const bool not_taken =
      result == -EINVAL || result == -EOPNOTSUPP || result == -EINTR || result == -EAGAIN;
  if (result < 0 && !not_taken) {
    return errno_status(static_cast<int>(-result), "write " + path_.string());
  }
  leave_direct();
  const uint64_t written = result > 0 ? static_cast<uint64_t>(result) : 0;
  return penstock::write_at(file_.get(), path_, offset + written, bytes.subspan(written));
}

Status DiskFile::start_write(uint64_t offset, Bytes bytes) {
  PENSTOCK_CHECK(started_.size() < kStartedWritesMax, path_.string());
  if (!direct_tried_) begin_direct();
  Started write{offset, bytes, false, {}};
  const bool direct = direct_ && is_aligned(offset, bytes);
  if (direct && ring_ != nullptr) {
    const uint64_t tag = first_tag_ + started_.size();
    if (ring_->submit_write(file_.get(), offset, bytes, tag).ok()) {
      started_.push_back(std::move(write));
      return {};
    }
  }
  write.done = true;
  if (direct) {
    const ssize_t count =
        ::pwrite(file_.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset));
    write.status = settle(offset, bytes, count < 0 ? -errno : count);
  } else {
    if (direct_) leave_direct();
    write.status = penstock::write_at(file_.get(), path_, offset, bytes);
    // Starts the disk now instead of at the sync; only a hint.
    ::sync_file_range(file_.get(), static_cast<off_t>(offset), static_cast<off_t>(bytes.size()),
                      SYNC_FILE_RANGE_WRITE);
  }
  started_.push_back(std::move(write));
  return {};
}

Status DiskFile::finish_write() {
  PENSTOCK_CHECK(!started_.empty(), path_.string());
  while (!started_.front().done) {
    const DiskRing::Done done = ring_->wait();
    PENSTOCK_CHECK(done.tag - first_tag_ < started_.size(), done.tag, first_tag_);
    Started& write = started_[done.tag - first_tag_];
    write.status = settle(write.offset, write.bytes, done.result);
    write.done = true;
  }
  const Status status = std::move(started_.front().status);
  started_.pop_front();
  ++first_tag_;
  return status;
}

class Disk : public FileSystem {
 public:
  explicit Disk(DiskOptions options) : options_(std::move(options)) {}

  Result<std::unique_ptr<WritableFile>> create(const Path& path) override {
    PENSTOCK_TRY_ASSIGN(FileDescriptor file, open_file(path, O_WRONLY | O_CREAT | O_EXCL));
    return std::unique_ptr<WritableFile>(
        std::make_unique<DiskFile>(path, std::move(file), options_));
  }
  Status rename_no_replace(const Path& from, const Path& to) override {
    return penstock::rename_no_replace(from, to);
  }
  Status remove(const Path& path) override {
    if (::unlink(path.c_str()) != 0) return errno_status(errno, "unlink " + path.string());
    return {};
  }
  Status sync_directory(const Path& directory) override {
    return penstock::sync_directory(directory);
  }

 private:
  const DiskOptions options_;
};

}  // namespace

std::unique_ptr<FileSystem> make_disk(DiskOptions options) {
  return std::make_unique<Disk>(std::move(options));
}

FileSystem& real_file_system() {
  static Disk files((DiskOptions()));
  return files;
}

}  // namespace penstock
