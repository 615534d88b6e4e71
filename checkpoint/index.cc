#include "checkpoint/index.h"

#include <fmt/format.h>
#include <rocksdb/db.h>
#include <rocksdb/file_checksum.h>
#include <rocksdb/write_batch.h>

#include <algorithm>
#include <mutex>
#include <set>

#include "checkpoint/index_log.h"
#include "checkpoint/index_row.h"
#include "checkpoint/marks.h"
#include "checkpoint/removal.h"
#include "checkpoint/store.h"
#include "checkpoint/uuid.h"
#include "comm/base/bytes.h"
#include "comm/base/log.h"

namespace penstock {
namespace {

constexpr char kRowPrefix = 'c';
constexpr char kHighPrefix = 'h';
constexpr std::string_view kLinkKey = "n";
constexpr const char* kAside = ".damaged-";
constexpr size_t kSetAsideMax = 3;

void put_big_endian(std::string& key, uint64_t number) {
  for (int shift = 56; shift >= 0; shift -= 8) key.push_back(static_cast<char>(number >> shift));
}

std::string high_key(JobId job) {
  std::string key(1, kHighPrefix);
  put_big_endian(key, job.value);
  return key;
}

std::string row_prefix(JobId job) {
  std::string key(1, kRowPrefix);
  put_big_endian(key, job.value);
  return key;
}

std::string row_key(JobId job, uint64_t commit_seq) {
  std::string key = row_prefix(job);
  put_big_endian(key, commit_seq);
  return key;
}

Status from_rocksdb(const rocksdb::Status& status, std::string_view what) {
  if (status.ok()) return {};
  const std::string message = fmt::format("checkpoint index: {}: {}", what, status.ToString());
  if (status.IsCorruption()) return data_loss(message);
  if (status.IsNoSpace()) return resource_exhausted(message);
  if (status.IsNotFound()) return not_found(message);
  return internal_error(message);
}

rocksdb::Options index_options(rocksdb::Env* env, bool create) {
  rocksdb::Options options;
  options.env = env;
  options.create_if_missing = create;
  options.paranoid_checks = true;
  // The default mode silently drops acknowledged commits after one flipped bit of the log.
  options.wal_recovery_mode = rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
  options.write_dbid_to_manifest = true;
  options.verify_sst_unique_id_in_manifest = true;
  options.file_checksum_gen_factory = rocksdb::GetFileChecksumGenCrc32cFactory();
  options.write_buffer_size = 1 << 20;  // rows are small and few
  options.max_open_files = 64;
  options.keep_log_file_num = 2;
  options.info_log_level = rocksdb::InfoLogLevel::WARN_LEVEL;
  return options;
}

rocksdb::WriteOptions synced() {
  rocksdb::WriteOptions options;
  options.sync = true;
  return options;
}

// Every value in the batch carries its own checksum from here to the log.
rocksdb::WriteBatch protected_batch() {
  return rocksdb::WriteBatch(/*reserved_bytes=*/0, /*max_bytes=*/0,
                             /*protection_bytes_per_key=*/8, /*default_cf_ts_sz=*/0);
}

// Count 0 for an index that holds none: an empty one, or one made before there were links.
Result<ChainLink> read_link(rocksdb::DB& db) {
  std::string value;
  const rocksdb::Status status = db.Get(rocksdb::ReadOptions(), kLinkKey, &value);
  if (status.IsNotFound()) return ChainLink();
  PENSTOCK_TRY(from_rocksdb(status, "read the newest link"));
  return decode_link(value);
}

// Ok when the index is as new as its witness, or the one change newer that a crash leaves it.
Status compare(const ChainLink& link, const ChainHead& witness) {
  if (link.head == witness) return {};
  if (link.head.count == witness.count + 1 && link.previous == witness.digest) return {};
  return data_loss(fmt::format(
      "it ends with change {} ({}), but change {} ({}) was made: older contents were put back",
      link.head.count, to_hex(link.head.digest), witness.count, to_hex(witness.digest)));
}

// Of the databases set aside only the newest stay, or a disk that damages one after another would
// fill.
Status drop_oldest_set_aside(const Path& index, const Path& newest) {
  const std::string prefix = index.filename().string() + kAside;
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(index.parent_path()));
  std::error_code error;
  std::vector<std::pair<std::filesystem::file_time_type, Path>> older;
  for (const std::string& name : names) {
    const Path path = index.parent_path() / name;
    // One that somebody has named is to be kept.
    const bool ours = name.starts_with(prefix) && parse_uuid(name.substr(prefix.size())).ok();
    if (ours && path != newest) {
      older.emplace_back(std::filesystem::last_write_time(path, error), path);
    }
  }
  std::sort(older.begin(), older.end());
  for (size_t i = 0; i + kSetAsideMax <= older.size(); ++i) {
    const Path& path = older[i].second;
    std::filesystem::remove_all(path, error);
    if (error) return errno_status(error.value(), "remove " + path.string());
    log_warning("{} is removed: of damaged checkpoint indexes the newest {} stay", path.string(),
                kSetAsideMax);
  }
  return {};
}

bool is_lock_failure(const rocksdb::Status& status) {
  const std::string text = status.ToString();
  return status.IsIOError() && (text.find("lock hold by") != std::string::npos ||
                                text.find("While lock file") != std::string::npos);
}

}  // namespace

