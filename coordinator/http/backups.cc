#include "coordinator/http/backups.h"

#include <fmt/format.h>

namespace penstock {

Result<BackupPiece> Backups::begin(const RecordStore& store, Instant now) {
  expire(now);
  if (running_.size() >= kBackupsMax) {
    return resource_exhausted(
        fmt::format("{} backups are being taken; try again when one is done", kBackupsMax));
  }
  const uint64_t id = ++last_id_;
  running_.try_emplace(id, store, now);
  return next(id, 0, now);
}

Result<BackupPiece> Backups::next(uint64_t id, uint64_t offset, Instant now) {
  const auto at = running_.find(id);
  if (at == running_.end()) {
    return not_found(
        fmt::format("there is no backup {} being taken (any more); begin another", id));
  }
  Running& backup = at->second;
  if (offset != backup.offset) {
    return failed_precondition(fmt::format("backup {} goes on at offset {}, not {}; begin another",
                                           id, backup.offset, offset));
  }
  Result<std::string> text = backup.text.next(kBackupPieceBytes);
  if (!text.ok()) {
    running_.erase(at);
    return text.status();
  }
  backup.asked_at = now;
  backup.offset += text->size();
  BackupPiece piece{id, backup.offset, *std::move(text), backup.text.done()};
  if (piece.done) running_.erase(at);
  return piece;
}

void Backups::expire(Instant now) {
  std::erase_if(running_,
                [&](const auto& entry) { return now - entry.second.asked_at >= kBackupIdleMax; });
}

}  // namespace penstock
