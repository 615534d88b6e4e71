#include "coordinator/core/records.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

namespace penstock {
namespace {

using nlohmann::json;

constexpr std::string_view kStateNames[] = {"QUEUED",  "PLACING",    "STARTING", "LOADING",
                                            "RUNNING", "RECOVERING", "STOPPING", "SUCCEEDED",
                                            "FAILED",  "CANCELLED",  "SUSPENDED"};
static_assert(std::size(kStateNames) == std::size(kJobStates));

std::string dump(const json& value) {
  // Reasons may quote what a rank printed; bytes that are not UTF-8 are replaced.
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

// JSON has no infinities or NaN: they travel as strings.
json number(double value) {
  if (std::isfinite(value)) return value;
  return std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
}
double to_number(const json& value) {
  if (!value.is_string()) return value.get<double>();
  const auto& text = value.get_ref<const std::string&>();
  double read = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), read);
  if (error != std::errc() || end != text.data() + text.size()) {
    json::object().at("no such number: " + text);  // throws
  }
  return read;
}

// Fractions become strings, which only to_number() takes: the library would cast them to whatever
// integer is wanted, and one that does not fit is undefined.
json parse(std::string_view text) {
  return json::parse(text, [](int, json::parse_event_t event, json& value) {
    if (event == json::parse_event_t::value && value.is_number_float()) {
      value = fmt::format("{}", value.get<double>());
    }
    return true;
  });
}

json to_json(const Reason& reason) {
  json value = {{"code", reason.code}, {"message", reason.message}};
  if (!reason.log_tail.empty()) value["log_tail"] = reason.log_tail;
  return value;
}
Reason to_reason(const json& value) {
  return {value.at("code"), value.at("message"), value.value("log_tail", "")};
}

json to_json(const Failure& failure) {
  return {{"reason", to_json(failure.reason)},
          {"rank", failure.rank ? json(failure.rank->value) : json()},
          {"worker", failure.worker},
          {"step", failure.step},
          {"fatal", failure.fatal},
          {"host_suspect", failure.host_suspect}};
}
Failure to_failure(const json& value) {
  Failure failure;
  failure.reason = to_reason(value.at("reason"));
  if (!value.at("rank").is_null()) failure.rank = Rank{value.at("rank").get<int32_t>()};
  failure.worker = value.at("worker");
  failure.step = value.at("step");
  failure.fatal = value.at("fatal");
  failure.host_suspect = value.value("host_suspect", false);
  return failure;
}

json to_json(const GuardFinding& finding) {
  return {{"signal", static_cast<int>(finding.signal)},
          {"action", static_cast<int>(finding.action)},
          {"value", number(finding.value)},
          {"median", number(finding.median)},
          {"limit", number(finding.limit)}};
}
GuardFinding to_finding(const json& value) {
  return {static_cast<GuardSignal>(value.at("signal").get<uint8_t>()),
          static_cast<GuardPolicy>(value.at("action").get<uint8_t>()), to_number(value.at("value")),
          to_number(value.at("median")), to_number(value.at("limit"))};
}

json to_json(const GuardRecord& guards) {
  json rolled_back = json::array();
  for (const Rollback& rollback : guards.rolled_back) {
    rolled_back.push_back({{"first", rollback.steps.first},
                           {"last", rollback.steps.last},
                           {"epoch", rollback.epoch.value}});
  }
  return {{"warnings", guards.warnings},
          {"skips", guards.skips},
          {"rollbacks", guards.rollbacks},
          {"rolled_back", std::move(rolled_back)},
          {"rolling_back", guards.rolling_back}};
}
GuardRecord to_guards(const json& value) {
  GuardRecord guards;
  guards.warnings = value.at("warnings");
  guards.skips = value.at("skips");
  guards.rollbacks = value.at("rollbacks");
  for (const json& rollback : value.at("rolled_back")) {
    guards.rolled_back.push_back(
        {{rollback.at("first"), rollback.at("last")}, {rollback.at("epoch")}});
  }
  guards.rolling_back = value.at("rolling_back");
  return guards;
}

json to_json(const StepRecord& step) {
  json value = {{"job", step.job.value},
                {"epoch", step.epoch.value},
                {"step", step.step},
                {"loss", number(step.loss)},
                {"grad_norm", number(step.grad_norm)},
                {"learning_rate", number(step.learning_rate)},
                {"tokens", step.tokens},
                {"step_seconds", number(step.step_seconds)},
                {"expert_load_max_ratio", number(step.expert_load_max_ratio)},
                {"mtp_loss", number(step.mtp_loss)},
                {"balance_loss", number(step.balance_loss)},
                {"checkpoint_seconds", number(step.checkpoint_seconds)},
                {"replayed", step.replayed},
                {"finished_ns", step.finished.nanoseconds}};
  if (step.in_proof) value["in_proof"] = true;
  if (step.guard != GuardFinding()) value["guard"] = to_json(step.guard);
  return value;
}
StepRecord to_step(const json& value) {
  StepRecord step;
  step.job = {value.at("job")};
  step.epoch = {value.at("epoch")};
  step.step = value.at("step");
  step.loss = to_number(value.at("loss"));
  step.grad_norm = to_number(value.at("grad_norm"));
  step.learning_rate = to_number(value.at("learning_rate"));
  step.tokens = value.at("tokens");
  step.step_seconds = to_number(value.at("step_seconds"));
  step.expert_load_max_ratio = to_number(value.at("expert_load_max_ratio"));
  // Absent from records of before there were such losses.
  if (value.contains("mtp_loss")) step.mtp_loss = to_number(value.at("mtp_loss"));
  if (value.contains("balance_loss")) step.balance_loss = to_number(value.at("balance_loss"));
  if (value.contains("checkpoint_seconds")) {
    step.checkpoint_seconds = to_number(value.at("checkpoint_seconds"));
  }
  step.replayed = value.at("replayed");
  step.in_proof = value.value("in_proof", false);
  if (value.contains("guard")) step.guard = to_finding(value.at("guard"));
  step.finished = {value.at("finished_ns")};
  return step;
}

json to_json(const CheckpointRecord& checkpoint) {
  return {{"step", checkpoint.step},
          {"epoch", checkpoint.epoch.value},
          {"manifest", checkpoint.manifest},
          {"bytes", checkpoint.bytes},
          {"weights_digest", checkpoint.weights_digest},
          {"committed_ns", checkpoint.committed.nanoseconds}};
}
CheckpointRecord to_checkpoint(const json& value) {
  return {value.at("step"),  {value.at("epoch")},        value.at("manifest"),
          value.at("bytes"), value.at("weights_digest"), {value.at("committed_ns")}};
}

json to_json(const SavingRecord& saving) {
  const SaveMeasurements& m = saving.measured;
  return {{"step_seconds", number(m.step_seconds)},
          {"stall_seconds", number(m.stall_seconds)},
          {"slowdown_seconds", number(m.slowdown_seconds)},
          {"save_seconds", number(m.save_seconds)},
          {"save_count", m.save_count},
          {"training_seconds", number(m.training_seconds)},
          {"failure_count", m.failure_count},
          {"steps", saving.choice.steps},
          {"mtbf_seconds", number(saving.choice.mtbf_seconds)},
          {"overhead", number(saving.choice.overhead)},
          {"reason", saving.choice.reason},
          {"commits", saving.commits}};
}
SavingRecord to_saving(const json& value) {
  SavingRecord saving;
  saving.measured = {to_number(value.at("step_seconds")),
                     to_number(value.at("stall_seconds")),
                     to_number(value.at("slowdown_seconds")),
                     to_number(value.at("save_seconds")),
                     value.at("save_count"),
                     to_number(value.at("training_seconds")),
                     value.at("failure_count")};
  saving.choice = {value.at("steps"), to_number(value.at("mtbf_seconds")),
                   to_number(value.at("overhead")), value.at("reason")};
  saving.commits = value.at("commits");
  return saving;
}

json to_json(const ProofRecord& proof) {
  return {
      {"steps", proof.steps},     {"epoch", proof.epoch.value},       {"from", proof.from},
      {"through", proof.through}, {"digest_step", proof.digest_step}, {"compared", proof.compared},
      {"tensors", proof.tensors}, {"saved_again", proof.saved_again}};
}
ProofRecord to_proof(const json& value) {
  return {value.at("steps"),       {value.at("epoch")},
          value.at("from"),        value.at("through"),
          value.at("digest_step"), value.at("compared"),
          value.at("tensors"),     value.value("saved_again", int64_t{0})};
}

json optional_instant(const std::optional<Instant>& at) {
  return at ? json(at->nanoseconds) : json();
}
std::optional<Instant> to_optional_instant(const json& value) {
  if (value.is_null()) return std::nullopt;
  return Instant{value.get<int64_t>()};
}

JobState to_state(const json& value) {
  const std::optional<JobState> state = job_state_of(value.get_ref<const std::string&>());
  // Raises the library's own error, which decode() reports.
  if (!state) json::object().at("no such state: " + value.get<std::string>());
  return *state;
}

JobRecord to_job(const json& value) {
  JobRecord job;
  job.id = {value.at("id")};
  job.name = value.at("name");
  job.state = to_state(value.at("state"));
  job.reason = to_reason(value.at("reason"));
  job.outcome = to_state(value.at("outcome"));
  job.created = {value.at("created_ns")};
  job.started = to_optional_instant(value.at("started_ns"));
  job.finished = to_optional_instant(value.at("finished_ns"));
  job.target_steps = value.at("target_steps");
  job.epoch = {value.at("epoch")};
  job.restarts = value.at("restarts");
  job.failures = value.at("failures");
  job.failures_without_step = value.at("failures_without_step");
  job.highest_step = value.at("highest_step");
  for (const json& at : value.at("placement")) {
    job.placement.push_back(
        {{at.at("worker")}, at.at("device"), {at.value("state_from", uint64_t{0})}});
  }
  job.checkpoint_dir = value.at("checkpoint_dir");
  job.restore_manifest = value.at("restore_manifest");
  job.restore_step = value.at("restore_step");
  job.restored_from_memory = value.value("restored_from_memory", false);  // as the next one
  job.rebalance = value.value("rebalance", false);  // absent from older records
  job.suspend = value.value("suspend", false);
  job.replacements = value.value("replacements", int64_t{0});
  job.scale_to = value.value("scale_to", int64_t{0});
  job.rebalanced_step = value.value("rebalanced_step", int64_t{0});
  if (value.contains("saving")) job.saving = to_saving(value.at("saving"));
  if (value.contains("proof")) job.proof = to_proof(value.at("proof"));
  if (value.contains("guards")) job.guards = to_guards(value.at("guards"));
  if (!value.at("checkpoint").is_null()) job.checkpoint = to_checkpoint(value.at("checkpoint"));
  if (!value.at("last_failure").is_null()) job.last_failure = to_failure(value.at("last_failure"));
  if (!value.at("last_step").is_null()) job.last_step = to_step(value.at("last_step"));
  return job;
}

SeatsRecord to_seats(const json& value) {
  SeatsRecord record;
  record.job = {value.at("job")};
  for (const json& layer : value.at("layers")) {
    record.seats.layers[layer.at("layer").get<int64_t>()] =
        layer.at("experts").get<std::vector<int32_t>>();
  }
  return record;
}

DataRecord to_data(const json& value) {
  DataRecord record;
  record.job = {value.at("job")};
  for (const json& found : value.at("data")) {
    const json& digest = found.at("digest");
    record.data.push_back({found.at("path"), found.at("tokens"), {digest.at(0), digest.at(1)}});
  }
  return record;
}

json to_json(const HostEvidence& evidence) {
  return {{"at_ns", evidence.at.nanoseconds},
          {"code", evidence.code},
          {"job", evidence.job.value},
          {"epoch", evidence.epoch.value},
          {"rank", evidence.rank ? json(evidence.rank->value) : json()},
          {"step", evidence.step},
          {"message", evidence.message}};
}
HostEvidence to_evidence(const json& value) {
  HostEvidence evidence;
  evidence.at = {value.at("at_ns")};
  evidence.code = value.at("code");
  evidence.job = {value.at("job")};
  evidence.epoch = {value.at("epoch")};
  if (!value.at("rank").is_null()) evidence.rank = Rank{value.at("rank").get<int32_t>()};
  evidence.step = value.at("step");
  evidence.message = value.at("message");
  return evidence;
}

json to_json(const Quarantine& quarantine) {
  return {{"reason", to_json(quarantine.reason)},
          {"by_user", quarantine.by_user},
          {"since_ns", quarantine.since.nanoseconds},
          {"until_ns", optional_instant(quarantine.until)},
          {"releasing", quarantine.releasing}};
}
Quarantine to_quarantine(const json& value) {
  return {to_reason(value.at("reason")),
          value.at("by_user"),
          {value.at("since_ns")},
          to_optional_instant(value.at("until_ns")),
          value.value("releasing", false)};
}

WorkerRecord to_worker(const json& value) {
  WorkerRecord worker = {{value.at("id")},
                         value.at("name"),
                         value.at("incarnation"),
                         value.at("device_count"),
                         value.at("lost")};
  if (value.contains("drain")) worker.drain = value.at("drain");
  worker.drain_done = value.value("drain_done", false);
  worker.check_due = value.value("check_due", false);
  if (value.contains("quarantine")) worker.quarantine = to_quarantine(value.at("quarantine"));
  if (value.contains("evidence")) {
    for (const json& evidence : value.at("evidence")) {
      worker.evidence.push_back(to_evidence(evidence));
    }
  }
  return worker;
}

EvaluationRecord to_evaluation(const json& value) {
  return {{value.at("job")},           {value.at("epoch")}, value.at("step"),
          to_number(value.at("loss")), value.at("tokens"),  {value.at("received_ns")}};
}

JobEvent to_event(const json& value) {
  JobEvent event;
  event.sequence = value.at("sequence");
  event.at = {value.at("at_ns")};
  event.actor = value.at("actor");
  event.job = {value.at("job")};
  event.job_name = value.at("job_name");
  event.epoch = {value.at("epoch")};
  if (!value.at("rank").is_null()) event.rank = Rank{value.at("rank").get<int32_t>()};
  if (!value.at("state").is_null()) event.state = to_state(value.at("state"));
  if (!value.at("from").is_null()) event.from = to_state(value.at("from"));
  event.reason = to_reason(value.at("reason"));
  return event;
}

// The only catch of nlohmann's exceptions here: damaged records become a Status.
template <typename Convert>
auto decode(std::string_view text, std::string_view kind, Convert convert)
    -> Result<decltype(convert(json()))> {
  try {
    return convert(parse(text));
  } catch (const json::exception& error) {
    return data_loss(fmt::format("the stored {} record is damaged: {}", kind, error.what()));
  }
}

}  // namespace

