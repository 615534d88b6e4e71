// The checkpoint store: one job's directory of segments and manifests.
//
//   <directory>/STORE                         uuid of this store, written once
//   <directory>/LOCK                          held (OFD lock) by the one writer
//   <directory>/e0000000001-r….segment        by ranks
//   <directory>/000000000001.manifest         by the coordinator; its rename is the commit
//   <directory>/000000000001.pin              retention keeps that checkpoint (marks.h)
//   <directory>/000000000001.manifest.damaged its manifest, set aside because it is damaged
//   <directory>/000000000001.removed          it was removed, and its index row is to go too
//   <directory>/GC                            a removal in progress, resumed at the next open
//
// A crash at any point leaves each checkpoint either whole or absent: data is durable before a
// manifest names it, and a manifest is gone for good before its segments go.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/file_system.h"
#include "checkpoint/index.h"
#include "checkpoint/manifest.h"
#include "checkpoint/segment.h"

namespace penstock {

struct Removal;  // removal.h

// One rank's part of a commit: what its SegmentSaved message said.
struct CommitSegment {
  std::string file;
  Rank rank;
  uint64_t byte_count = 0;
  Digest footer_digest;
};

struct CommitRequest {
  Epoch epoch;
  int64_t step = 0;
  Instant created_at;
  std::string spec_json;
  std::string layout;
  std::vector<CommitSegment> segments;  // every rank's, any order
};

struct CommitReport {
  CheckpointInfo info;
  Status index;  // the checkpoint is committed whatever this says; not ok: reconcile() the index
};

// A checkpoint that exists but must not be used, and why: the reason names file, tensor, rank and
// bytes.
struct RefusedCheckpoint {
  uint64_t commit_seq = 0;
  std::string manifest_file;
  Status reason;
  bool set_aside = false;  // by set_aside(): nothing looks at it again
};

struct StoreListing {
  Status directory;  // not ok: it could not be read, and the lists below say nothing
  std::vector<CheckpointInfo> checkpoints;  // readable manifests, ascending by commit_seq
  std::vector<RefusedCheckpoint> refused;   // unreadable, foreign, or denied by their successor
};

struct NewestWhole {
  Status directory;                          // not ok: it could not be read; nothing is known
  std::optional<CheckpointInfo> checkpoint;  // empty: nothing to resume from
  std::vector<RefusedCheckpoint> refused;    // newer ones that were passed over, newest first
};

// What retention keeps: the newest, those of certain steps, and all that are pinned.
struct RetentionPolicy {
  int64_t keep_last = 1;   // whole ones; at least 1
  int64_t keep_every = 0;  // of steps divisible by this; 0: none
  bool dry_run = false;    // say what would go
};

struct RemovalReport {
  std::vector<uint64_t> commit_seqs;           // checkpoints removed
  std::vector<std::string> files;              // segments and left-over temporaries removed
  std::vector<RefusedCheckpoint> passed_over;  // not whole, so they do not count, newest first
  Status segments;  // not ok: a manifest that cannot be read may name any, so all of them stay
};

// Reads one job's checkpoint directory; changes nothing, takes no lock. Safe beside a writer: a
// checkpoint being removed shows up as refused, never as wrong bytes.
StoreListing list_checkpoints(const Path& directory, JobId job);
// The manifest's segments exist, with the right sizes, headers and footers, and tile every tensor.
// Reads no data.
Status check_segments(const Path& directory, const Manifest& manifest);
// check_segments, then every block and digest.
Status verify_checkpoint(const Path& directory, const Manifest& manifest);
// The highest commit_seq that passes check_segments, falling back to the one before, with the
// reasons.
NewestWhole newest_whole(const Path& directory, JobId job);

// Ok, or kDataLoss when the STORE file is there and not what was written. restore_store_file()
// moves such a one to STORE.damaged and writes it again with the uuid that the manifests carry;
// kFailedPrecondition, and nothing changed, when they are none or disagree.
Status check_store_file(const Path& directory);
Status restore_store_file(const Path& directory, FileSystem& files = real_file_system());

// Whether anything in the directory is a store's. Not where it is missing, nor where a file system
// that should be mounted there is not.
Result<bool> holds_store(const Path& directory);

// The lock of whoever writes there, held until the descriptor is closed. kFailedPrecondition when
// somebody else has it.
Result<FileDescriptor> lock_store(const Path& directory);

// Removes a job's store: its checkpoints for good first, then every other file of docs/checkpoint-
// format.md, then the directory, unless something else is in it. A missing directory is no error,
// nor is one without a store; STORE may be damaged. A crash leaves a store with fewer checkpoints;
// calling it again goes on.
//   kFailedPrecondition  a manifest is of another job, and then nothing was removed; or the store
//                        has another writer just now
Status remove_store(const Path& directory, JobId job, FileSystem& files = real_file_system());

// The uuid of the store in `directory`, made durably on first use. Any process, any time.
Result<Uuid> store_uuid(const Path& directory, FileSystem& files = real_file_system());

// The one writer of a job's checkpoint directory. Not thread-safe; every call blocks on the disk.
class CheckpointStore {
 public:
  // Creates the directory when missing, takes the lock, finishes an interrupted removal.
  // kFailedPrecondition when another writer holds the lock. `index` may be null; it and `files` are
  // borrowed and must outlive the store.
  static Result<CheckpointStore> open(const Path& directory, JobId job, CheckpointIndex* index,
                                      FileSystem& files = real_file_system());

