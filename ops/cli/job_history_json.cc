#include "ops/cli/job_history_json.h"

#include <fmt/format.h>

#include <limits>
#include <nlohmann/json.hpp>

#include "comm/base/clock.h"
#include "comm/run/nearest_word.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/http/documents.h"
#include "coordinator/store/record_store.h"
#include "ops/cli/coordinator_store.h"
#include "ops/cli/output.h"

namespace penstock {

namespace {

Result<std::vector<Json>> events_of(const RecordStore& store, JobId job) {
  const std::string prefix = job_event_prefix(job);
  PENSTOCK_TRY_ASSIGN(const auto records,
                      store.scan(prefix, prefix, std::numeric_limits<size_t>::max()));
  std::vector<JobEvent> events;
  for (const Record& record : records) {
    Result<JobEvent> event = decode_event(record.value);
    if (!event.ok()) return event.status().with_context(record.key);
    events.push_back(*std::move(event));
  }
  const Json list = Json::parse(event_list_document(events, 0, true));
  return list.at("items").get<std::vector<Json>>();
}

}  // namespace

Result<JobHistory> read_history(const Client& client, const std::string& name_or_id) {
  JobHistory history;
  PENSTOCK_TRY_ASSIGN(history.job, client.job(name_or_id));
  const std::string id = field_text(history.job, "id");
  PENSTOCK_TRY_ASSIGN(history.events, client.all_items(job_path(id, "/events")));
  PENSTOCK_TRY_ASSIGN(const Json workers, client.get("/api/v1/workers"));
  for (const Json& worker : workers.value("items", Json::array())) {
    history.hosts[field_string(worker, "name")] = field_string(worker, "host");
  }
  return history;
}

Result<JobHistory> read_history(const Path& state_dir, const std::string& name_or_id) {
  PENSTOCK_TRY_ASSIGN(const auto store, open_coordinator_store(state_dir));
  PENSTOCK_TRY_ASSIGN(const StoredState stored, read_stored_state(*store));
  // As a coordinator begins; what it would do first is not done.
  Coordinator core(CoreConfig{.checkpoint_root = {}});
  PENSTOCK_TRY(core.start(wall_now(), stored).status());
  const Job* job = core.find_job(name_or_id);
  if (job == nullptr) {
    std::vector<std::string> names;
    for (const auto& [id, known] : core.jobs()) names.push_back(known.record.name);
    return not_found(fmt::format("no job \"{}\" in {}{}", name_or_id, state_dir.string(),
                                 did_you_mean(name_or_id, names)));
  }
  JobHistory history;
  history.job = Json::parse(job_document(core, *job));
  PENSTOCK_TRY_ASSIGN(history.events, events_of(*store, job->record.id));
  return history;
}

}  // namespace penstock