std::string_view job_state_name(JobState state) {
  return kStateNames[static_cast<size_t>(state)];
}

std::optional<JobState> job_state_of(std::string_view name) {
  for (const JobState state : kJobStates) {
    if (job_state_name(state) == name) return state;
  }
  return std::nullopt;
}

bool is_final(JobState state) {
  return state == JobState::kSucceeded || state == JobState::kFailed ||
         state == JobState::kCancelled;
}

bool wants_ranks(JobState state) {
  return state == JobState::kStarting || state == JobState::kLoading || state == JobState::kRunning;
}

std::string key_number(uint64_t number) {
  return fmt::format("{:016x}", number);
}
std::string job_key(JobId job) {
  return std::string(kJobPrefix) + key_number(job.value);
}
std::string spec_key(JobId job) {
  return std::string(kSpecPrefix) + key_number(job.value);
}
std::string job_event_prefix(JobId job) {
  return "job-event/" + key_number(job.value) + "/";
}
std::string step_prefix(JobId job) {
  return "step/" + key_number(job.value) + "/";
}

std::vector<std::string> prefixes_of(JobId job) {
  const std::string number = key_number(job.value);
  return {job_key(job),
          spec_key(job),
          job_event_prefix(job),
          step_prefix(job),
          std::string(kSeatsPrefix) + number,
          std::string(kDataPrefix) + number,
          std::string(kEvaluationPrefix) + number + "/"};
}

