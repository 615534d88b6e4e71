#include "checkpoint/index.h"

#include <fmt/format.h>
#include <rocksdb/db.h>
#include <rocksdb/write_batch.h>

#include <algorithm>
#include <mutex>
#include <set>

#include "checkpoint/store.h"
#include "checkpoint/uuid.h"
#include "comm/base/bytes.h"

namespace penstock {
namespace {

constexpr uint8_t kRowFormat = 1;
constexpr char kRowPrefix = 'c';
constexpr char kHighPrefix = 'h';
constexpr size_t kFileNameBytesMax = 255;

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

std::string encode_row(const CheckpointInfo& info) {
  ByteWriter writer;
  writer.put(kRowFormat);
  writer.put(info.job.value);
  writer.put(info.commit_seq);
  writer.put(info.step);
  writer.put(info.epoch.value);
  writer.put_string(info.manifest_file);
  writer.put(info.manifest_digest.low);
  writer.put(info.manifest_digest.high);
  writer.put(info.payload_bytes);
  writer.put(info.segment_count);
  writer.put(info.created_at.nanoseconds);
  return std::string(as_text(writer.data()));
}

Result<CheckpointInfo> decode_row(std::string_view bytes) {
  ByteReader reader(as_bytes(bytes));
  PENSTOCK_TRY_ASSIGN(const uint8_t format, reader.get<uint8_t>());
  if (format != kRowFormat) {
    return data_loss(
        fmt::format("an index row has format {}, this program reads {}", format, kRowFormat));
  }
  CheckpointInfo info;
  PENSTOCK_TRY_ASSIGN(info.job.value, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(info.commit_seq, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(info.step, reader.get<int64_t>());
  PENSTOCK_TRY_ASSIGN(info.epoch.value, reader.get<uint32_t>());
  PENSTOCK_TRY_ASSIGN(info.manifest_file, reader.get_string(kFileNameBytesMax));
  PENSTOCK_TRY_ASSIGN(info.manifest_digest.low, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(info.manifest_digest.high, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(info.payload_bytes, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(info.segment_count, reader.get<uint32_t>());
  PENSTOCK_TRY_ASSIGN(info.created_at.nanoseconds, reader.get<int64_t>());
  if (reader.remaining() != 0) return data_loss("an index row is longer than its fields");
  return info;
}

Status from_rocksdb(const rocksdb::Status& status, std::string_view what) {
  if (status.ok()) return {};
  const std::string message = fmt::format("checkpoint index: {}: {}", what, status.ToString());
  if (status.IsCorruption()) return data_loss(message);
  if (status.IsNoSpace()) return resource_exhausted(message);
  if (status.IsNotFound()) return not_found(message);
  return internal_error(message);
}

rocksdb::Options index_options(bool create) {
  rocksdb::Options options;
  options.create_if_missing = create;
  options.paranoid_checks = true;
  // The default mode silently drops acknowledged commits after one flipped bit of the log.
  options.wal_recovery_mode = rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
  options.write_dbid_to_manifest = true;
  options.verify_sst_unique_id_in_manifest = true;
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

}  // namespace

struct CheckpointIndex::Database {
  Path path;
  std::unique_ptr<rocksdb::DB> db;
  std::string opening_report;
  std::recursive_mutex mutex;  // for all calls: start_over() changes `db` under them

  rocksdb::Status open(bool create) {
    rocksdb::DB* opened = nullptr;
    const rocksdb::Status status = rocksdb::DB::Open(index_options(create), path.string(), &opened);
    db.reset(opened);
    return status;
  }

  // Moves the damaged files aside, where people can look at them, and begins with none.
  Status start_over(const std::string& damage) {
    db.reset();
    const Path aside = fmt::format("{}.damaged-{}", path.string(), to_hex(random_uuid()));
    std::error_code error;
    std::filesystem::rename(path, aside, error);
    if (error) {
      return errno_status(error.value(), "move aside " + path.string())
          .with_context("the checkpoint index is damaged (" + damage + ")");
    }
    opening_report = fmt::format(
        "the checkpoint index {} was damaged ({}) and is now {}; a new one is made from the "
        "manifests",
        path.string(), damage, aside.string());
    return from_rocksdb(open(true), "open " + path.string());
  }

  Status write(rocksdb::WriteBatch& batch, std::string_view what) {
    PENSTOCK_TRY(from_rocksdb(db->Write(synced(), &batch), what));
    // After a flush the commit is in a checked table and no longer depends on the log's last
    // records.
    return from_rocksdb(db->Flush(rocksdb::FlushOptions()), what);
  }
};

CheckpointIndex::CheckpointIndex(std::unique_ptr<Database> database)
    : database_(std::move(database)) {}

CheckpointIndex::~CheckpointIndex() = default;

Result<std::unique_ptr<CheckpointIndex>> CheckpointIndex::open(const Path& path) {
  PENSTOCK_TRY(create_directories_durably(path.parent_path()));
  auto database = std::make_unique<Database>();
  database->path = path;
  std::error_code error;
  const bool exists =
      std::filesystem::exists(path / "CURRENT", error) ||
      (std::filesystem::exists(path, error) && !std::filesystem::is_empty(path, error));
  const rocksdb::Status opened = database->open(!exists);
  if (!opened.ok() && opened.IsIOError() && opened.ToString().find("lock") != std::string::npos) {
    return failed_precondition("another process has the checkpoint index " + path.string() +
                               " open; stop the other coordinator first");
  }
  if (!opened.ok() && exists && !opened.IsNoSpace()) {
    PENSTOCK_TRY(database->start_over(opened.ToString()));
  } else {
    PENSTOCK_TRY(from_rocksdb(opened, "open " + path.string()));
  }
  return std::unique_ptr<CheckpointIndex>(new CheckpointIndex(std::move(database)));
}

const std::string& CheckpointIndex::opening_report() const {
  return database_->opening_report;
}

Status CheckpointIndex::record_commit(const CheckpointInfo& info) {
  const std::lock_guard lock(database_->mutex);
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
  rocksdb::WriteBatch batch = protected_batch();
  for (const uint64_t commit_seq : commit_seqs) {
    PENSTOCK_TRY(from_rocksdb(batch.Delete(row_key(job, commit_seq)), "forget"));
  }
  return database_->write(batch, "forget");
}

Status CheckpointIndex::forget_job(JobId job) {
  const std::lock_guard lock(database_->mutex);
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
  const StoreListing listing = list_checkpoints(directory, job);
  PENSTOCK_TRY(listing.directory);
  const std::lock_guard lock(database_->mutex);
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
      if (!on_disk.contains(row.commit_seq)) report.lost.push_back(row);
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