struct CheckpointIndex::Database {
  Path path;
  FileSystem* files = nullptr;
  rocksdb::Env* env = nullptr;
  // RocksDB's own lock goes with each close, and so does not hold from the judgement to the opening
  // nor after a write that failed; this one does.
  FileDescriptor lock;
  std::unique_ptr<rocksdb::DB> db;
  ChainHead head;
  bool reopening = false;  // after a failed write: nobody asks for the report any more
  std::string opening_report;
  std::recursive_mutex mutex;  // for all calls: start_over() changes `db` under them

  // Reads what is there without changing a byte of it: RocksDB deletes tables that an older
  // MANIFEST does not know as soon as it may write. kDataLoss: it must not be opened.
  Status inspect(const ChainHead& witness) {
    PENSTOCK_TRY(check_logs(path));
    rocksdb::DB* opened = nullptr;
    const rocksdb::Status status =
        rocksdb::DB::OpenForReadOnly(index_options(env, false), path.string(), &opened);
    const std::unique_ptr<rocksdb::DB> reader(opened);
    if (status.IsNoSpace()) return from_rocksdb(status, "open " + path.string());
    if (!status.ok()) return data_loss(status.ToString());
    const rocksdb::Status whole = reader->VerifyFileChecksums(rocksdb::ReadOptions());
    if (!whole.ok()) return data_loss(whole.ToString());
    PENSTOCK_TRY_ASSIGN(const ChainLink link, read_link(*reader));
    PENSTOCK_TRY(compare(link, witness));
    head = link.head;
    return {};
  }

  Status open(bool create) {
    rocksdb::DB* opened = nullptr;
    const rocksdb::Status status =
        rocksdb::DB::Open(index_options(env, create), path.string(), &opened);
    db.reset(opened);
    if (is_lock_failure(status)) return busy();
    return from_rocksdb(status, "open " + path.string());
  }

  Status busy() const {
    return failed_precondition("another process has the checkpoint index " + path.string() +
                               " open; stop the other coordinator first");
  }

  // Moves the damaged files aside, where people can look at them.
  Status set_aside(const std::string& damage) {
    const Path aside = path.string() + kAside + to_hex(random_uuid());
    PENSTOCK_TRY(files->rename_no_replace(path, aside)
                     .with_context("the checkpoint index is damaged (" + damage + ")"));
    opening_report = fmt::format(
        "the checkpoint index {} was damaged ({}) and is now {}; a new one is made from the "
        "manifests",
        path.string(), damage, aside.string());
    if (reopening) log_warning("{}", opening_report);
    if (const Status dropped = drop_oldest_set_aside(path, aside); !dropped.ok()) {
      log_warning("{}", dropped.message());
    }
    return files->sync_directory(path.parent_path());
  }