std::optional<JobId> job_of_spec_key(std::string_view key) {
  if (!key.starts_with(kSpecPrefix)) return std::nullopt;
  key.remove_prefix(kSpecPrefix.size());
  if (key.size() != 16 || key.find_first_not_of("0123456789abcdef") != std::string_view::npos) {
    return std::nullopt;
  }
  return JobId{std::stoull(std::string(key), nullptr, 16)};
}

Record record_of(const JobRecord& job) {
  json placement = json::array();
  for (const RankPlacement& at : job.placement) {
    placement.push_back(
        {{"worker", at.worker.value}, {"device", at.device}, {"state_from", at.state_from.value}});
  }
  json value = {
      {"id", job.id.value},
      {"name", job.name},
      {"state", job_state_name(job.state)},
      {"reason", to_json(job.reason)},
      {"outcome", job_state_name(job.outcome)},
      {"created_ns", job.created.nanoseconds},
      {"started_ns", optional_instant(job.started)},
      {"finished_ns", optional_instant(job.finished)},
      {"target_steps", job.target_steps},
      {"epoch", job.epoch.value},
      {"restarts", job.restarts},
      {"failures", job.failures},
      {"failures_without_step", job.failures_without_step},
      {"highest_step", job.highest_step},
      {"placement", std::move(placement)},
      {"checkpoint_dir", job.checkpoint_dir},
      {"restore_manifest", job.restore_manifest},
      {"restore_step", job.restore_step},
      {"restored_from_memory", job.restored_from_memory},
      {"rebalance", job.rebalance},
      {"rebalanced_step", job.rebalanced_step},
      {"checkpoint", job.checkpoint ? to_json(*job.checkpoint) : json()},
      {"last_failure", job.last_failure ? to_json(*job.last_failure) : json()},
      {"last_step", job.last_step ? to_json(*job.last_step) : json()},
  };
  if (job.suspend) value["suspend"] = true;
  if (job.replacements > 0) value["replacements"] = job.replacements;
  if (job.scale_to > 0) value["scale_to"] = job.scale_to;
  if (job.saving) value["saving"] = to_json(*job.saving);
  if (job.proof) value["proof"] = to_json(*job.proof);
  if (job.guards != GuardRecord()) value["guards"] = to_json(job.guards);
  return {job_key(job.id), dump(value)};
}

