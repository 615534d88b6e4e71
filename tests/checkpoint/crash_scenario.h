// What the crash tests do over and over: a store with one checkpoint, then a second one saved,
// committed and kept alone on a simulated disk that dies, then the promises checked on the real
// one. With or without the RocksDB index beside the files.
#pragma once

#include <map>
#include <optional>

#include "checkpoint/index.h"
#include "tests/checkpoint/simulated_rocksdb.h"
#include "tests/checkpoint/support.h"

namespace penstock::checkpoint_test {

inline constexpr int64_t kOldStep = 10;
inline constexpr int64_t kNewStep = 20;

inline uint64_t version_of(int64_t step) {
  return static_cast<uint64_t>(step) / 10;
}

struct Attempt {
  bool acknowledged = false;  // commit() of kNewStep said ok
  bool finished = false;      // everything did
};

class CrashScenario {
 public:
  // With the index there are two more, older checkpoints, so that RocksDB has tables to compact.
  explicit CrashScenario(bool with_index = false);

  Path job() const { return directory_.path() / "job"; }
  Path index() const { return directory_.path() / "index"; }
  SimulatedDisk& disk() { return disk_; }
  // Saves and commits kNewStep, then keeps only it.
  Attempt run() { return run_on(disk_); }
  // The index is gone; opens a new one and fills it from the manifests.
  bool rebuild_index();
  // Opens everything and cleans up, on a disk that dies at that call and loses power.
  void crash_again(int64_t call, uint64_t seed);

  // Restarts on the real disk. What is wrong then; empty: nothing. Oracle: the newest whole
  // checkpoint is the acknowledged one or, when none was acknowledged, the old or the new one; it
  // loads byte for byte; every other one that is listed has its segments; index and files agree,
  // and still do when opened again; the store works on; space returns.
  std::string broken_promise(const Attempt& attempt);
  // Of broken_promise(): the step that was newest.
  int64_t newest_step() const { return newest_step_; }
  // What the index said when it was opened after the crash.
  const std::string& index_report() const { return index_report_; }

 private:
  Attempt run_on(SimulatedDisk& disk);
  std::string broken_index();
  std::string half_removed() const;
  std::string left_over() const;

  TempDirectory directory_{memory_directory()};
  TempDirectory graves_{memory_directory()};
  SimulatedDisk disk_;
  const bool with_index_;
  int64_t newest_step_ = 0;
  std::string index_report_;
};

// The crash point, C1 to C26 of the list of faults a store must survive, at which a scenario's run
// stops when the last of these calls is the first that fails; `torn`: half of that write is done.
// Empty for what is before the save.
std::string crash_point(const std::vector<std::string>& calls, bool torn);

// Counts what became of the runs at each crash point, for docs/checkpoint-faults.md.
class FaultTable {
 public:
  void add(const std::string& point, int64_t newest_step);
  // As properties of the running test: "C4": "24 runs, 20 old, 4 new".
  void record() const;

 private:
  struct Row {
    int64_t runs = 0;
    int64_t old_step = 0;
    int64_t new_step = 0;
  };
  std::map<std::string, Row> rows_;
};

}  // namespace penstock::checkpoint_test
