#include "coordinator/store/backup.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <utility>

#include "comm/base/clock.h"
#include "coordinator/core/restored_records.h"
#include "coordinator/store/state_directory.h"

namespace penstock {
namespace {

using nlohmann::json;

constexpr std::string_view kFormat = "penstock-backup-1";
// A record is a spec at most, escaped.
constexpr size_t kLineBytesMax = 64 << 20;
constexpr size_t kReadBytes = 1 << 20;
// What a piece has no room for is read again with the next one, so few: most are small.
constexpr size_t kRecordsPerScan = 16;
constexpr size_t kBatchBytes = 1 << 20;

// A file's lines, of which none may be longer than a bound.
class Lines {
 public:
  static Result<Lines> open(const Path& file) {
    Lines lines;
    lines.file_ = file;
    PENSTOCK_TRY_ASSIGN(lines.fd_, open_plain_file(file, &lines.unread_));
    return lines;
  }

  // With its end; empty at the end of the file.
  Result<std::string> next() {
    ++number_;
    size_t end = pending_.find('\n', begin_);
    while (end == std::string::npos && unread_ > 0) {
      // Not for every line: each byte is moved once for each kReadBytes of its own line at most.
      pending_.erase(0, std::exchange(begin_, 0));
      if (pending_.size() > kLineBytesMax) return damaged("it is too long");
      const size_t had = pending_.size();
      pending_.resize(had + std::min<uint64_t>(unread_, kReadBytes));
      const auto into = std::as_writable_bytes(std::span(pending_)).subspan(had);
      PENSTOCK_TRY(read_at(fd_.get(), file_, offset_, into));
      offset_ += into.size();
      unread_ -= into.size();
      end = pending_.find('\n', had);
    }
    if (end == std::string::npos) {
      if (begin_ < pending_.size()) return damaged("it has no end");
      return std::string();
    }
    std::string line = pending_.substr(begin_, end + 1 - begin_);
    begin_ += line.size();
    return line;
  }

  Status damaged(std::string_view what) const {
    return data_loss(
        fmt::format("{}: line {}: {}; this is no whole backup: use another, or make one (penstock "
                    "admin backup)",
                    file_.string(), number_, what));
  }