Record record_of(const SeatsRecord& seats) {
  json layers = json::array();
  for (const auto& [layer, experts] : seats.seats.layers) {
    layers.push_back({{"layer", layer}, {"experts", experts}});
  }
  return {std::string(kSeatsPrefix) + key_number(seats.job.value),
          dump({{"job", seats.job.value}, {"layers", std::move(layers)}})};
}

Record record_of(const DataRecord& data) {
  json items = json::array();
  for (const DataIdentity& found : data.data) {
    items.push_back({{"path", found.path},
                     {"tokens", found.tokens},
                     {"digest", {found.digest.low, found.digest.high}}});
  }
  return {std::string(kDataPrefix) + key_number(data.job.value),
          dump({{"job", data.job.value}, {"data", std::move(items)}})};
}

Record record_of(const WorkerRecord& worker) {
  json value = {{"id", worker.id.value},
                {"name", worker.name},
                {"incarnation", worker.incarnation},
                {"device_count", worker.device_count},
                {"lost", worker.lost}};
  if (worker.drain) value["drain"] = *worker.drain;
  if (worker.drain_done) value["drain_done"] = true;
  if (worker.check_due) value["check_due"] = true;
  if (worker.quarantine) value["quarantine"] = to_json(*worker.quarantine);
  for (const HostEvidence& evidence : worker.evidence) {
    value["evidence"].push_back(to_json(evidence));
  }
  return {std::string(kWorkerPrefix) + key_number(worker.id.value), dump(value)};
}

