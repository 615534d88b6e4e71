#include "coordinator/http/documents.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "comm/base/version.h"

namespace penstock {
namespace {

using nlohmann::json;

std::string dump(const json& value) {
  return value.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
}

json document(const char* kind) {
  return {{"apiVersion", "penstock/v1"}, {"kind", kind}};
}

json time_of(const std::optional<Instant>& at) {
  return at ? json(format_utc(*at)) : json();
}
json time_of(Instant at) {
  return at.nanoseconds == 0 ? json() : json(format_utc(at));
}
json number(std::optional<double> value) {
  return value && std::isfinite(*value) ? json(*value) : json();
}

std::string rank_state_name(const Job& job, const RankView& rank) {
  if (rank.finished) return "finished";
  if (!wants_ranks(job.record.state) || rank.missing_since) return "gone";
  switch (rank.state) {
    case RankState::kStarting:
      return "starting";
    case RankState::kReady:
      return "ready";
    case RankState::kTraining:
      return "training";
    case RankState::kFinished:
      return "finished";
  }
  return "gone";
}

json ranks_of(const Coordinator& core, const Job& job) {
  json ranks = json::array();
  for (size_t i = 0; i < job.record.placement.size(); ++i) {
    const RankPlacement& at = job.record.placement[i];
    const Worker* worker = core.find_worker(at.worker);
    ranks.push_back({{"rank", i},
                     {"worker", worker->record.name},
                     {"host", worker->host},
                     {"device", at.device},
                     {"state", rank_state_name(job, job.ranks[i])},
                     {"step", job.ranks[i].step}});
  }
  return ranks;
}

json evaluations_of(const Job& job) {
  json items = json::array();
  for (const EvaluationRecord& evaluation : job.evaluations) {
    items.push_back({{"step", evaluation.step},
                     {"epoch", evaluation.epoch.value},
                     {"loss", number(evaluation.loss)},
                     {"tokens", evaluation.tokens},
                     {"time", time_of(evaluation.received)}});
  }
  return items;
}

json checkpoint_of(const JobRecord& record) {
  if (!record.checkpoint) return {};
  const CheckpointRecord& checkpoint = *record.checkpoint;
  return {{"step", checkpoint.step},
          {"path", record.checkpoint_dir},
          {"manifest", checkpoint.manifest},
          {"bytes", checkpoint.bytes},
          {"time", time_of(checkpoint.committed)},
          {"weights_digest",
           checkpoint.weights_digest.empty() ? json() : json(checkpoint.weights_digest)}};
}

json data_of(const Job& job) {
  json items = json::array();
  for (const DataIdentity& found : job.data) {
    items.push_back(
        {{"path", found.path}, {"tokens", found.tokens}, {"digest", to_hex(found.digest)}});
  }
  return items;
}

json failure_of(const JobRecord& record) {
  if (!record.last_failure) return {};
  const Failure& failure = *record.last_failure;
  return {{"code", failure.reason.code},
          {"message", failure.reason.message},
          {"log_tail", failure.reason.log_tail},
          {"rank", failure.rank ? json(failure.rank->value) : json()},
          {"worker", failure.worker.empty() ? json() : json(failure.worker)},
          {"step", failure.step}};
}

// How often the state is saved; where the coordinator chose it, why.
json interval_of(const Job& job) {
  const auto& saving = job.record.saving;
  if (!saving) return {{"automatic", false}, {"steps", job.spec.checkpoint.interval}};
  const SaveMeasurements& measured = saving->measured;
  return {{"automatic", true},
          {"steps", saving->choice.steps},
          {"reason", saving->choice.reason},
          {"overhead", number(saving->choice.overhead)},
          {"max_overhead", job.spec.checkpoint.max_overhead},
          {"step_seconds", number(measured.step_seconds)},
          {"stall_seconds", number(measured.stall_seconds)},
          {"slowdown_seconds", number(measured.slowdown_seconds)},
          {"save_seconds", number(measured.save_seconds)},
          {"mtbf_seconds", number(saving->choice.mtbf_seconds)},
          {"failures", measured.failure_count},
          {"training_seconds", number(measured.training_seconds)}};
}

json guards_of(const JobRecord& record) {
  json rollbacks = json::array();
  for (const Rollback& rollback : record.guards.rolled_back) {
    rollbacks.push_back({{"first", rollback.steps.first}, {"last", rollback.steps.last}});
  }
  return {{"warnings", record.guards.warnings},
          {"skipped_steps", record.guards.skips},
          {"rollbacks", std::move(rollbacks)}};
}

json guard_of(const StepRecord& step) {
  if (step.guard == GuardFinding()) return {};
  return {{"signal", to_string(step.guard.signal)},
          {"action", to_string(step.guard.action)},
          {"value", number(step.guard.value)},
          {"median", number(step.guard.median)},
          {"limit", number(step.guard.limit)}};
}

json slow_ranks_of(const Coordinator& core, const Job& job) {
  json items = json::array();
  for (const auto& [rank, slow] : job.slow) {
    const WorkerId worker = job.record.placement[static_cast<size_t>(rank.value)].worker;
    items.push_back({{"rank", rank.value},
                     {"worker", core.find_worker(worker)->record.name},
                     {"since_step", slow.since_step},
                     {"ratio", number(slow.ratio)},
                     {"busy_seconds", number(slow.busy_seconds)},
                     {"usual_seconds", number(slow.usual_seconds)},
                     {"message", slow.words}});
  }
  return items;
}

json proof_of(const JobRecord& record) {
  if (!record.proof) return {};
  const ProofRecord& proof = *record.proof;
  return {{"steps", proof.steps},
          {"from", proof.from},
          {"through", proof.through},
          {"compared", proof.compared}};
}

json layout_of(const Job& job) {
  const ParallelismSpec& grid = job.spec.parallelism;
  return {{"pipeline", grid.pipeline},
          {"expert", grid.expert},
          {"data", grid.data},
          {"schedule", to_string(grid.schedule)},
          {"microbatches", grid.microbatches},
          {"micro_batch_size", grid.micro_batch_size}};
}

// Where the run is. After a restore the newest step reported may be ahead of that.
int64_t step_of(const JobRecord& record) {
  if (is_final(record.state)) return record.highest_step;
  if (record.last_step && record.last_step->epoch == record.epoch) return record.last_step->step;
  // Of a job that waits, restore_step is where the attempt before began.
  const bool begins_later = !wants_ranks(record.state) && record.checkpoint;
  return begins_later ? std::max(record.restore_step, record.checkpoint->step)
                      : record.restore_step;
}

json job_body(const Coordinator& core, const Job& job) {
  const JobRecord& record = job.record;
  const int64_t step = step_of(record);
  const bool has_loss = record.last_step && record.last_step->step == step;
  return {{"id", record.id.value},
          {"name", record.name},
          {"state", job_state_name(record.state)},
          {"reason", {{"code", record.reason.code}, {"message", record.reason.message}}},
          {"step", step},
          {"target_steps", record.target_steps},
          {"first_step", record.restore_step + 1},
          {"highest_step", record.highest_step},
          {"loss", has_loss ? number(record.last_step->loss) : json()},
          {"tokens", job.spec.tokens_through(step)},
          {"tokens_per_second", number(job.tokens_per_second())},
          {"eta_seconds", number(job.eta_seconds())},
          {"world_size", job.world_size()},
          {"layout", layout_of(job)},
          {"scale_requested", record.scale_to > 0 ? json(record.scale_to) : json()},
          {"epoch", record.epoch.value},
          {"restarts", record.restarts},
          {"failures", record.failures},
          {"max_restarts", job.spec.recovery.max_restarts},
          {"created", time_of(record.created)},
          {"started", time_of(record.started)},
          {"finished", time_of(record.finished)},
          {"ranks", ranks_of(core, job)},
          {"data", data_of(job)},
          {"checkpoint", checkpoint_of(record)},
          {"mirrored_step", job.mirror.kept_step > 0 ? json(job.mirror.kept_step) : json()},
          {"evaluations", evaluations_of(job)},
          {"suspend_requested", record.suspend},
          {"rebalance_requested", record.rebalance},
          {"checkpoint_interval", interval_of(job)},
          {"proof", proof_of(record)},
          {"guards", guards_of(record)},
          {"slow_ranks", slow_ranks_of(core, job)},
          {"last_failure", failure_of(record)},
          {"checkpoint_dir", record.checkpoint_dir}};
}

json list(const char* kind, json items) {
  json body = document(kind);
  body["items"] = std::move(items);
  return body;
}

json page_of(const char* kind, json items, uint64_t next_after, bool terminal) {
  json body = list(kind, std::move(items));
  body["next_after"] = next_after;
  body["terminal"] = terminal;
  return body;
}

const char* worker_state_name(const Coordinator& core, const Worker& worker) {
  if (worker.state != WorkerState::kUp) return worker.leaving ? "left" : "lost";
  if (worker.leaving) return "leaving";
  if (worker.record.drain) return worker.record.drain_done ? "drained" : "draining";
  if (core.is_silent(worker)) return "silent";
  if (worker.record.quarantine) return "quarantined";
  return worker.record.check_due ? "checking" : "up";
}

json quarantine_json(const Worker& worker) {
  const auto& quarantine = worker.record.quarantine;
  if (!quarantine) return json();
  return {{"code", quarantine->reason.code},
          {"reason", quarantine->reason.message},
          {"by", quarantine->by_user ? "user" : "coordinator"},
          {"since", time_of(quarantine->since)},
          {"until", quarantine->until ? json(time_of(*quarantine->until)) : json()},
          {"releasing", quarantine->releasing}};
}

json evidence_json(const Worker& worker) {
  json items = json::array();
  for (const HostEvidence& evidence : worker.record.evidence) {
    items.push_back({{"time", time_of(evidence.at)},
                     {"code", evidence.code},
                     {"job", evidence.job.value},
                     {"epoch", evidence.epoch.value},
                     {"rank", evidence.rank ? json(evidence.rank->value) : json()},
                     {"step", evidence.step},
                     {"message", evidence.message}});
  }
  return items;
}

json worker_body(const Coordinator& core, const Worker& worker) {
  json ranks = json::array();
  for (const HostedRank& hosted : worker.hosted) {
    const Job& job = *core.find_job(hosted.job);
    const RankView& rank = job.ranks[hosted.rank.value];
    ranks.push_back({{"job", hosted.job.value},
                     {"name", job.record.name},
                     {"epoch", job.record.epoch.value},
                     {"rank", hosted.rank.value},
                     {"device", hosted.device},
                     {"state", rank_state_name(job, rank)},
                     {"step", rank.step}});
  }
  const bool usable = worker.takes_ranks();
  const WorkerId id = worker.record.id;
  return {{"id", id.value},
          {"name", worker.record.name},
          {"host", worker.host},
          {"state", worker_state_name(core, worker)},
          {"silent_since", core.is_silent(worker) ? json(time_of(worker.last_seen)) : json()},
          {"drain_reason", worker.record.drain ? json(*worker.record.drain) : json()},
          {"quarantine", quarantine_json(worker)},
          {"host_failures", evidence_json(worker)},
          {"devices", worker.record.device_count},
          {"free_devices", usable ? core.free_devices(id).size() : 0},
          {"device_kind", worker.device_kind},
          {"incarnation", fmt::format("{:016x}", worker.record.incarnation)},
          {"http_address", worker.http_address},
          {"last_heartbeat", time_of(worker.last_seen)},
          {"clock_offset_seconds",
           worker.clock_behind ? json(-to_seconds(*worker.clock_behind)) : json()},
          {"ranks", std::move(ranks)}};
}

std::string html_escape(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    switch (c) {
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '&':
        escaped += "&amp;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      default:
        escaped += c;
    }
  }
  return escaped;
}

}  // namespace

