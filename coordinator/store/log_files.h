// What ranks print, kept for reading back: <root>/<job>/rank-<rank>.epoch-<epoch>.log. A rank's log
// is the concatenation of its epochs' files. Bounded by comm/base/log_folder.h: old text gives way
// and positions stay. Loop thread only; not synced: a power cut may take the newest lines.
#pragma once

#include <map>
#include <string>
#include <utility>

#include "comm/base/file.h"
#include "comm/base/log_folder.h"
#include "comm/control/message.h"

namespace penstock {

// Of one rank in one attempt, what gave way included.
inline constexpr uint64_t kLogOffsetMax = uint64_t{1} << 40;

struct LogText {
  std::string text;
  uint64_t next_offset =
      0;  // where the next read goes on; beyond the text where bytes were never received
};

class LogFiles {
 public:
  explicit LogFiles(Path root, LogBounds bounds = {}) : root_(std::move(root)), bounds_(bounds) {}

  // Puts the chunk where its offset says; repeating one changes nothing. kAborted for an epoch
  // below the newest one seen of that rank (what readers were told must not move);
  // kResourceExhausted beyond kLogOffsetMax.
  Status append(const LogChunk& chunk);
  // Up to `bytes_max` bytes of a rank's log from `offset`; empty at its end, or when there is none.
  Result<LogText> read(JobId job, Rank rank, uint64_t offset, uint64_t bytes_max) const;

  // Every log of a job. What cannot be removed is left to the bounds.
  void remove(JobId job);

 private:
  using RankLog = std::pair<JobId, Rank>;
  Path folder(JobId job) const;
  Path file(JobId job, Rank rank, Epoch epoch) const;
  // Epochs with a file, ascending, and their sizes.
  std::map<Epoch, uint64_t> sizes(JobId job, Rank rank) const;

  void keep_within_bounds(uint64_t bytes_written);

  const Path root_;
  const LogBounds bounds_;
  uint64_t unchecked_bytes_ = kLogBytesPerCheck;  // written since the bounds were applied
  std::map<RankLog, Epoch> newest_;               // of this process's life
};

}  // namespace penstock