Record record_of(const StepRecord& step) {
  return {step_prefix(step.job) + key_number(step.cursor()), dump(to_json(step))};
}

Record record_of(const EvaluationRecord& evaluation) {
  const uint64_t position =
      uint64_t{evaluation.epoch.value} << 32 | static_cast<uint64_t>(evaluation.step);
  return {std::string(kEvaluationPrefix) + key_number(evaluation.job.value) + "/" +
              key_number(position),
          dump({{"job", evaluation.job.value},
                {"epoch", evaluation.epoch.value},
                {"step", evaluation.step},
                {"loss", number(evaluation.loss)},
                {"tokens", evaluation.tokens},
                {"received_ns", evaluation.received.nanoseconds}})};
}

Record spec_record(JobId job, std::string spec_json) {
  return {spec_key(job), std::move(spec_json)};
}

Record last_job_record(JobId job) {
  return {std::string(kLastJobKey), dump({{"id", job.value}})};
}

std::vector<Record> records_of(const JobEvent& event) {
  const json value = {{"sequence", event.sequence},
                      {"at_ns", event.at.nanoseconds},
                      {"actor", event.actor},
                      {"job", event.job.value},
                      {"job_name", event.job_name},
                      {"epoch", event.epoch.value},
                      {"rank", event.rank ? json(event.rank->value) : json()},
                      {"state", event.state ? json(job_state_name(*event.state)) : json()},
                      {"from", event.from ? json(job_state_name(*event.from)) : json()},
                      {"reason", to_json(event.reason)}};
  const std::string text = dump(value);
  std::vector<Record> records = {{std::string(kEventPrefix) + key_number(event.sequence), text}};
  if (event.job.value != 0) {
    records.push_back({job_event_prefix(event.job) + key_number(event.sequence), text});
  }
  return records;
}

Result<JobRecord> decode_job(std::string_view value) {
  return decode(value, "job", to_job);
}
Result<JobId> decode_last_job(std::string_view value) {
  return decode(value, "last job", [](const json& stored) { return JobId{stored.at("id")}; });
}
Result<SeatsRecord> decode_seats(std::string_view value) {
  return decode(value, "seats", to_seats);
}
Result<DataRecord> decode_data(std::string_view value) {
  return decode(value, "data", to_data);
}
Result<WorkerRecord> decode_worker(std::string_view value) {
  return decode(value, "worker", to_worker);
}
Result<StepRecord> decode_step(std::string_view value) {
  return decode(value, "step", to_step);
}
Result<EvaluationRecord> decode_evaluation(std::string_view value) {
  return decode(value, "evaluation", to_evaluation);
}
Result<JobEvent> decode_event(std::string_view value) {
  return decode(value, "event", to_event);
}

}  // namespace penstock