std::string job_document(const Coordinator& core, const Job& job) {
  json body = document("Job");
  body.update(job_body(core, job));
  return dump(body);
}

std::string backup_document(const BackupPiece& piece) {
  json body = document("Backup");
  body["backup"] = piece.id;
  body["text"] = piece.text;
  body["next_offset"] = piece.next_offset;
  body["done"] = piece.done;
  return dump(body);
}

std::string removed_job_document(JobId job, const std::string& name, bool checkpoints) {
  json body = document("RemovedJob");
  body["job"] = job.value;
  body["name"] = name;
  body["checkpoints_removed"] = checkpoints;
  return dump(body);
}

std::string job_list_document(const Coordinator& core, const std::vector<const Job*>& jobs) {
  json items = json::array();
  for (const Job* job : jobs) items.push_back(job_body(core, *job));
  return dump(list("JobList", std::move(items)));
}

std::string worker_list_document(const Coordinator& core) {
  json items = json::array();
  for (const auto& [id, worker] : core.workers()) items.push_back(worker_body(core, worker));
  return dump(list("WorkerList", std::move(items)));
}

std::string worker_document(const Coordinator& core, const Worker& worker) {
  json body = document("Worker");
  body.update(worker_body(core, worker));
  return dump(body);
}

std::string event_list_document(const std::vector<JobEvent>& events, uint64_t next_after,
                                bool terminal) {
  json items = json::array();
  for (const JobEvent& event : events) {
    const bool of_job = event.job.value != 0;
    items.push_back({{"sequence", event.sequence},
                     {"time", time_of(event.at)},
                     {"actor", event.actor},
                     {"job", of_job ? json(event.job.value) : json()},
                     {"name", of_job ? json(event.job_name) : json()},
                     {"epoch", of_job ? json(event.epoch.value) : json()},
                     {"rank", event.rank ? json(event.rank->value) : json()},
                     {"state", event.state ? json(job_state_name(*event.state)) : json()},
                     {"from", event.from ? json(job_state_name(*event.from)) : json()},
                     {"code", event.reason.code},
                     {"message", event.reason.message},
                     {"log_tail", event.reason.log_tail}});
  }
  return dump(page_of("EventList", std::move(items), next_after, terminal));
}

