#include "coordinator/store/log_files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>

#include "comm/base/log.h"

namespace penstock {
namespace {

// A cut inside a UTF-8 character would spoil it for both readers: leave its first bytes for the
// next read.
void keep_whole_characters(std::string& text) {
  for (size_t back = 1; back <= std::min<size_t>(3, text.size()); ++back) {
    const auto byte = static_cast<unsigned char>(text[text.size() - back]);
    if (byte < 0x80) return;
    if (byte < 0xC0) continue;  // continuation
    const size_t length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : 2;
    if (back < length && back < text.size()) text.resize(text.size() - back);
    return;
  }
}

}  // namespace

Path LogFiles::folder(JobId job) const {
  return root_ / fmt::format("{}", job);
}

Path LogFiles::file(JobId job, Rank rank, Epoch epoch) const {
  return folder(job) / fmt::format("rank-{}.epoch-{}.log", rank, epoch);
}

Status LogFiles::append(const LogChunk& chunk) {
  const RankLog log = {chunk.job, chunk.rank};
  Epoch& newest = newest_[log];
  if (newest.value == 0) {
    const std::map<Epoch, uint64_t> known = sizes(chunk.job, chunk.rank);
    if (!known.empty()) newest = known.rbegin()->first;
  }
  if (chunk.epoch < newest) return aborted("late output of an earlier epoch");
  newest = chunk.epoch;
  if (chunk.offset > kLogOffsetMax || chunk.text.size() > kLogOffsetMax - chunk.offset) {
    return resource_exhausted(fmt::format("the log of rank {} of job {} has reached {} bytes",
                                          chunk.rank, chunk.job, kLogOffsetMax));
  }
  std::error_code error;
  std::filesystem::create_directories(folder(chunk.job), error);
  if (error) return errno_status(error.value(), "create " + folder(chunk.job).string());
  const Path path = file(chunk.job, chunk.rank, chunk.epoch);
  PENSTOCK_TRY_ASSIGN(const FileDescriptor fd, open_file(path, O_WRONLY | O_CREAT));
  PENSTOCK_TRY(write_at(fd.get(), path, chunk.offset, as_bytes(chunk.text)));
  keep_within_bounds(chunk.text.size());
  return {};
}

void LogFiles::keep_within_bounds(uint64_t bytes_written) {
  unchecked_bytes_ += bytes_written;
  if (unchecked_bytes_ < std::min(kLogBytesPerCheck, bounds_.file_bytes_max)) return;
  unchecked_bytes_ = 0;
  const Status bounded = bound_logs(root_, bounds_);
  if (!bounded.ok()) log_warning("logs stay over their bounds: {}", bounded.message());
}

void LogFiles::remove(JobId job) {
  std::error_code error;
  std::filesystem::remove_all(folder(job), error);
  if (error) log_warning("the logs of job {} stay: {}", job, error.message());
  std::erase_if(newest_, [job](const auto& entry) { return entry.first.first == job; });
}

std::map<Epoch, uint64_t> LogFiles::sizes(JobId job, Rank rank) const {
  std::map<Epoch, uint64_t> sizes;
  const std::string prefix = fmt::format("rank-{}.epoch-", rank);
  std::error_code error;
  for (std::filesystem::directory_iterator entry(folder(job), error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (!name.starts_with(prefix) || !name.ends_with(".log")) continue;
    Epoch epoch;
    std::from_chars(name.data() + prefix.size(), name.data() + name.size(), epoch.value);
    std::error_code size_error;
    const uint64_t size = entry->file_size(size_error);
    if (!size_error) sizes[epoch] = size;
  }
  return sizes;
}

Result<LogText> LogFiles::read(JobId job, Rank rank, uint64_t offset, uint64_t bytes_max) const {
  LogText log;
  log.next_offset = offset;
  uint64_t begin = 0;  // of the epoch's file in the whole log
  for (const auto& [epoch, size] : sizes(job, rank)) {
    const uint64_t end = begin + size;
    const uint64_t room = bytes_max - log.text.size();
    if (log.next_offset < end && room > 0) {
      const Path path = file(job, rank, epoch);
      PENSTOCK_TRY_ASSIGN(const FileDescriptor fd, open_file(path, O_RDONLY));
      // Over text that gave way, at once.
      const off_t data = ::lseek(fd.get(), static_cast<off_t>(log.next_offset - begin), SEEK_DATA);
      const uint64_t within = data < 0 ? size : std::min(static_cast<uint64_t>(data), size);
      log.next_offset = begin + within;
      std::string piece(std::min(size - within, room), '\0');
      PENSTOCK_TRY(read_at(fd.get(), path, within,
                           {reinterpret_cast<std::byte*>(piece.data()), piece.size()}));
      keep_whole_characters(piece);
      log.next_offset += piece.size();
      log.text += piece;
      if (log.next_offset < end) break;
    }
    begin = end;
  }
  // Bytes that never arrived read as zeros; they are skipped, and counted.
  std::erase(log.text, '\0');
  return log;
}

}  // namespace penstock
