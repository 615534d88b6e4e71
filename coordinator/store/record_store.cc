#include "coordinator/store/record_store.h"

#include <limits>

namespace penstock {

Result<StoredState> read_stored_state(const RecordStore& store) {
  constexpr size_t kAll = std::numeric_limits<size_t>::max();
  StoredState stored;
  for (const std::string_view prefix : kStatePrefixes) {
    PENSTOCK_TRY_ASSIGN(std::vector<Record> records, store.scan(prefix, prefix, kAll));
    stored.records.insert(stored.records.end(), std::make_move_iterator(records.begin()),
                          std::make_move_iterator(records.end()));
  }
  PENSTOCK_TRY_ASSIGN(const std::optional<Record> event, store.last(kEventPrefix));
  if (event) {
    const Result<JobEvent> decoded = decode_event(event->value);
    if (!decoded.ok()) return decoded.status().with_context(event->key);
    stored.last_event_sequence = decoded->sequence;
  }
  return stored;
}

}  // namespace penstock