std::string step_list_document(const std::vector<StepRecord>& steps, uint64_t next_after,
                               bool terminal) {
  json items = json::array();
  for (const StepRecord& step : steps) {
    const double rate =
        step.step_seconds > 0 ? static_cast<double>(step.tokens) / step.step_seconds : 0.0;
    items.push_back({{"cursor", step.cursor()},
                     {"step", step.step},
                     {"epoch", step.epoch.value},
                     {"loss", number(step.loss)},
                     {"grad_norm", number(step.grad_norm)},
                     {"learning_rate", number(step.learning_rate)},
                     {"tokens", step.tokens},
                     {"step_seconds", number(step.step_seconds)},
                     {"tokens_per_second", number(rate)},
                     {"expert_load_max_ratio", number(step.expert_load_max_ratio)},
                     {"mtp_loss", number(step.mtp_loss)},
                     {"balance_loss", number(step.balance_loss)},
                     {"checkpoint_seconds", number(step.checkpoint_seconds)},
                     {"replayed", step.replayed},
                     {"guard", guard_of(step)},
                     {"time", time_of(step.finished)}});
  }
  return dump(page_of("StepList", std::move(items), next_after, terminal));
}

std::string evaluation_list_document(const Job& job) {
  return dump(list("EvaluationList", evaluations_of(job)));
}

