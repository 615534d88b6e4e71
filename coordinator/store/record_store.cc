#include "coordinator/store/record_store.h"

#include <algorithm>
#include <limits>
#include <map>

namespace penstock {

StepsRead read_steps(const RecordReader& store, const ReadSteps& read) {
  StepsRead result{.job = read.job,
                   .epoch = read.epoch,
                   .first = read.first,
                   .last = read.last,
                   .status = {},
                   .steps = {}};
  const std::string prefix = step_prefix(read.job);
  const auto count = static_cast<size_t>(std::max<int64_t>(0, read.last - read.first + 1));
  std::map<int64_t, StepRecord> newest;
  for (uint32_t epoch = read.epoch.value; epoch > 0 && newest.size() < count; --epoch) {
    const StepRecord from{.job = read.job, .epoch = {epoch}, .step = read.first};
    const std::string key = prefix + key_number(from.cursor());
    const std::string of_epoch =
        key.substr(0, key.size() - 8);  // a cursor's lower half is the step
    const auto records = store.scan(of_epoch, key, count);
    if (!records.ok()) {
      result.status = records.status();
      return result;
    }
    for (const Record& record : *records) {
      const Result<StepRecord> step = decode_step(record.value);
      if (!step.ok()) {
        result.status = step.status().with_context(record.key);
        return result;
      }
      if (step->step > read.last) break;
      if (!step->in_proof) newest.emplace(step->step, *step);
    }
  }
  for (auto& [number, step] : newest) result.steps.push_back(std::move(step));
  return result;
}

Result<StoredState> read_stored_state(const RecordReader& store) {
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