  // As open(), and again for as long as another writer holds the lock and `wait`, which is called
  // in between, says true.
  static Result<CheckpointStore> open_when_free(const Path& directory, JobId job,
                                                CheckpointIndex* index,
                                                const std::function<bool()>& wait);

  const Path& directory() const { return directory_; }

  // Publishes one checkpoint. Steps: 1. every segment re-read (size, header, footer digest,
  // identity equal to the request's); 2. boxes proven to tile every tensor; 3. manifest durable
  // under a temporary name; 4. renamed to its final name, never replacing: the commit point; 5. the
  // rename itself durable; 6. indexed. A crash before 4 leaves the previous checkpoint newest,
  // after 5 this one, in between either; all whole.
  //   kDataLoss           a segment is missing, damaged or not the one described; a gap or overlap
  //   kInvalidArgument    wrong step or epoch in a segment, duplicate file, no segments
  //   kAborted            a newer epoch has committed here, or another writer took the number
  //   kResourceExhausted  disk full; nothing changed
  Result<CommitReport> commit(const CommitRequest& request);

  // Steps 1 and 2 of commit(): the manifest that it would publish, with the same errors. Nothing
  // changes.
  Result<Manifest> assemble(const CommitRequest& request) const;

  // Removes all checkpoints but those the policy keeps, after reading the newest one completely.
  // Damaged ones do not count, and go once a whole newer one is kept. Removes nothing when no
  // checkpoint verifies. A segment goes when no manifest that stays names it.
  Result<RemovalReport> retain(const RetentionPolicy& policy);

  // Marks a checkpoint for retention to keep. kNotFound when there is no readable one of that
  // number; unpinning what is not pinned is no error. Durable on return.
  Status pin(uint64_t commit_seq);
  Status unpin(uint64_t commit_seq);

  // Renames the manifest of a damaged checkpoint so that nobody uses it; its segments stay until
  // retention removes it.
  //   kFailedPrecondition  it is whole, or is another job's; or no other checkpoint verifies
  //                        completely, and then this one is left as the best there is
  Status set_aside(uint64_t commit_seq);

  // Removes segments no manifest names and temporaries, of epochs below `current`. Refuses with
  // kDataLoss while a manifest is unreadable, since it may name any of them.
  Result<RemovalReport> sweep_orphans(Epoch current);

 private:
  CheckpointStore() = default;
  Result<Manifest> begin_manifest(const CommitRequest& request) const;
  Result<Removal> plan_removal(uint64_t oldest_kept, int64_t keep_every,
                               RemovalReport& report) const;
  Status settle_rows(std::vector<uint64_t> going);

  Path directory_;
  JobId job_;
  Uuid uuid_;
  FileDescriptor lock_;
  CheckpointIndex* index_ = nullptr;
  FileSystem* files_ = nullptr;
};

}  // namespace penstock
