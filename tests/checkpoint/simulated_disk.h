// A disk under the checkpoint store, and under RocksDB (simulated_rocksdb.h), that fails the n-th
// change, stops there like a killed process, or loses power: then data that was not synced, and
// names whose directory was not synced, are lost at random. Equal runs make equal changes, so a
// call number and a seed repeat a run.
#pragma once

#include <functional>
#include <map>
#include <mutex>
#include <vector>

#include "checkpoint/file_system.h"
#include "comm/base/random.h"

namespace penstock::checkpoint_test {

// Thread-safe.
class SimulatedDisk : public FileSystem {
 public:
  // Deleted files wait in `graveyard`, for power loss may bring them back.
  explicit SimulatedDisk(Path graveyard) : graveyard_(std::move(graveyard)) {}

  // The call with this number (1 is the first) fails with `code`; 0: none.
  void fail_call(int64_t number, Code code) {
    failing_call_ = number;
    failing_code_ = code;
  }
  // From this call on everything fails: the process is gone. `torn`: half of it is done if it is a
  // write.
  void crash_at(int64_t number, bool torn = true) {
    crashing_call_ = number;
    torn_ = torn;
  }
  // Broken disks, to see that the tests notice: syncs that do nothing but say ok.
  void ignore_file_syncs() { file_syncs_work_ = false; }
  void ignore_directory_syncs() { directory_syncs_work_ = false; }
  // Called before each change the store makes: waits for what RocksDB does in the background, so
  // that the order of changes is the same in every run.
  void wait_before_calls(std::function<void()> wait) { wait_ = std::move(wait); }

  int64_t call_count() const { return std::ssize(calls_); }
  bool crashed() const { return crashing_call_ != 0 && call_count() >= crashing_call_; }
  bool tears_writes() const { return torn_ && crashed(); }
  // What each call was, such as "fdatasync /tmp/x/000000000002.manifest.tmp".
  const std::vector<std::string>& calls() const { return calls_; }

  // Of the started writes of one file.
  size_t most_under_way() const { return most_under_way_; }

  // Undoes a random part of what was not synced. Call once, after the crash.
  void lose_power(uint64_t seed);

  Result<std::unique_ptr<WritableFile>> create(const Path& path) override;
  Status rename_no_replace(const Path& from, const Path& to) override;
  Status remove(const Path& path) override;
  Status sync_directory(const Path& directory) override;

  // The same changes, as RocksDB makes them: each counts the call, decides whether it fails and
  // remembers what a power loss may undo.
  Status rocksdb_create(const Path& path);  // before the file is created or truncated
  Status rocksdb_write(const Path& path, uint64_t offset);  // before bytes from offset on change
  Status rocksdb_sync(const Path& path, uint64_t size);
  Status rocksdb_rename(const Path& from, const Path& to);  // renames, replacing
  Status rocksdb_remove(const Path& path);                  // removes
  Status rocksdb_create_directory(const Path& path);        // before it is created
  Status rocksdb_sync_directory(const Path& directory);

 private:
  friend class SimulatedFile;
  enum class Kind { kCreate, kRename, kRemove };
  struct NameChange {
    Kind kind;
    Path path;
    Path other;     // renamed to, or where the removed file waits
    Path replaced;  // where the file waits that had the name `other` before
  };

  // Counts a call and decides whether it fails.
  Status next_call(const std::string& what);
  void wait() const;
  Path next_grave() const { return graveyard_ / std::to_string(calls_.size()); }
  void move_unsynced(const Path& from, const Path& to);
  Status bury(const Path& path);
  void forget_unsynced_names(const Path& directory);
  static void damage(const Path& path, uint64_t synced_bytes, Random& random);

  const Path graveyard_;
  mutable std::recursive_mutex mutex_;  // guards all below
  std::function<void()> wait_;
  std::vector<std::string> calls_;
  int64_t failing_call_ = 0;
  Code failing_code_ = Code::kInternal;
  int64_t crashing_call_ = 0;
  bool torn_ = true;
  size_t most_under_way_ = 0;
  bool file_syncs_work_ = true;
  bool directory_syncs_work_ = true;
  std::map<Path, uint64_t> unsynced_files_;  // how many first bytes of each are safe
  std::vector<NameChange> unsynced_names_;
};

}  // namespace penstock::checkpoint_test
