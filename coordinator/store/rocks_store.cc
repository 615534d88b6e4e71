#include <fmt/format.h>
#include <rocksdb/db.h>
#include <rocksdb/snapshot.h>
#include <rocksdb/write_batch.h>

#include "coordinator/store/record_store.h"

namespace penstock {
namespace {

constexpr std::string_view kFormatKey = "meta/format";
constexpr std::string_view kFormat = "1";

Status from_rocksdb(const rocksdb::Status& status, const std::string& path, std::string_view what) {
  if (status.ok()) return {};
  const std::string message = fmt::format("state store {}: {}: {}", path, what, status.ToString());
  if (status.IsIOError() && message.find("lock") != std::string::npos) {
    return already_exists(fmt::format("state directory {} is in use by another coordinator", path));
  }
  if (status.IsCorruption()) {
    return data_loss(message +
                     "; restore the directory from a copy, or start with an empty one "
                     "(checkpoints are not in it and stay)");
  }
  if (status.IsNoSpace()) return resource_exhausted(message);
  return internal_error(message);
}

rocksdb::Options store_options() {
  rocksdb::Options options;
  options.create_if_missing = true;
  options.paranoid_checks = true;
  // The default mode silently drops what was acknowledged after one flipped bit of the log.
  options.wal_recovery_mode = rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
  options.write_buffer_size = 4 << 20;
  options.max_open_files = 64;
  options.keep_log_file_num = 2;
  options.info_log_level = rocksdb::InfoLogLevel::WARN_LEVEL;
  return options;
}

std::string_view view(const rocksdb::Slice& slice) {
  return {slice.data(), slice.size()};
}
rocksdb::Slice slice(std::string_view text) {
  return {text.data(), text.size()};
}

Result<std::vector<Record>> scan_records(rocksdb::DB& db, const rocksdb::ReadOptions& options,
                                         const std::string& path, std::string_view prefix,
                                         std::string_view from, size_t limit) {
  const std::unique_ptr<rocksdb::Iterator> at(db.NewIterator(options));
  std::vector<Record> records;
  for (at->Seek(slice(std::max(prefix, from)));
       at->Valid() && view(at->key()).starts_with(prefix) && records.size() < limit; at->Next()) {
    records.push_back({at->key().ToString(), at->value().ToString()});
  }
  PENSTOCK_TRY(from_rocksdb(at->status(), path, "read"));
  return records;
}

Result<std::optional<Record>> last_record(rocksdb::DB& db, const rocksdb::ReadOptions& options,
                                          const std::string& path, std::string_view prefix) {
  const std::unique_ptr<rocksdb::Iterator> at(db.NewIterator(options));
  // No key has a byte above 0x7f, so this comes right after the prefix's last key.
  at->SeekForPrev(std::string(prefix) + '\xff');
  PENSTOCK_TRY(from_rocksdb(at->status(), path, "read"));
  if (!at->Valid() || !view(at->key()).starts_with(prefix)) return std::optional<Record>();
  return std::optional<Record>({at->key().ToString(), at->value().ToString()});
}

class RocksSnapshot : public RecordReader {
 public:
  RocksSnapshot(rocksdb::DB* db, std::string path)
      : path_(std::move(path)), snapshot_(db), db_(*db) {
    options_.snapshot = snapshot_.snapshot();
  }

  Result<std::vector<Record>> scan(std::string_view prefix, std::string_view from,
                                   size_t limit) const override {
    return scan_records(db_, options_, path_, prefix, from, limit);
  }
  Result<std::optional<Record>> last(std::string_view prefix) const override {
    return last_record(db_, options_, path_, prefix);
  }

 private:
  const std::string path_;
  rocksdb::ManagedSnapshot snapshot_;
  rocksdb::ReadOptions options_;
  rocksdb::DB& db_;
};

class RocksStore : public RecordStore {
 public:
  RocksStore(std::unique_ptr<rocksdb::DB> db, std::string path)
      : db_(std::move(db)), path_(std::move(path)) {}

