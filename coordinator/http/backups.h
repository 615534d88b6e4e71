// Backups on their way to clients, a piece at a time, so that no client holds up the loop.
#pragma once

#include <map>

#include "comm/base/ids.h"
#include "coordinator/store/backup.h"

namespace penstock {

// At once; a further one is refused.
inline constexpr size_t kBackupsMax = 4;
inline constexpr size_t kBackupPieceBytes = 256 << 10;
// A backup of which nothing was asked for so long is given up: it keeps old records on disk.
inline constexpr Duration kBackupIdleMax = std::chrono::minutes(1);

struct BackupPiece {
  uint64_t id = 0;
  uint64_t next_offset = 0;
  std::string text;
  bool done = false;  // it is the last one, and the backup is known no more
};

// Loop thread only.
class Backups {
 public:
  // Of the records as they are now.
  Result<BackupPiece> begin(const RecordStore& store, Instant now);
  // From `offset` on, where the piece before it ended. kNotFound: there is none of that id (any
  // more). kFailedPrecondition: another offset.
  Result<BackupPiece> next(uint64_t id, uint64_t offset, Instant now);
  void expire(Instant now);

 private:
  struct Running {
    Running(const RecordStore& store, Instant now) : text(store.snapshot(), now), asked_at(now) {}
    BackupText text;
    uint64_t offset = 0;
    Instant asked_at;
  };
  std::map<uint64_t, Running> running_;
  uint64_t last_id_ = 0;
};

}  // namespace penstock
