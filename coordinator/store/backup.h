// A copy of a coordinator's records in one file, taken while it runs, and the store made from such
// a file. JSON lines, whatever the store is written in:
//
//   {"format":"penstock-backup-1","taken_at_ns":…,"taken_at":"2026-11-23T05:40:00.000Z"}
//   {"key":"job/0000000000000001","value":"…"}          one for each record, keys ascending
//   {"records":…,"xxh3":"…"}                            the digest of every byte before this line
//
// Checkpoints, their index and what ranks printed are not in it.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "comm/base/file.h"
#include "comm/base/hash.h"
#include "coordinator/store/record_store.h"

namespace penstock {

// The text of a backup, a piece at a time. Single-threaded.
class BackupText {
 public:
  BackupText(std::unique_ptr<const RecordReader> records, Instant taken_at);
  // The next whole lines, at least one: up to and with the one that makes them `bytes`, or the end.
  // REQUIRES: !done().
  Result<std::string> next(size_t bytes);
  bool done() const { return done_; }

 private:
  const std::unique_ptr<const RecordReader> records_;
  const Instant taken_at_;
  std::string next_key_;
  uint64_t count_ = 0;
  DigestStream digest_;
  bool begun_ = false;
  bool done_ = false;
};

struct BackupContents {
  Instant taken_at;
  uint64_t records = 0;
};

// Hands every record of the file to `each`, in order. Nothing of it is to be relied on before this
// has returned: only then is the file known to be whole. kDataLoss, naming file and line: it is
// not.
Result<BackupContents> read_backup(const Path& file,
                                   const std::function<Status(Record record)>& each);

struct RestoredStore {
  BackupContents backup;
  size_t jobs = 0;
  size_t open_jobs = 0;  // that go on when a coordinator is started
};

// Makes the records of a coordinator whose state directory `state_dir` is to be, with the changes
// of coordinator/core/restored_records.h: all of them or, wherever it fails, none.
// kFailedPrecondition: there are records in it. kAlreadyExists: a coordinator runs on it.
Result<RestoredStore> restore_backup(const Path& file, const Path& state_dir, Instant now);

}  // namespace penstock