 private:
  Path file_;
  FileDescriptor fd_;
  uint64_t offset_ = 0;  // read up to here
  uint64_t unread_ = 0;  // bytes after it
  std::string pending_;  // read
  size_t begin_ = 0;     // in it, of what is not handed out
  uint64_t number_ = 0;  // of the line handed out last
};

json parsed(const std::string& line) {
  json value = json::parse(line, nullptr, false);
  return value.is_object() ? value : json::object();
}
std::optional<std::string> text_field(const json& line, const char* name) {
  const auto at = line.find(name);
  if (at == line.end() || !at->is_string()) return std::nullopt;
  return at->get<std::string>();
}
std::optional<int64_t> number_field(const json& line, const char* name) {
  const auto at = line.find(name);
  if (at == line.end() || !at->is_number_integer()) return std::nullopt;
  return at->get<int64_t>();
}

std::string line_of(const json& value) {
  return value.dump() + '\n';
}

}  // namespace

BackupText::BackupText(std::unique_ptr<const RecordReader> records, Instant taken_at)
    : records_(std::move(records)), taken_at_(taken_at) {}

Result<std::string> BackupText::next(size_t bytes) {
  std::string text;
  if (!std::exchange(begun_, true)) {
    text = line_of({{"format", kFormat},
                    {"taken_at_ns", taken_at_.nanoseconds},
                    {"taken_at", format_utc(taken_at_)}});
  }
  while (!done_ && text.size() < bytes) {
    PENSTOCK_TRY_ASSIGN(const std::vector<Record> records,
                        records_->scan("", next_key_, kRecordsPerScan));
    size_t taken = 0;
    for (; taken < records.size() && text.size() < bytes; ++taken) {
      const Record& record = records[taken];
      next_key_ = record.key + '\0';
      if (record.key.starts_with(kStoreOwnPrefix)) continue;
      text += line_of({{"key", record.key}, {"value", record.value}});
      ++count_;
    }
    done_ = taken == records.size() && records.size() < kRecordsPerScan;
  }
  digest_.update(as_bytes(text));
  if (done_) text += line_of({{"records", count_}, {"xxh3", to_hex(digest_.finish())}});
  return text;
}

Result<BackupContents> read_backup(const Path& file,
                                   const std::function<Status(Record record)>& each) {
  PENSTOCK_TRY_ASSIGN(Lines lines, Lines::open(file));
  DigestStream digest;
  PENSTOCK_TRY_ASSIGN(std::string line, lines.next());
  const json head = parsed(line);
  const std::optional<int64_t> taken_at_ns = number_field(head, "taken_at_ns");
  if (text_field(head, "format") != kFormat || !taken_at_ns) {
    return lines.damaged("it does not begin as a backup does");
  }
  BackupContents contents{Instant{*taken_at_ns}, 0};
  std::string last_key;
  while (true) {
    digest.update(as_bytes(line));
    PENSTOCK_TRY_ASSIGN(line, lines.next());
    const json value = parsed(line);
    const std::optional<std::string> key = text_field(value, "key");
    const std::optional<std::string> text = text_field(value, "value");
    if (!key || !text) {
      const bool whole = number_field(value, "records") == static_cast<int64_t>(contents.records) &&
                         text_field(value, "xxh3") == to_hex(digest.finish());
      if (!whole) return lines.damaged("it is neither a record nor the end of those before it");
      break;
    }
    if (*key <= last_key) return lines.damaged("its key is not above the one before");
    last_key = *key;
    ++contents.records;
    PENSTOCK_TRY(each({*key, *text}));
  }
  PENSTOCK_TRY_ASSIGN(line, lines.next());
  if (!line.empty()) return lines.damaged("it comes after the end");
  return contents;
}

namespace {

// Everything that the file holds, and what a restored coordinator has to know.
Result<RestoredStore> fill(RecordStore& store, const Path& file, Instant now) {
  RestoredStore restored;
  std::vector<Record> batch;
  size_t batch_bytes = 0;
  PENSTOCK_TRY_ASSIGN(restored.backup, read_backup(file, [&](Record record) -> Status {
                        batch_bytes += record.key.size() + record.value.size();
                        batch.push_back(std::move(record));
                        if (batch_bytes < kBatchBytes) return {};
                        batch_bytes = 0;
                        return store.write(std::exchange(batch, {}), false);
                      }));
  PENSTOCK_TRY(store.write(batch, false));
  PENSTOCK_TRY_ASSIGN(StoredState stored, read_stored_state(store));
  const auto changed = restored_records(stored, restored.backup.taken_at, now);
  if (!changed.ok()) return changed.status().with_context(file.string());
  PENSTOCK_TRY(store.write(*changed, true));
  PENSTOCK_TRY_ASSIGN(stored, read_stored_state(store));
  Coordinator core({});
  PENSTOCK_TRY(core.start(now, stored).status());
  restored.jobs = core.jobs().size();
  for (const auto& [id, job] : core.jobs()) {
    const JobState state = job.record.state;
    restored.open_jobs += !is_final(state) && state != JobState::kSuspended;
  }
  return restored;
}

}  // namespace

Result<RestoredStore> restore_backup(const Path& file, const Path& state_dir, Instant now) {
  PENSTOCK_TRY_ASSIGN(const FileDescriptor lock, lock_state_directory(state_dir));
  const Path records = state_dir / kRecordsFolder;
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> found, file_names(records));
  if (!found.empty()) {
    return failed_precondition(
        fmt::format("{} holds a coordinator's records; move it away first, or restore into another "
                    "directory",
                    records.string()));
  }
  const Path partial = state_dir / kRestoringFolder;
  std::error_code error;
  const auto removed = [&](const Path& path) {
    std::filesystem::remove_all(path, error);
    return error ? errno_status(error.value(), "remove " + path.string()) : Status();
  };
  PENSTOCK_TRY(removed(partial));
  const auto restored = [&]() -> Result<RestoredStore> {
    PENSTOCK_TRY_ASSIGN(const std::unique_ptr<RecordStore> store, open_rocks_store(partial));
    return fill(*store, file, now);
  }();
  if (!restored.ok()) {
    std::filesystem::remove_all(partial, error);
    return restored;
  }
  PENSTOCK_TRY(removed(records));
  PENSTOCK_TRY(rename_no_replace(partial, records));
  PENSTOCK_TRY(sync_directory(state_dir));
  return restored;
}

}  // namespace penstock