std::string checkpoint_list_document(const Job& job, const std::vector<ListedCheckpoint>& listed) {
  json items = json::array();
  for (const ListedCheckpoint& checkpoint : listed) {
    const auto& newest = job.record.checkpoint;
    const bool is_newest = newest && newest->manifest == checkpoint.manifest;
    const bool digest_known = is_newest && !newest->weights_digest.empty();
    items.push_back({{"step", checkpoint.step},
                     {"epoch", checkpoint.epoch.value},
                     {"manifest", checkpoint.manifest},
                     {"bytes", checkpoint.bytes},
                     {"time", time_of(checkpoint.created)},
                     {"weights_digest", digest_known ? json(newest->weights_digest) : json()},
                     {"pinned", checkpoint.pinned},
                     {"damaged", !checkpoint.damage.empty()},
                     {"damage", checkpoint.damage.empty() ? json() : json(checkpoint.damage)}});
  }
  return dump(list("CheckpointList", std::move(items)));
}

std::string rebalance_document(const Job& job, const ExpertBalance& balance) {
  json items = json::array();
  for (const auto& [layer, of_layer] : balance.layers) {
    items.push_back({{"layer", layer},
                     {"imbalance_before", of_layer.before},
                     {"imbalance_after", of_layer.after},
                     {"moved", of_layer.moved}});
  }
  json body = list("Rebalance", std::move(items));
  body["job"] = job.record.id.value;
  body["name"] = job.record.name;
  body["measured_step"] = job.loads_step;
  body["requested"] = job.record.rebalance;
  body["imbalance_before"] = balance.before();
  body["imbalance_after"] = balance.after();
  body["gain"] = balance.gain();
  body["moved"] = balance.moved();
  body["experts"] = balance.layers.size() * static_cast<size_t>(job.spec.model.n_routed_experts);
  return dump(body);
}

