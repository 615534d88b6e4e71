#include "coordinator/core/restored_records.h"

#include <fmt/format.h>

#include <limits>

#include "comm/base/clock.h"

namespace penstock {
namespace {

constexpr const char* kRestored = "restored";

// Ranks are stopped by a job that stops or recovers; those are so already.
bool has_ranks_to_stop(const JobRecord& job) {
  return !job.placement.empty() && !is_final(job.state) && job.state != JobState::kStopping &&
         job.state != JobState::kRecovering;
}

}  // namespace

Result<std::vector<Record>> restored_records(const StoredState& stored, Instant taken_at,
                                             Instant now) {
  Coordinator as_it_was({});
  PENSTOCK_TRY(as_it_was.start(now, stored).status());
  const Reason reason{kRestored,
                      fmt::format("the coordinator's records were restored from a backup "
                                  "taken at {}",
                                  format_utc(taken_at))};
  std::vector<Record> records;
  uint64_t sequence = stored.last_event_sequence;
  const auto tell = [&](JobEvent event) {
    event.sequence = ++sequence;
    event.at = now;
    event.actor = "user";
    event.reason = reason;
    for (Record& record : records_of(event)) records.push_back(std::move(record));
  };
  uint64_t last_job = 0;
  for (const Record& record : stored.records) {
    if (record.key == kLastJobKey)
      last_job = std::max(last_job, decode_last_job(record.value)->value);
  }
  tell({});
  for (const auto& [id, known] : as_it_was.jobs()) {
    last_job = std::max(last_job, id.value);
    JobRecord job = known.record;
    if (job.epoch.value > std::numeric_limits<uint32_t>::max() / 2) {
      return data_loss(fmt::format("job {} is said to have been started {} times", id, job.epoch));
    }
    job.epoch.value += kRestoredEpochGap;  // one that waited may have run since
    if (has_ranks_to_stop(job)) {
      const JobState from = std::exchange(job.state, JobState::kRecovering);
      job.reason = reason;
      JobEvent event;
      event.job = id;
      event.job_name = job.name;
      event.epoch = job.epoch;
      event.state = job.state;
      event.from = from;
      tell(std::move(event));
    }
    records.push_back(record_of(job));
  }
  records.push_back(last_job_record(JobId{last_job + kRestoredJobGap}));
  return records;
}

}  // namespace penstock
