// A RecordStore in memory, whose writes can be made to fail.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "coordinator/store/record_store.h"

namespace penstock {

class MemoryStore : public RecordStore {
 public:
  using RecordStore::write;
  Status write(const std::vector<Record>& records, const std::vector<std::string>& erased,
               bool sync) override {
    if (!next_write.ok()) return next_write;
    for (const std::string& prefix : erased) {
      std::erase_if(map, [&](const auto& entry) { return entry.first.starts_with(prefix); });
    }
    for (const Record& record : records) map[record.key] = record.value;
    synced_writes += sync;
    return {};
  }
  Result<std::vector<Record>> scan(std::string_view prefix, std::string_view from,
                                   size_t limit) const override {
    std::vector<Record> records;
    for (auto at = map.lower_bound(std::string(std::max(prefix, from)));
         at != map.end() && at->first.starts_with(prefix) && records.size() < limit; ++at) {
      records.push_back({at->first, at->second});
    }
    return records;
  }
  Result<std::optional<Record>> last(std::string_view prefix) const override {
    std::optional<Record> found;
    for (auto at = map.lower_bound(std::string(prefix));
         at != map.end() && at->first.starts_with(prefix); ++at) {
      found = Record{at->first, at->second};
    }
    return found;
  }

  std::unique_ptr<const RecordReader> snapshot() const override {
    auto copy = std::make_unique<MemoryStore>();
    copy->map = map;
    return copy;
  }

  std::map<std::string, std::string> map;
  int synced_writes = 0;
  Status next_write;  // what write() answers when not ok
};

}  // namespace penstock
