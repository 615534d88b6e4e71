// Appends text to files from a thread of its own, so that a slow or full disk never holds up an
// event loop.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "comm/base/file.h"

namespace penstock {

// Any thread may call any function. Text for one file is written in the order of the calls.
class BackgroundAppender {
 public:
  // `queued_bytes_max`: text waiting for the disk, over all files. Beyond it append() drops.
  // `tidy_up` runs on the appender's thread, before the first write and after each
  // kLogBytesPerCheck; it may remove files that are being written. May be empty.
  explicit BackgroundAppender(size_t queued_bytes_max, std::function<void()> tidy_up = {});
  // Writes what is queued, then ends.
  ~BackgroundAppender();
  BackgroundAppender(const BackgroundAppender&) = delete;
  BackgroundAppender& operator=(const BackgroundAppender&) = delete;

  // Queues `text` for the end of `file`, which is made, with its folders, when it does not exist.
  // Returns at once. False: dropped, because the queue is full.
  bool append(const Path& file, std::string text);
  // No more text is coming for `file`: closes it behind what is queued. append() would open it
  // again.
  void close(const Path& file);

  // Lines that were dropped or could not be written. Only grows.
  uint64_t lines_lost() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace penstock
