// penstock trace: what the ranks of a job did in some steps, for Perfetto, and where the time went.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "comm/base/counted.h"
#include "comm/base/file.h"
#include "comm/control/http_client.h"
#include "ops/cli/cli.h"
#include "ops/cli/trace_document.h"

namespace penstock {

namespace {

constexpr int32_t kStepsByDefault = 3;
constexpr std::chrono::milliseconds kPollInterval{200};
constexpr std::chrono::milliseconds kFetchDeadline{60'000};

struct TraceFlags {
  std::string job;
  std::string steps;
  std::vector<std::string> outputs;  // "table" and "json" are formats, the last other is the file
};

// What the workers have of the job's newest attempt.
struct Held {
  uint64_t epoch = 0;
  std::map<int64_t, std::string> address_of;  // by rank
  TraceSteps steps;                           // that all of them have
};

Result<TraceSteps> parse_steps(const std::string& text) {
  TraceSteps steps;
  const size_t colon = text.find(':');
  const auto number = [](std::string_view digits, int32_t* value) {
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), *value);
    return error == std::errc() && end == digits.data() + digits.size() && *value > 0;
  };
  const std::string_view view = text;
  const bool parsed =
      number(view.substr(0, colon), &steps.first) &&
      number(colon == std::string::npos ? view : view.substr(colon + 1), &steps.last);
  if (parsed && !steps.empty()) return steps;
  return invalid_argument(
      fmt::format("--steps {}: expected a step, or first:last, counted from 1", text));
}

Result<HttpReply> fetch(const std::string& address, const std::string& path) {
  HttpCall call;
  call.url = "http://" + address + path;
  call.deadline = kFetchDeadline;
  PENSTOCK_TRY_ASSIGN(HttpReply reply, http_call(call));
  if (reply.status == 200) return reply;
  return unavailable(fmt::format("{} answered {} to {}: {}", address, reply.status, path,
                                 reply.body.substr(0, 200)));
}

// Every worker is asked, because a rank's trace outlives its place in the job.
Result<Held> held_traces(const Client& client, const std::string& job, int64_t world_size) {
  PENSTOCK_TRY_ASSIGN(const Json workers, client.get("/api/v1/workers"));
  Held held;
  std::map<int64_t, TraceSteps> steps_of;
  for (const Json& worker : workers.value("items", Json::array())) {
    const std::string address = field_string(worker, "http_address");
    const Result<HttpReply> reply = fetch(address, "/traces?job=" + job);
    if (!reply.ok()) continue;  // a worker that is down has nothing to say; missing ranks are below
    const Json list = Json::parse(reply->body, nullptr, false);
    if (!list.is_object()) return data_loss(address + " sent a list of traces that is none");
    for (const Json& item : list.value("items", Json::array())) {
      const auto epoch = static_cast<uint64_t>(field_number(item, "epoch"));
      const auto rank = static_cast<int64_t>(field_number(item, "rank", -1));
      if (epoch < held.epoch || rank < 0 || rank >= world_size) continue;
      if (epoch > held.epoch) {
        held.epoch = epoch;
        held.address_of.clear();
        steps_of.clear();
      }
      held.address_of[rank] = address;
      steps_of[rank] = {static_cast<int32_t>(field_number(item, "first_step", 1)),
                        static_cast<int32_t>(field_number(item, "last_step"))};
    }
  }
  if (std::ssize(held.address_of) < world_size) return held;  // steps stay empty
  held.steps = {1, INT32_MAX};
  for (const auto& [rank, steps] : steps_of) {
    held.steps.first = std::max(held.steps.first, steps.first);
    held.steps.last = std::min(held.steps.last, steps.last);
  }
  return held;
}

// Waits, while the job goes on, until every rank has the last step asked for; without one, only
// while the job runs.
Result<Held> wait_for_steps(Cli& cli, const Client& client, const Json& job,
                            std::optional<TraceSteps> asked) {
  const std::string id = field_text(job, "id");
  const auto world_size = static_cast<int64_t>(field_number(job, "world_size"));
  bool said = false;
  for (;;) {
    PENSTOCK_TRY_ASSIGN(const Json now, client.job(id));
    const bool over = state_is_final(field_string(now, "state"));  // before the traces are listed
    PENSTOCK_TRY_ASSIGN(const Held held, held_traces(client, id, world_size));
    if (!held.steps.empty() && (!asked || asked->last <= held.steps.last)) return held;
    if (over) {
      return not_found(held.steps.empty()
                           ? fmt::format("no step of job {} that all of its {} still have", id,
                                         counted(world_size, "rank"))
                           : fmt::format("job {} ended at step {}", id, held.steps.last));
    }
    if (!asked && field_string(now, "state") != "RUNNING") {
      return failed_precondition(
          fmt::format("job {} has no step to show, it is {}: {}; --steps 1 waits for the first", id,
                      field_string(now, "state"),
                      field_string(now.value("reason", Json::object()), "message")));
    }
    if (!said) cli.out.note(fmt::format("waiting for step {}", asked ? asked->last : 1));
    said = true;
    std::this_thread::sleep_for(kPollInterval);
  }
}

Result<std::vector<Trace>> fetch_traces(const Held& held, const std::string& job,
                                        TraceSteps steps) {
  std::vector<Trace> traces;
  for (const auto& [rank, address] : held.address_of) {
    PENSTOCK_TRY_ASSIGN(const HttpReply reply,
                        fetch(address, fmt::format("/trace?job={}&rank={}&first={}&last={}", job,
                                                   rank, steps.first, steps.last)));
    PENSTOCK_TRY_ASSIGN(Trace trace, decode_trace(as_bytes(reply.body)));
    if (trace.epoch.value != held.epoch || trace.steps != steps) {
      return unavailable(
          fmt::format("rank {} no longer has steps {} to {}; ask for later ones, or fewer", rank,
                      steps.first, steps.last));
    }
    traces.push_back(std::move(trace));
  }
  return traces;
}

Result<ExitCode> print_summary(Cli& cli, const std::vector<Trace>& traces,
                               const std::string& file) {
  std::vector<StepSummary> summaries;
  int64_t uncertainty_ns = 0;
  for (const Trace& trace : traces) {
    const std::vector<StepSummary> steps = summarize(trace.rank.value, trace.records);
    summaries.insert(summaries.end(), steps.begin(), steps.end());
    uncertainty_ns = std::max(uncertainty_ns, trace.clock_uncertainty_ns);
  }
  Json document = summary_document(summaries);
  document["apiVersion"] = "penstock/v1";
  document["kind"] = "TraceSummary";
  document["file"] = file.empty() ? Json() : Json(file);
  document["clock_uncertainty_seconds"] = static_cast<double>(uncertainty_ns) * 1e-9;
  cli.out.document(document);
  const StepSummary sum = total(summaries);
  cli.out.text(fmt::format("steps {} to {} of {}; means per rank and step\n",
                           traces.front().steps.first, traces.front().steps.last,
                           counted(std::ssize(traces), "rank")));
  cli.out.table({"PART", "MS", "SHARE"}, seconds_rows(sum, summaries.size()));
  cli.out.text("\n");
  cli.out.table({"COMMUNICATION", "COUNT", "BYTES", "ISSUE MS", "FLIGHT MS", "HIDDEN", "EXPOSED MS",
                 "WAITED MS"},
                communication_rows(sum, summaries.size()));
  if (!file.empty()) cli.out.note(file + " opens in https://ui.perfetto.dev");
  return ExitCode::kOk;
}

Result<ExitCode> trace(Cli& cli, const TraceFlags& flags) {
  std::string file;
  for (const std::string& output : flags.outputs) {
    if (output == "json" || output == "table") {
      cli.out.set_format(output == "json" ? OutputFormat::kJson : OutputFormat::kTable);
    } else {
      file = output;
    }
  }
  std::optional<TraceSteps> asked;
  if (!flags.steps.empty()) {
    PENSTOCK_TRY_ASSIGN(asked, parse_steps(flags.steps));
  }
  const Client client = cli.client();
  PENSTOCK_TRY_ASSIGN(const Json job, client.job(flags.job));
  PENSTOCK_TRY_ASSIGN(const Held held, wait_for_steps(cli, client, job, asked));
  const TraceSteps steps = asked.value_or(TraceSteps{
      std::max(held.steps.first, held.steps.last - kStepsByDefault + 1), held.steps.last});
  if (steps.first < held.steps.first) {
    return not_found(fmt::format("steps {} to {}: ranks still have {} to {}", steps.first,
                                 steps.last, held.steps.first, held.steps.last));
  }
  PENSTOCK_TRY_ASSIGN(const std::vector<Trace> traces,
                      fetch_traces(held, field_text(job, "id"), steps));
  if (!file.empty()) {
    std::error_code error;
    if (std::filesystem::exists(file, error) && !std::filesystem::is_regular_file(file, error)) {
      return invalid_argument(file +
                              " exists and is no ordinary file; choose another name with -o");
    }
    std::string text = chrome_trace(traces);
    if (file.ends_with(".gz")) {
      PENSTOCK_TRY_ASSIGN(text, gzip(text));
    }
    PENSTOCK_TRY(replace_file_durably(file, as_bytes(text)));
  }
  return print_summary(cli, traces, file);
}

}  // namespace

void add_trace_verb(CLI::App& app, Cli& cli) {
  const auto flags = std::make_shared<TraceFlags>();
  CLI::App* verb =
      add_verb(app, "trace", "Show what every rank of a job did in some steps, and when",
               "penstock trace quickstart\n"
               "penstock trace quickstart --steps 20:22 -o t.json.gz");
  verb->add_option("job", flags->job, "name or id")->required();
  verb->add_option("--steps", flags->steps,
                   "first:last, or one; waits for those to come (default: the last 3)");
  verb->add_option("-o,--output", flags->outputs,
                   "file for Perfetto, compressed when it ends in .gz; or json: the summary as one "
                   "document; may be given twice")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  verb->callback([&cli, flags] { cli.action = [&cli, flags] { return trace(cli, *flags); }; });
}

}  // namespace penstock