  // Begins with nothing, as the next link after `witness`.
  Status make_new(const ChainHead& witness) {
    PENSTOCK_TRY(open(true));
    PENSTOCK_TRY(files->sync_directory(path.parent_path()));
    head = witness;
    if (witness.count == 0) return {};
    rocksdb::WriteBatch batch = protected_batch();
    return write(batch, "begin anew");
  }

  Status start_over(const std::string& damage) {
    db.reset();
    PENSTOCK_TRY(set_aside(damage));
    return make_new(head);
  }

  // Opens the database when it is not open: at first, and again after a write that failed.
  Status ready() {
    if (db) return {};
    PENSTOCK_TRY_ASSIGN(const ChainHead witness, read_witness(path));
    std::error_code error;
    const bool exists =
        std::filesystem::exists(path, error) &&
        !(std::filesystem::is_directory(path, error) && std::filesystem::is_empty(path, error));
    // Taken for missing, an older one would be opened for writing.
    if (error) return errno_status(error.value(), "look for " + path.string());
    if (!exists) {
      if (witness.count > 0) {
        opening_report = fmt::format(
            "the checkpoint index {} is gone; a new one is made from the manifests", path.string());
      }
      return make_new(witness);
    }
    PENSTOCK_TRY_ASSIGN(const bool usable, judge(witness));
    if (!usable) return make_new(witness);
    PENSTOCK_TRY(open(/*create=*/false));
    // A crash may have come between the index's newest change and its witness.
    return head == witness ? Status() : write_witness(path, head, *files);
  }

  // Whether what is there may be opened for writing; if not, it is moved aside.
  Result<bool> judge(const ChainHead& witness) {
    std::error_code error;
    const bool folder = std::filesystem::is_directory(path, error);
    if (error) return errno_status(error.value(), "look at " + path.string());
    if (!folder) {
      PENSTOCK_TRY(set_aside("it is no folder"));
      return false;
    }
    // Nor may a program write it meanwhile that knows RocksDB's lock alone.
    rocksdb::FileLock* lock = nullptr;
    const rocksdb::Status locked = env->LockFile((path / "LOCK").string(), &lock);
    if (is_lock_failure(locked)) return busy();
    PENSTOCK_TRY(from_rocksdb(locked, "lock " + path.string()));
    const Status whole = inspect(witness);
    const Status status = whole.code() == Code::kDataLoss ? set_aside(whole.message()) : whole;
    env->UnlockFile(lock);
    PENSTOCK_TRY(status);
    return whole.ok();
  }

  // After a failed write RocksDB's files are in doubt, and RocksDB itself may abort at the next
  // one: closed, it is judged and opened anew by the next call.
  Status write(rocksdb::WriteBatch& batch, std::string_view what) {
    const Status status = try_write(batch, what);
    if (status.ok()) return {};
    reopening = true;
    db.reset();
    return status;
  }

  Status try_write(rocksdb::WriteBatch& batch, std::string_view what) {
    const ChainHead next = next_head(head, as_bytes(batch.Data()));
    PENSTOCK_TRY(from_rocksdb(batch.Put(kLinkKey, encode_link({next, head.digest})), what));
    PENSTOCK_TRY(from_rocksdb(db->Write(synced(), &batch), what));
    head = next;
    // After a flush the commit is in a checked table and no longer depends on the log's last
    // records.
    PENSTOCK_TRY(from_rocksdb(db->Flush(rocksdb::FlushOptions()), what));
    return write_witness(path, head, *files);
  }
};

CheckpointIndex::CheckpointIndex(std::unique_ptr<Database> database)
    : database_(std::move(database)) {}

