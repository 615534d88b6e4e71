// The coordinator's records on disk: an ordered map of keys to values (keys:
// coordinator/core/records.h), written in atomic batches. An interface, so that tests run on a map
// in memory. RocksDB is confined to rocks_store.cc.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "comm/base/file.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/core/records.h"

namespace penstock {

// Thread-safe.
class RecordReader {
 public:
  virtual ~RecordReader() = default;

  // Records whose keys start with `prefix`, ascending, from the first key >= `from`, at most
  // `limit`.
  virtual Result<std::vector<Record>> scan(std::string_view prefix, std::string_view from,
                                           size_t limit) const = 0;
  // The last record whose key starts with `prefix`.
  virtual Result<std::optional<Record>> last(std::string_view prefix) const = 0;
};

// Thread-safe for reading; one thread writes.
class RecordStore : public RecordReader {
 public:
  // All of them or none. With `sync` they, and every batch before, survive a crash of the host once
  // this returns; without, they survive a crash of the process.
  Status write(const std::vector<Record>& records, bool sync) { return write(records, {}, sync); }
  // The same, after every record whose key starts with one of `erased` is gone.
  virtual Status write(const std::vector<Record>& records, const std::vector<std::string>& erased,
                       bool sync) = 0;
  // The records as they are now, whatever is written later. Ends before the store does.
  virtual std::unique_ptr<const RecordReader> snapshot() const = 0;
};

// What a store keeps of itself, which is no record: what it is written in.
inline constexpr std::string_view kStoreOwnPrefix = "meta/";

// Opens or creates the store in `directory`. kAlreadyExists when another coordinator has it open;
// kDataLoss when it is damaged, with what to do.
Result<std::unique_ptr<RecordStore>> open_rocks_store(const Path& directory);

// The store as it was at this moment, for reading alone: writes fail. Takes no lock and changes
// nothing on disk, so a coordinator may have it open. kNotFound when there is none.
Result<std::unique_ptr<RecordStore>> open_rocks_store_for_reading(const Path& directory);

// Carries the effect out: newest epochs first, so that what it reads is bounded by the steps asked
// for and the number of epochs.
StepsRead read_steps(const RecordReader& store, const ReadSteps& read);

// What Coordinator::start() needs.
Result<StoredState> read_stored_state(const RecordReader& store);

}  // namespace penstock