  Status check_format() {
    std::string found;
    const rocksdb::Status read = db_->Get({}, slice(kFormatKey), &found);
    if (read.IsNotFound()) return write({{std::string(kFormatKey), std::string(kFormat)}}, true);
    PENSTOCK_TRY(from_rocksdb(read, path_, "read the format"));
    if (found == kFormat) return {};
    return failed_precondition(fmt::format(
        "state store {} has format {}, this coordinator reads {}", path_, found, kFormat));
  }

  using RecordStore::write;
  Status write(const std::vector<Record>& records, const std::vector<std::string>& erased,
               bool sync) override {
    rocksdb::WriteBatch batch;
    for (const std::string& prefix : erased) {  // no key has a byte above 0x7f
      PENSTOCK_TRY(from_rocksdb(batch.DeleteRange(prefix, prefix + '\xff'), path_, "erase"));
    }
    for (const Record& record : records) {
      PENSTOCK_TRY(from_rocksdb(batch.Put(record.key, record.value), path_, "write"));
    }
    rocksdb::WriteOptions options;
    options.sync = sync;
    return from_rocksdb(db_->Write(options, &batch), path_, "write");
  }

  Result<std::vector<Record>> scan(std::string_view prefix, std::string_view from,
                                   size_t limit) const override {
    return scan_records(*db_, {}, path_, prefix, from, limit);
  }
  Result<std::optional<Record>> last(std::string_view prefix) const override {
    return last_record(*db_, {}, path_, prefix);
  }
  std::unique_ptr<const RecordReader> snapshot() const override {
    return std::make_unique<RocksSnapshot>(db_.get(), path_);
  }

 private:
  const std::unique_ptr<rocksdb::DB> db_;
  const std::string path_;
};

// RocksDB reads the log again into memory, and then refuses writes itself.
Result<std::unique_ptr<rocksdb::DB>> open_for_reading(const std::string& path) {
  // A coordinator that runs may replace a file between the listing and the reading of it.
  constexpr int kAttemptsMax = 5;
  rocksdb::Status status;
  for (int attempt = 0; attempt < kAttemptsMax; ++attempt) {
    rocksdb::Options options = store_options();
    options.create_if_missing = false;
    rocksdb::DB* opened = nullptr;
    status = rocksdb::DB::OpenForReadOnly(options, path, &opened);
    if (status.ok()) return std::unique_ptr<rocksdb::DB>(opened);
    if (!status.IsPathNotFound() && !status.IsIOError()) break;
  }
  return from_rocksdb(status, path, "open for reading");
}

}  // namespace

Result<std::unique_ptr<RecordStore>> open_rocks_store(const Path& directory) {
  rocksdb::DB* opened = nullptr;
  const rocksdb::Status status = rocksdb::DB::Open(store_options(), directory.string(), &opened);
  std::unique_ptr<rocksdb::DB> db(opened);
  PENSTOCK_TRY(from_rocksdb(status, directory.string(), "open"));
  auto store = std::make_unique<RocksStore>(std::move(db), directory.string());
  PENSTOCK_TRY(store->check_format());
  return std::unique_ptr<RecordStore>(std::move(store));
}

Result<std::unique_ptr<RecordStore>> open_rocks_store_for_reading(const Path& directory) {
  std::error_code error;
  if (!std::filesystem::exists(directory / "CURRENT", error)) {
    return not_found(fmt::format("there is no coordinator's store in {}", directory.string()));
  }
  PENSTOCK_TRY_ASSIGN(auto db, open_for_reading(directory.string()));
  auto store = std::make_unique<RocksStore>(std::move(db), directory.string());
  PENSTOCK_TRY(store->check_format());
  return std::unique_ptr<RecordStore>(std::move(store));
}

}  // namespace penstock