std::string log_document(JobId job, Rank rank, uint64_t offset, const LogText& log, bool terminal) {
  json body = document("LogChunk");
  body["job"] = job.value;
  body["rank"] = rank.value;
  body["offset"] = offset;
  body["next_offset"] = log.next_offset;
  body["text"] = log.text;
  body["terminal"] = terminal;
  return dump(body);
}

std::string version_document() {
  json body = document("Version");
  body["version"] = kVersion;
  body["protocol"] = kProtocolVersion;
  return dump(body);
}

std::string targets_document(const Coordinator& core) {
  json targets = json::array();
  for (const auto& [id, worker] : core.workers()) {
    if (worker.state != WorkerState::kUp || worker.http_address.empty()) continue;
    targets.push_back(
        {{"targets", {worker.http_address}}, {"labels", {{"penstock_node", worker.record.name}}}});
  }
  return dump(targets);
}

std::string page_document(const Coordinator& core) {
  std::string rows;
  for (auto job = core.jobs().rbegin(); job != core.jobs().rend(); ++job) {
    const JobRecord& record = job->second.record;
    const std::string loss =
        record.last_step ? fmt::format("{:.4f}", record.last_step->loss) : std::string("-");
    rows += fmt::format(
        "<tr><td>{0}</td><td><a href=\"api/v1/jobs/{0}\">{1}</a></td><td>{2}</td><td>{3} / {4}</td>"
        "<td>{5}</td><td>{6}</td><td><a href=\"api/v1/jobs/{0}/events\">events</a> "
        "<a href=\"api/v1/jobs/{0}/steps\">steps</a> <a "
        "href=\"api/v1/jobs/{0}/logs?rank=0\">log</a>"
        "</td></tr>\n",
        record.id, html_escape(record.name), job_state_name(record.state), record.highest_step,
        record.target_steps, loss, html_escape(record.reason.message));
  }
  std::string workers;
  for (const auto& [id, worker] : core.workers()) {
    workers += fmt::format("<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>\n",
                           html_escape(worker.record.name), html_escape(worker.host),
                           worker_state_name(core, worker), worker.record.device_count);
  }
  return fmt::format(
      "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>Penstock</title>"
      "<style>body{{font-family:sans-serif;margin:2em}}td,th{{padding:.2em 1em .2em "
      "0;text-align:left}}"
      "</style></head><body><h1>Penstock {}</h1>\n<h2>Jobs</h2><table><tr><th>Id</th><th>Name</th>"
      "<th>State</th><th>Step</th><th>Loss</th><th>Reason</th><th></th></tr>\n{}</table>\n"
      "<h2>Workers</h2><table><tr><th>Name</th><th>Host</th><th>State</th><th>Devices</th></tr>\n{}"
      "</table>\n<p><a href=\"metrics\">metrics</a> <a href=\"openapi.json\">API</a> "
      "<a href=\"api/v1/events\">events</a></p></body></html>\n",
      kVersion, rows, workers);
}

}  // namespace penstock
