#include "comm/control/background_appender.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <thread>

#include "comm/base/log.h"
#include "comm/base/log_folder.h"

namespace penstock {
namespace {

uint64_t count_lines(const std::string& text) {
  return static_cast<uint64_t>(std::count(text.begin(), text.end(), '\n'));
}

Result<FileDescriptor> open_to_append(const Path& file) {
  std::error_code error;
  std::filesystem::create_directories(file.parent_path(), error);
  if (error) {
    return internal_error(
        fmt::format("create {}: {}", file.parent_path().string(), error.message()));
  }
  return open_file(file, O_WRONLY | O_CREAT | O_APPEND);
}

bool was_removed(const FileDescriptor& file) {
  struct stat info = {};
  return ::fstat(file.get(), &info) == 0 && info.st_nlink == 0;
}

Status write_all(int fd, const Path& file, std::string_view text) {
  while (!text.empty()) {
    const ssize_t count = write(fd, text.data(), text.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno_status(errno, fmt::format("write {}", file.string()));
    text.remove_prefix(static_cast<size_t>(count));
  }
  return {};
}

}  // namespace

struct BackgroundAppender::Impl {
  struct Job {
    Path file;
    std::string text;
    bool close = false;
  };

  Impl(size_t bytes_max, std::function<void()> tidy)
      : queued_bytes_max(bytes_max), tidy_up(std::move(tidy)) {}

  void run() {
    while (true) {
      Job job;
      {
        std::unique_lock lock(mutex);
        ready.wait(lock, [this] { return ending || !queue.empty(); });
        if (queue.empty()) return;
        job = std::move(queue.front());
        queue.pop_front();
        queued_bytes -= job.text.size();
      }
      perform(job);
    }
  }

  // Worker thread only.
  void perform(const Job& job) {
    if (job.close) {
      files.erase(job.file);
      return;
    }
    if (tidy_up && untidied_bytes >= kLogBytesPerCheck) {
      untidied_bytes = 0;
      tidy_up();
    }
    untidied_bytes += job.text.size();
    auto file = files.find(job.file);
    if (file != files.end() && was_removed(file->second)) {
      files.erase(file);
      file = files.end();
    }
    Status status;
    if (file == files.end()) {
      Result<FileDescriptor> opened = open_to_append(job.file);
      status = opened.status();
      if (opened.ok()) file = files.emplace(job.file, std::move(opened).value()).first;
    }
    if (status.ok()) status = write_all(file->second.get(), job.file, job.text);
    if (!status.ok()) lose(job.text, status);
  }

  void lose(const std::string& text, const Status& status) {
    lines_lost += count_lines(text);
    // Once per trouble, not per line.
    if (!in_trouble.exchange(true)) log_error("log lines are lost: {}", status.to_string());
  }

  const size_t queued_bytes_max;
  const std::function<void()> tidy_up;
  std::mutex mutex;
  std::condition_variable ready;
  // Guarded by mutex.
  std::deque<Job> queue;
  size_t queued_bytes = 0;
  bool ending = false;
  // Worker thread only.
  std::map<Path, FileDescriptor> files;
  uint64_t untidied_bytes = kLogBytesPerCheck;
  // Any thread.
  std::atomic<uint64_t> lines_lost{0};
  std::atomic<bool> in_trouble{false};
  std::thread thread;
};

BackgroundAppender::BackgroundAppender(size_t queued_bytes_max, std::function<void()> tidy_up)
    : impl_(std::make_unique<Impl>(queued_bytes_max, std::move(tidy_up))) {
  impl_->thread = std::thread([impl = impl_.get()] { impl->run(); });
}

BackgroundAppender::~BackgroundAppender() {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->ending = true;
  }
  impl_->ready.notify_one();
  impl_->thread.join();
}

bool BackgroundAppender::append(const Path& file, std::string text) {
  {
    const std::lock_guard lock(impl_->mutex);
    if (impl_->queued_bytes + text.size() <= impl_->queued_bytes_max) {
      impl_->queued_bytes += text.size();
      impl_->queue.push_back({file, std::move(text), false});
      impl_->ready.notify_one();
      return true;
    }
  }
  impl_->lose(text, resource_exhausted("the disk does not keep up"));
  return false;
}

void BackgroundAppender::close(const Path& file) {
  const std::lock_guard lock(impl_->mutex);
  impl_->queue.push_back({file, "", true});
  impl_->ready.notify_one();
}

uint64_t BackgroundAppender::lines_lost() const {
  return impl_->lines_lost;
}

}  // namespace penstock
