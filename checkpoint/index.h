// The checkpoint index: one RocksDB for all jobs of a coordinator. It answers "what checkpoints are
// there" without touching a (shared, slow) checkpoint directory, and witnesses commits: a manifest
// that vanished is noticed because the index still knows its number. It is never the proof that a
// checkpoint exists; the manifests are, and reconcile() rebuilds the rows from them.
//
// Keys, big-endian: 'c' job commit_seq -> row;  'h' job -> highest commit_seq ever recorded;
// 'n' -> newest link of the chain of all changes, by which older contents are noticed
// (index_witness.h).
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/file_system.h"
#include "comm/base/clock.h"
#include "comm/base/file.h"
#include "comm/base/hash.h"
#include "comm/base/ids.h"
#include "comm/base/status.h"

namespace rocksdb {
class Env;
}

namespace penstock {

// One committed checkpoint, as list() of store and index both give it.
struct CheckpointInfo {
  JobId job;
  uint64_t commit_seq = 0;
  int64_t step = 0;
  Epoch epoch;
  std::string manifest_file;  // name within the job's checkpoint directory
  Digest manifest_digest;
  uint64_t payload_bytes = 0;
  uint32_t segment_count = 0;
  Instant created_at;
  bool operator==(const CheckpointInfo&) const = default;
};

// What reconcile() found and did.
struct IndexReport {
  bool rebuilt = false;  // rows differed from the manifests and were rewritten
  std::string reason;    // why, empty when nothing was done
  std::vector<CheckpointInfo>
      lost;              // commits the index knew whose manifests are gone: tell the user
  size_t row_count = 0;  // rows of the job now
};

// Any thread. Every call blocks on the disk, so keep it off event loops that must answer quickly;
// one that hangs in a job's directory holds up no other job's. After a change that failed the
// database is opened anew by the next call, as by open().
class CheckpointIndex {
 public:
  // Opens or creates. A database that is damaged, or older than its witness, is never opened for
  // writing: it is moved aside to "<path>.damaged-<hex>" and a new one made, and opening_report()
  // says so; the newest three of those stay. kFailedPrecondition when another process has it open,
  // which "<path>.lock" tells. `files` and `env` (null: the real ones) are borrowed and must
  // outlive the index.
  static Result<std::unique_ptr<CheckpointIndex>> open(const Path& path,
                                                       FileSystem& files = real_file_system(),
                                                       rocksdb::Env* env = nullptr);
  ~CheckpointIndex();
  CheckpointIndex(const CheckpointIndex&) = delete;
  CheckpointIndex& operator=(const CheckpointIndex&) = delete;

  // Empty, or what was wrong and where the damaged database lies now, if anywhere. Then reconcile()
  // every job.
  std::string opening_report() const;

  // One synced WriteBatch: the row and the job's highest commit number.
  Status record_commit(const CheckpointInfo& info);
  // One synced WriteBatch. Rows that do not exist are no error.
  Status forget(JobId job, const std::vector<uint64_t>& commit_seqs);
  // Every row and the high mark of a job (for jobs that are deleted).
  Status forget_job(JobId job);
  // Ascending by commit_seq.
  Result<std::vector<CheckpointInfo>> list(JobId job) const;
  // Highest commit number ever recorded for the job; 0: none.
  Result<uint64_t> highest_commit(JobId job) const;

  // Compares the job's rows with the manifests in its checkpoint directory and rewrites them when
  // they differ. Does nothing else to the directory. A missing directory counts as empty. Rows that
  // cannot be read mean a damaged database: it is moved aside like one that does not open, and the
  // other jobs want to be reconciled again. REQUIRES: nothing changes the job's checkpoints
  // meanwhile.
  Result<IndexReport> reconcile(JobId job, const Path& directory);

 private:
  struct Database;
  explicit CheckpointIndex(std::unique_ptr<Database> database);
  std::unique_ptr<Database> database_;
};

}  // namespace penstock
