// What ranks print, kept for reading back: <root>/<job>/rank-<rank>.epoch-<epoch>.log. A rank's log
// is the concatenation of its epochs' files. Loop thread only; not synced: logs may lose their
// newest lines in a power cut.
#pragma once

#include <map>
#include <string>
#include <utility>

#include "comm/base/file.h"
#include "comm/control/message.h"

namespace penstock {

inline constexpr uint64_t kLogFileBytesMax = 256 << 20;

struct LogText {
  std::string text;
  uint64_t next_offset =
      0;  // where the next read goes on; beyond the text where bytes were never received
};

class LogFiles {
 public:
  explicit LogFiles(Path root) : root_(std::move(root)) {}

  // Puts the chunk where its offset says; repeating one changes nothing. kAborted for an epoch
  // below the newest one seen of that rank (what readers were told must not move);
  // kResourceExhausted beyond kLogFileBytesMax.
  Status append(const LogChunk& chunk);
  // Up to `bytes_max` bytes of a rank's log from `offset`; empty at its end, or when there is none.
  Result<LogText> read(JobId job, Rank rank, uint64_t offset, uint64_t bytes_max) const;

 private:
  using RankLog = std::pair<JobId, Rank>;
  Path folder(JobId job) const;
  Path file(JobId job, Rank rank, Epoch epoch) const;
  // Epochs with a file, ascending, and their sizes.
  std::map<Epoch, uint64_t> sizes(JobId job, Rank rank) const;

  const Path root_;
  std::map<RankLog, Epoch> newest_;  // of this process's life
};

}  // namespace penstock
