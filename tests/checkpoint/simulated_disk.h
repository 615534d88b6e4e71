// A disk under the checkpoint store that fails the n-th change, stops there like a killed process,
// or loses power: then data that was not synced, and names whose directory was not synced, are lost
// at random.
#pragma once

#include <map>
#include <set>
#include <vector>

#include "checkpoint/file_system.h"
#include "comm/base/random.h"

namespace penstock::checkpoint_test {

class SimulatedDisk : public FileSystem {
 public:
  // Deleted files wait in `graveyard`, for power loss may bring them back.
  explicit SimulatedDisk(Path graveyard) : graveyard_(std::move(graveyard)) {}

  // The call with this number (1 is the first) fails with `code`; 0: none.
  void fail_call(int64_t number, Code code) {
    failing_call_ = number;
    failing_code_ = code;
  }
  // From this call on everything fails: the process is gone.
  void crash_at(int64_t number) { crashing_call_ = number; }
  // Broken disks, to see that the tests notice: syncs that do nothing but say ok.
  void ignore_file_syncs() { file_syncs_work_ = false; }
  void ignore_directory_syncs() { directory_syncs_work_ = false; }

  int64_t call_count() const { return call_count_; }
  bool crashed() const { return crashing_call_ != 0 && call_count_ >= crashing_call_; }

  // Undoes a random part of what was not synced. Call once, after the crash.
  void lose_power(uint64_t seed);

  Result<std::unique_ptr<WritableFile>> create(const Path& path) override;
  Status rename_no_replace(const Path& from, const Path& to) override;
  Status remove(const Path& path) override;
  Status sync_directory(const Path& directory) override;

 private:
  friend class SimulatedFile;
  enum class Kind { kCreate, kRename, kRemove };
  struct NameChange {
    Kind kind;
    Path path;
    Path other;  // renamed to, or where the removed file waits
  };

  // Counts a call and decides whether it fails.
  Status next_call(const std::string& what);
  void damage(const Path& path, Random& random) const;

  const Path graveyard_;
  int64_t call_count_ = 0;
  int64_t failing_call_ = 0;
  Code failing_code_ = Code::kInternal;
  int64_t crashing_call_ = 0;
  bool file_syncs_work_ = true;
  bool directory_syncs_work_ = true;
  std::set<Path> unsynced_files_;
  std::vector<NameChange> unsynced_names_;
};

}  // namespace penstock::checkpoint_test
