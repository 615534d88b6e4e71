#include "coordinator/http/api.h"

#include <algorithm>
#include <charconv>

#include "coordinator/http/documents.h"

namespace penstock {
namespace {

constexpr int64_t kListDefault = 1000;
constexpr int64_t kListMax = 10'000;
constexpr int64_t kLogBytesDefault = 256 << 10;
constexpr int64_t kLogBytesMax = 4 << 20;
constexpr int64_t kGraceMsDefault = 5000;
constexpr int64_t kGraceMsMax = 3'600'000;
constexpr size_t kDrainReasonBytesMax = 1000;

std::vector<std::string> segments_of(const std::string& path) {
  std::vector<std::string> segments;
  size_t begin = 1;
  while (begin < path.size()) {
    const size_t end = std::min(path.find('/', begin), path.size());
    segments.push_back(path.substr(begin, end - begin));
    begin = end + 1;
  }
  return segments;
}

// A whole number in the query, or `otherwise` when it is not given.
Result<int64_t> number_parameter(const HttpRequest& request, std::string_view name,
                                 int64_t otherwise, int64_t least, int64_t most) {
  const auto text = request.parameter(name);
  if (!text) return otherwise;
  int64_t value = 0;
  const auto parsed = std::from_chars(text->data(), text->data() + text->size(), value);
  const bool whole = parsed.ec == std::errc() && parsed.ptr == text->data() + text->size();
  if (!whole || value < least || value > most) {
    return invalid_argument(
        fmt::format("{} must be a whole number from {} to {}", name, least, most));
  }
  return value;
}

struct Window {
  uint64_t after = 0;
  size_t limit = 0;
};

Result<Window> window_of(const HttpRequest& request) {
  PENSTOCK_TRY_ASSIGN(const int64_t after, number_parameter(request, "after", 0, 0, INT64_MAX - 1));
  PENSTOCK_TRY_ASSIGN(const int64_t limit,
                      number_parameter(request, "limit", kListDefault, 1, kListMax));
  return Window{static_cast<uint64_t>(after), static_cast<size_t>(limit)};
}

}  // namespace

Api::Api(const Coordinator& core, const RecordStore& store, const LogFiles& logs,
         MetricRegistry& metrics, ApiActions actions)
    : core_(core), store_(store), logs_(logs), metrics_(metrics), actions_(std::move(actions)) {}

void Api::handle(const HttpRequest& request, HttpResponder respond) {
  // Filled in by dispatch() with a name from the closed set of routes, so that labels stay few.
  const auto route = std::make_shared<std::string>("unknown");
  const Instant begun = actions_.now();
  const std::string method =
      request.method == "GET" || request.method == "POST" || request.method == "DELETE"
          ? request.method
          : "other";
  HttpResponder measured = [this, route, begun, method,
                            respond = std::move(respond)](HttpResponse response) {
    metrics_
        .counter("penstock_coordinator_api_requests_total", "HTTP requests answered.",
                 {{"method", method}, {"route", *route}, {"code", std::to_string(response.status)}})
        .increment();
    metrics_
        .histogram("penstock_coordinator_api_request_duration_seconds",
                   "Time from a whole HTTP request to its answer, waiting included.",
                   latency_bounds_seconds(), {{"method", method}, {"route", *route}})
        .observe(to_seconds(actions_.now() - begun));
    respond(std::move(response));
  };
  dispatch(request, std::move(measured), route.get());
}

void Api::dispatch(const HttpRequest& request, HttpResponder respond, std::string* route) {
  const std::vector<std::string> path = segments_of(request.path);
  const bool get = request.method == "GET";
  const bool is_job = path.size() >= 4 && path[0] == "api" && path[1] == "v1" && path[2] == "jobs";
  if (is_job) return dispatch_job(request, path, std::move(respond), route);
  const bool is_worker =
      path.size() == 5 && path[0] == "api" && path[1] == "v1" && path[2] == "workers";
  if (is_worker && request.method == "POST") {
    return dispatch_worker(request, path, std::move(respond), route);
  }
  const bool is_backup =
      path.size() >= 3 && path[0] == "api" && path[1] == "v1" && path[2] == "backups";
  if (is_backup) return dispatch_backup(request, path, respond, route);
  const auto matches = [&](const char* method, const char* name) {
    if (request.path != name || request.method != method) return false;
    *route = name;
    return true;
  };
  if (matches("POST", "/api/v1/jobs")) return submit(request, std::move(respond));
  if (matches("GET", "/api/v1/jobs")) return respond(list_jobs(request));
  if (matches("GET", "/api/v1/workers")) return respond(json_response(worker_list_document(core_)));
  if (matches("GET", "/api/v1/events")) {
    return follow_events(request, std::nullopt, std::move(respond));
  }
  if (matches("GET", "/api/v1/version")) return respond(json_response(version_document()));
  if (matches("GET", "/api/v1/prometheus/targets")) {
    return respond(json_response(targets_document(core_)));
  }
  if (matches("GET", "/openapi.json")) return respond(json_response(openapi_document()));
  if (matches("GET", "/metrics")) return respond({200, kMetricsContentType, metrics_.render()});
  if (matches("GET", "/livez")) return respond({200, "text/plain", "ok\n"});
  if (matches("GET", "/readyz")) {
    const Status ready = actions_.ready();
    return respond(ready.ok() ? HttpResponse{200, "text/plain", "ok\n"} : error_response(ready));
  }
  if (matches("GET", "/")) {
    return respond({200, "text/html; charset=utf-8", page_document(core_)});
  }
  respond(error_response(not_found(fmt::format(
      "there is no {} {}; GET /openapi.json lists what there is",
      get || request.method == "POST" ? request.method : "such method for", request.path))));
}

void Api::dispatch_worker(const HttpRequest& request, const std::vector<std::string>& path,
                          HttpResponder respond, std::string* route) {
  const std::string& action = path[4];
  const bool takes_reason = action == "drain" || action == "quarantine";
  if (!takes_reason && action != "undrain" && action != "release") {
    return respond(
        error_response(not_found("there is no such call; GET /openapi.json lists what there is")));
  }
  *route = "/api/v1/workers/{worker}/" + action;
  const std::string name = path[3];
  std::optional<std::string> reason;
  if (takes_reason) reason = std::string(request.parameter("reason").value_or(""));
  if (reason && reason->size() > kDrainReasonBytesMax) {
    return respond(error_response(
        invalid_argument(fmt::format("reason is longer than {} bytes", kDrainReasonBytesMax))));
  }
  if (action == "quarantine" && reason->empty()) {
    return respond(error_response(invalid_argument("say why: quarantine?reason=TEXT")));
  }
  const bool drains = action == "drain" || action == "undrain";
  actions_.command(
      [name, reason, drains](RequestId given) {
        return drains ? Event(DrainWorker{given, name, reason})
                      : Event(QuarantineWorker{given, name, reason});
      },
      [this, name, respond = std::move(respond)](const Answer& answer) {
        if (!answer.status.ok()) return respond(error_response(answer.status));
        respond(json_response(worker_document(core_, *core_.find_worker(name)), 202));
      });
}

// POST begins one, GET has its next piece.
void Api::dispatch_backup(const HttpRequest& request, const std::vector<std::string>& path,
                          const HttpResponder& respond, std::string* route) {
  const auto answer = [&](const Result<BackupPiece>& piece, int status) {
    respond(piece.ok() ? json_response(backup_document(*piece), status)
                       : error_response(piece.status()));
  };
  if (request.method == "POST" && path.size() == 3) {
    *route = "/api/v1/backups";
    return answer(backups_.begin(store_, actions_.now()), 201);
  }
  uint64_t id = 0;
  const bool is_number = path.size() == 4 &&
                         std::from_chars(path[3].data(), path[3].data() + path[3].size(), id).ptr ==
                             path[3].data() + path[3].size();
  if (request.method != "GET" || !is_number) {
    return respond(
        error_response(not_found("there is no such call; GET /openapi.json lists what there is")));
  }
  *route = "/api/v1/backups/{backup}";
  const Result<int64_t> offset = number_parameter(request, "offset", 0, 0, INT64_MAX);
  if (!offset.ok()) return respond(error_response(offset.status()));
  answer(backups_.next(id, static_cast<uint64_t>(*offset), actions_.now()), 200);
}

void Api::dispatch_job(const HttpRequest& request, const std::vector<std::string>& path,
                       HttpResponder respond, std::string* route) {
  const std::string action = path.size() > 4 ? path[4] : "";
  const std::string name = "/api/v1/jobs/{job}" + (action.empty() ? "" : "/" + action);
  const bool get = request.method == "GET";
  const Job* job = core_.find_job(path[3]);
  const auto unknown_route = [&] {
    respond(
        error_response(not_found("there is no such call; GET /openapi.json lists what there is")));
  };
  if (path.size() > 5) return unknown_route();
  const std::vector<std::string> reads = {"",     "spec",        "events",   "steps", "evaluations",
                                          "logs", "checkpoints", "rebalance"};
  const std::vector<std::string> commands = {"cancel", "resume", "rebalance", "suspend", "scale"};
  const bool is_read = get && std::find(reads.begin(), reads.end(), action) != reads.end();
  const bool is_command = request.method == "POST" &&
                          std::find(commands.begin(), commands.end(), action) != commands.end();
  const bool is_removal = request.method == "DELETE" && action.empty();
  if (!is_read && !is_command && !is_removal) return unknown_route();
  *route = name;
  if (!job) {
    return respond(
        error_response(not_found(fmt::format("no job has the id or name \"{}\"", path[3]))));
  }
  const JobId id = job->record.id;
  if (is_removal) return remove(request, *job, std::move(respond));
  if (action.empty()) return respond(json_response(job_document(core_, *job)));
  if (action == "spec") return respond(json_response(to_json(job->spec) + "\n"));
  if (action == "events") return follow_events(request, id, std::move(respond));
  if (action == "steps") return follow_steps(request, id, std::move(respond));
  if (action == "evaluations") return respond(json_response(evaluation_list_document(*job)));
  if (action == "logs") return follow_log(request, id, std::move(respond));
  if (action == "checkpoints") return list_checkpoints(*job, std::move(respond));
  if (action == "cancel") return cancel(request, id, std::move(respond));
  if (action == "scale") {
    const Result<int64_t> data = number_parameter(request, "data", 0, 1, 1 << 20);
    if (!data.ok()) return respond(error_response(data.status()));
    if (*data == 0) {
      return respond(error_response(invalid_argument("say which width: scale?data=N")));
    }
    return actions_.command(
        [id, data = *data](RequestId given) {
          return ScaleJob{given, id, data};
        },
        [this, respond](const Answer& answer) { answer_command(answer, 202, respond); });
  }
  if (action == "suspend") {
    return actions_.command(
        [id](RequestId given) {
          return SuspendJob{given, id};
        },
        [this, respond](const Answer& answer) { answer_command(answer, 202, respond); });
  }
  if (action == "rebalance") {
    if (get) return respond(planned_rebalance(id, 200));
    return actions_.command(
        [id](RequestId given) {
          return RebalanceJob{given, id};
        },
        [this, id, respond](const Answer& answer) {
          respond(answer.status.ok() ? planned_rebalance(id, 202) : error_response(answer.status));
        });
  }
  resume(request, id, std::move(respond));
}

void Api::resume(const HttpRequest& request, JobId job, HttpResponder respond) {
  const Result<int64_t> prove = number_parameter(request, "prove", 0, 1, 1'000'000'000);
  if (!prove.ok()) return respond(error_response(prove.status()));
  std::optional<JobSpec> spec;
  if (!request.body.empty()) {
    Result<JobSpec> parsed = parse_job_spec(request.body, "spec");
    if (!parsed.ok()) return respond(error_response(parsed.status()));
    spec = *std::move(parsed);
  }
  actions_.command(
      [job, steps = *prove, spec = std::move(spec)](RequestId given) {
        return ResumeJob{given, job, steps, spec};
      },
      [this, respond](const Answer& answer) { answer_command(answer, 202, respond); });
}

void Api::submit(const HttpRequest& request, HttpResponder respond) {
  if (request.body.empty()) {
    return respond(
        error_response(invalid_argument("the body is empty; send a job spec as YAML or JSON")));
  }
  Result<JobSpec> spec = parse_job_spec(request.body, "spec");
  if (!spec.ok()) return respond(error_response(spec.status()));
  if (const auto name = request.parameter("name")) {
    // The name's own rules are the spec's: check it in place.
    spec->name = std::string(*name);
    const Result<JobSpec> renamed = parse_job_spec(to_json(*spec), "spec");
    if (!renamed.ok()) return respond(error_response(renamed.status()));
  }
  actions_.command(
      [spec = *std::move(spec)](RequestId given) {
        return SubmitJob{given, spec};
      },
      [this, respond](const Answer& answer) { answer_command(answer, 201, respond); });
}

void Api::cancel(const HttpRequest& request, JobId job, HttpResponder respond) {
  const Result<int64_t> grace_ms =
      number_parameter(request, "grace_ms", kGraceMsDefault, 0, kGraceMsMax);
  if (!grace_ms.ok()) return respond(error_response(grace_ms.status()));
  actions_.command(
      [job, grace = *grace_ms](RequestId given) {
        return CancelJob{given, job, grace};
      },
      [this, respond](const Answer& answer) { answer_command(answer, 202, respond); });
}

void Api::remove(const HttpRequest& request, const Job& job, HttpResponder respond) {
  const std::string_view flag = request.parameter("checkpoints").value_or("false");
  if (flag != "true" && flag != "false") {
    return respond(error_response(invalid_argument("checkpoints must be true or false")));
  }
  const JobId id = job.record.id;
  actions_.command(
      [id, checkpoints = flag == "true"](RequestId given) {
        return RemoveJob{given, id, checkpoints};
      },
      [id, name = job.record.name, checkpoints = flag == "true",
       respond = std::move(respond)](const Answer& answer) {
        if (!answer.status.ok()) return respond(error_response(answer.status));
        respond(json_response(removed_job_document(id, name, checkpoints)));
      });
}

HttpResponse Api::planned_rebalance(JobId id, int status) const {
  const Job& job = *core_.find_job(id);
  const Result<ExpertBalance> balance = core_.rebalance_plan(job);
  if (!balance.ok()) return error_response(balance.status());
  return json_response(rebalance_document(job, *balance), status);
}

void Api::answer_command(const Answer& answer, int status, const HttpResponder& respond) const {
  if (!answer.status.ok()) return respond(error_response(answer.status));
  respond(json_response(job_document(core_, *core_.find_job(answer.job)), status));
}

HttpResponse Api::list_jobs(const HttpRequest& request) const {
  const Result<int64_t> limit = number_parameter(request, "limit", kListDefault, 1, kListMax);
  if (!limit.ok()) return error_response(limit.status());
  std::optional<JobState> state;
  if (const auto name = request.parameter("state")) {
    state = job_state_of(*name);
    if (!state) {
      return error_response(invalid_argument(
          fmt::format("\"{}\" is no state of a job; states are QUEUED, PLACING, STARTING, LOADING, "
                      "RUNNING, RECOVERING, STOPPING, SUSPENDED, SUCCEEDED, FAILED, CANCELLED",
                      *name)));
    }
  }
  std::vector<const Job*> jobs;
  for (auto job = core_.jobs().rbegin(); job != core_.jobs().rend() && std::ssize(jobs) < *limit;
       ++job) {
    if (!state || job->second.record.state == *state) jobs.push_back(&job->second);
  }
  return json_response(job_list_document(core_, jobs));
}

void Api::list_checkpoints(const Job& job, HttpResponder respond) const {
  const JobId id = job.record.id;
  actions_.list_checkpoints(job, [this, id, respond](Result<std::vector<ListedCheckpoint>> listed) {
    if (!listed.ok()) return respond(error_response(listed.status()));
    const Job* job = core_.find_job(id);
    if (job == nullptr) return respond(error_response(not_found("the job was removed meanwhile")));
    respond(json_response(checkpoint_list_document(*job, *listed)));
  });
}

// Nothing more will follow: the job has ended. The log of the whole cluster never ends.
bool Api::ended(std::optional<JobId> job) const {
  if (!job) return false;
  const Job* known = core_.find_job(*job);
  return known == nullptr || is_final(known->record.state);
}

void Api::follow_events(const HttpRequest& request, std::optional<JobId> job,
                        HttpResponder respond) {
  const Result<Window> window = window_of(request);
  if (!window.ok()) return respond(error_response(window.status()));
  const std::string prefix = job ? job_event_prefix(*job) : std::string(kEventPrefix);
  const auto look = [this, job, prefix,
                     window = *window](bool last_look) -> std::optional<HttpResponse> {
    // Asked first: what is recorded after it cannot be missed and be called the end.
    const bool over = ended(job);
    const auto records = store_.scan(prefix, prefix + key_number(window.after + 1), window.limit);
    if (!records.ok()) return error_response(records.status());
    if (records->empty() && !over && !last_look) return std::nullopt;
    std::vector<JobEvent> events;
    for (const Record& record : *records) {
      const Result<JobEvent> event = decode_event(record.value);
      if (!event.ok()) return error_response(event.status());
      events.push_back(*event);
    }
    const uint64_t next = events.empty() ? window.after : events.back().sequence;
    const bool terminal = over && events.size() < window.limit;
    return json_response(event_list_document(events, next, terminal));
  };
  look_or_wait(request, look, std::move(respond));
}

void Api::follow_steps(const HttpRequest& request, JobId job, HttpResponder respond) {
  const Result<Window> window = window_of(request);
  if (!window.ok()) return respond(error_response(window.status()));
  const auto look = [this, job, window = *window](bool last_look) -> std::optional<HttpResponse> {
    const bool over = ended(job);
    const std::string prefix = step_prefix(job);
    const auto records = store_.scan(prefix, prefix + key_number(window.after + 1), window.limit);
    if (!records.ok()) return error_response(records.status());
    if (records->empty() && !over && !last_look) return std::nullopt;
    std::vector<StepRecord> steps;
    for (const Record& record : *records) {
      const Result<StepRecord> step = decode_step(record.value);
      if (!step.ok()) return error_response(step.status());
      steps.push_back(*step);
    }
    const uint64_t next = steps.empty() ? window.after : steps.back().cursor();
    const bool terminal = over && steps.size() < window.limit;
    return json_response(step_list_document(steps, next, terminal));
  };
  look_or_wait(request, look, std::move(respond));
}

void Api::follow_log(const HttpRequest& request, JobId job, HttpResponder respond) {
  const int64_t last_rank = core_.find_job(job)->world_size() - 1;
  const Result<int64_t> rank = number_parameter(request, "rank", 0, 0, last_rank);
  const Result<int64_t> offset = number_parameter(request, "offset", 0, 0, INT64_MAX);
  const Result<int64_t> limit =
      number_parameter(request, "limit", kLogBytesDefault, 16, kLogBytesMax);
  for (const Status& status : {rank.status(), offset.status(), limit.status()}) {
    if (!status.ok()) return respond(error_response(status));
  }
  const auto look =
      [this, job, rank = Rank{static_cast<int32_t>(*rank)}, offset = static_cast<uint64_t>(*offset),
       limit = static_cast<uint64_t>(*limit)](bool last_look) -> std::optional<HttpResponse> {
    const bool over = ended(job);
    const Result<LogText> log = logs_.read(job, rank, offset, limit);
    if (!log.ok()) return error_response(log.status());
    const bool nothing = log->next_offset == offset;
    if (nothing && !over && !last_look) return std::nullopt;
    return json_response(log_document(job, rank, offset, *log, over && nothing));
  };
  look_or_wait(request, look, std::move(respond));
}

void Api::look_or_wait(const HttpRequest& request, Look look, HttpResponder respond) {
  const Result<int64_t> wait_ms = number_parameter(request, "wait_ms", 0, 0, kWaitMsMax);
  if (!wait_ms.ok()) return respond(error_response(wait_ms.status()));
  const bool at_once = *wait_ms == 0 || waiting_.size() >= kWaitingMax;
  if (auto response = look(at_once)) return respond(*std::move(response));
  waiting_.push_back(
      {std::move(look), std::move(respond), actions_.now() + std::chrono::milliseconds(*wait_ms)});
}

void Api::wake() {
  for (auto at = waiting_.begin(); at != waiting_.end();) {
    std::optional<HttpResponse> response = at->look(false);
    if (!response) {
      ++at;
      continue;
    }
    const HttpResponder respond = std::move(at->respond);
    at = waiting_.erase(at);
    respond(*std::move(response));
  }
}

void Api::expire() {
  const Instant now = actions_.now();
  backups_.expire(now);
  for (auto at = waiting_.begin(); at != waiting_.end();) {
    if (at->until > now) {
      ++at;
      continue;
    }
    std::optional<HttpResponse> response = at->look(true);
    const HttpResponder respond = std::move(at->respond);
    at = waiting_.erase(at);
    if (response) respond(*std::move(response));
  }
}

}  // namespace penstock