CheckpointIndex::~CheckpointIndex() = default;

Result<std::unique_ptr<CheckpointIndex>> CheckpointIndex::open(const Path& given, FileSystem& files,
                                                               rocksdb::Env* env) {
  std::error_code error;
  const Path path = std::filesystem::absolute(given, error);  // a bare name has no parent
  if (error) return errno_status(error.value(), "find " + given.string());
  PENSTOCK_TRY(create_directories_durably(path.parent_path()));
  auto database = std::make_unique<Database>();
  database->path = path;
  database->files = &files;
  database->env = env != nullptr ? env : rocksdb::Env::Default();
  PENSTOCK_TRY_ASSIGN(database->lock,
                      take_lock(path.string() + ".lock", "; stop the other coordinator first"));
  PENSTOCK_TRY(database->ready());
  return std::unique_ptr<CheckpointIndex>(new CheckpointIndex(std::move(database)));
}

std::string CheckpointIndex::opening_report() const {
  const std::lock_guard lock(database_->mutex);
  return database_->opening_report;
}

Status CheckpointIndex::record_commit(const CheckpointInfo& info) {
  const std::lock_guard lock(database_->mutex);
  PENSTOCK_TRY(database_->ready());
  PENSTOCK_TRY_ASSIGN(const uint64_t highest, highest_commit(info.job));
  rocksdb::WriteBatch batch = protected_batch();
  std::string high;
  put_big_endian(high, std::max(highest, info.commit_seq));
  PENSTOCK_TRY(from_rocksdb(batch.Put(row_key(info.job, info.commit_seq), encode_row(info)),
                            "record commit"));
  PENSTOCK_TRY(from_rocksdb(batch.Put(high_key(info.job), high), "record commit"));
  return database_->write(batch, "record commit");
}

Status CheckpointIndex::forget(JobId job, const std::vector<uint64_t>& commit_seqs) {
  const std::lock_guard lock(database_->mutex);
  PENSTOCK_TRY(database_->ready());
  rocksdb::WriteBatch batch = protected_batch();
  for (const uint64_t commit_seq : commit_seqs) {
    PENSTOCK_TRY(from_rocksdb(batch.Delete(row_key(job, commit_seq)), "forget"));
  }
  return database_->write(batch, "forget");
}

Status CheckpointIndex::forget_job(JobId job) {
  const std::lock_guard lock(database_->mutex);
  PENSTOCK_TRY(database_->ready());
  PENSTOCK_TRY_ASSIGN(const std::vector<CheckpointInfo> rows, list(job));
  rocksdb::WriteBatch batch = protected_batch();
  for (const CheckpointInfo& row : rows) {
    PENSTOCK_TRY(from_rocksdb(batch.Delete(row_key(job, row.commit_seq)), "forget job"));
  }
  PENSTOCK_TRY(from_rocksdb(batch.Delete(high_key(job)), "forget job"));
  return database_->write(batch, "forget job");
}

Result<std::vector<CheckpointInfo>> CheckpointIndex::list(JobId job) const {
  const std::lock_guard lock(database_->mutex);
  PENSTOCK_TRY(database_->ready());
  const std::string prefix = row_prefix(job);
  rocksdb::ReadOptions options;
  options.verify_checksums = true;
  const std::unique_ptr<rocksdb::Iterator> row(database_->db->NewIterator(options));
  std::vector<CheckpointInfo> rows;
  for (row->Seek(prefix); row->Valid() && row->key().starts_with(prefix); row->Next()) {
    PENSTOCK_TRY_ASSIGN(CheckpointInfo info, decode_row(row->value().ToStringView()));
    if (info.job != job || row->key() != row_key(job, info.commit_seq)) {
      return data_loss(
          fmt::format("checkpoint index: the row of job {}, commit {} lies under another "
                      "key",
                      info.job, info.commit_seq));
    }
    rows.push_back(std::move(info));
  }
  PENSTOCK_TRY(from_rocksdb(row->status(), "list"));
  return rows;
}

Result<uint64_t> CheckpointIndex::highest_commit(JobId job) const {
  const std::lock_guard lock(database_->mutex);
  PENSTOCK_TRY(database_->ready());
  std::string value;
  const rocksdb::Status status = database_->db->Get(rocksdb::ReadOptions(), high_key(job), &value);
  if (status.IsNotFound()) return uint64_t{0};
  PENSTOCK_TRY(from_rocksdb(status, "read the highest commit"));
  if (value.size() != sizeof(uint64_t)) return data_loss("checkpoint index: malformed high mark");
  uint64_t highest = 0;
  for (const char byte : value) highest = highest << 8 | static_cast<uint8_t>(byte);
  return highest;
}

Result<IndexReport> CheckpointIndex::reconcile(JobId job, const Path& directory) {
  StoreListing listing = list_checkpoints(directory, job);
  PENSTOCK_TRY(listing.directory);
  // Those of a removal that a crash cut short are neither there nor lost, nor are those that were
  // removed without this index.
  PENSTOCK_TRY_ASSIGN(std::vector<uint64_t> going, removal_in_progress(directory));
  PENSTOCK_TRY_ASSIGN(const std::vector<uint64_t> removed, removed_checkpoints(directory));
  going.insert(going.end(), removed.begin(), removed.end());
  const auto is_going = [&](const CheckpointInfo& info) {
    return std::find(going.begin(), going.end(), info.commit_seq) != going.end();
  };
  std::erase_if(listing.checkpoints, is_going);
  const std::lock_guard lock(database_->mutex);
  PENSTOCK_TRY(database_->ready());
  const auto& wanted = listing.checkpoints;
  const Result<std::vector<CheckpointInfo>> rows = list(job);
  const Result<uint64_t> mark = highest_commit(job);
  // A damaged table stays damaged however much is written beside it.
  for (const Status& status : {rows.status(), mark.status()}) {
    if (status.code() != Code::kDataLoss) continue;
    PENSTOCK_TRY(database_->start_over(status.message()));
    break;
  }
  const uint64_t highest = mark.ok() ? *mark : 0;
  const uint64_t newest = wanted.empty() ? 0 : wanted.back().commit_seq;
  IndexReport report;
  report.row_count = wanted.size();
  if (rows.ok() && *rows == wanted && mark.ok() && highest >= newest) return report;

  report.rebuilt = true;
  std::set<uint64_t> on_disk;
  for (const CheckpointInfo& info : wanted) on_disk.insert(info.commit_seq);
  for (const RefusedCheckpoint& refused : listing.refused) on_disk.insert(refused.commit_seq);
  rocksdb::WriteBatch batch = protected_batch();
  if (rows.ok()) {
    for (const CheckpointInfo& row : *rows) {
      if (!on_disk.contains(row.commit_seq) && !is_going(row)) report.lost.push_back(row);
    }
    report.reason = fmt::format(
        "the index had {} rows up to commit {}, the directory has {} "
        "manifests up to commit {}",
        rows->size(), highest, wanted.size(), newest);
  } else {
    report.reason = rows.status().message();
  }
  PENSTOCK_TRY(
      from_rocksdb(batch.DeleteRange(row_key(job, 0), row_key(job, UINT64_MAX)), "rebuild"));
  for (const CheckpointInfo& info : wanted) {
    PENSTOCK_TRY(
        from_rocksdb(batch.Put(row_key(job, info.commit_seq), encode_row(info)), "rebuild"));
  }
  std::string high;
  put_big_endian(high, std::max(highest, newest));
  PENSTOCK_TRY(from_rocksdb(batch.Put(high_key(job), high), "rebuild"));
  PENSTOCK_TRY(database_->write(batch, "rebuild"));
  return report;
}

}  // namespace penstock
