// penstock logs, events, metrics: what a job has written down so far, and what it adds.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>

#include "ops/cli/cli.h"
#include "ops/cli/follow.h"
#include "ops/cli/rank_log.h"
#include "ops/cli/text.h"

namespace penstock {

namespace {

struct RecordFlags {
  std::string job;
  std::string rank = "all";
  int64_t tail = -1;  // -1: the verb's default
  bool follow = false;
};

constexpr std::chrono::milliseconds kHoldBack{1000};
constexpr const char* kWatchText =
    "Go on until the job ends; with -o json as JSON Lines, one document a line";

Result<std::vector<int64_t>> chosen_ranks(const std::string& text, int64_t world_size) {
  std::vector<int64_t> ranks;
  if (text == "all") {
    for (int64_t rank = 0; rank < world_size; ++rank) ranks.push_back(rank);
    return ranks;
  }
  char* end = nullptr;
  const int64_t rank = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || rank < 0) {
    return invalid_argument(
        fmt::format("--rank {}: expected all or 0 to {}", text, world_size - 1));
  }
  if (rank >= world_size) {
    return not_found(fmt::format("the job has no rank {}: it has 0 to {}", text, world_size - 1));
  }
  return std::vector<int64_t>{rank};
}

void print_lines(Output& out, RankLog& log, bool with_rank, int64_t tail) {
  const size_t skip =
      tail >= 0 && log.lines.size() > static_cast<size_t>(tail) ? log.lines.size() - tail : 0;
  for (size_t i = skip; i < log.lines.size(); ++i) {
    out.text(with_rank ? fmt::format("[{}] {}\n", log.rank, log.lines[i]) : log.lines[i] + "\n");
  }
  log.lines.clear();
}

Json log_document(const std::vector<RankLog>& logs) {
  Json items = Json::array();
  for (const RankLog& log : logs) {
    std::string text;
    for (const std::string& line : log.lines) text += line + "\n";
    items.push_back(
        {{"rank", log.rank}, {"text", text + log.partial}, {"next_offset", log.offset}});
  }
  return {{"apiVersion", "penstock/v1"}, {"kind", "LogList"}, {"items", items}};
}

Result<ExitCode> logs(Cli& cli, const RecordFlags& flags) {
  const Client client = cli.client();
  PENSTOCK_TRY_ASSIGN(const Json job, client.job(flags.job));
  const std::string id = field_text(job, "id");
  PENSTOCK_TRY_ASSIGN(
      const auto ranks,
      chosen_ranks(flags.rank, static_cast<int64_t>(field_number(job, "world_size"))));
  std::vector<RankLog> logs;
  for (const int64_t rank : ranks) logs.push_back({.rank = rank, .partial = {}, .lines = {}});
  if (flags.follow) detach_on_interrupt(field_string(job, "name"));
  PatientClient patient(client, cli.out);
  const bool keep = cli.out.json();  // a document is printed once, at the end
  int64_t tail = flags.tail;
  for (bool first = true;; first = false) {
    bool all_terminal = true;
    for (RankLog& log : logs) {
      // One rank may hold the answer back, once: what it then has is shown, and the others are
      // asked without waiting.
      bool may_wait = flags.follow && !first && &log == &logs.front();
      bool news = true;
      while (news && !(log.terminal && !first && log.partial.empty())) {
        PENSTOCK_TRY_ASSIGN(news,
                            read_more(patient, id, log, may_wait ? kHoldBack : kHoldBack * 0));
        may_wait = false;
      }
      if (!keep) print_lines(cli.out, log, logs.size() > 1, tail);
      all_terminal &= log.terminal;
    }
    tail = -1;
    if (!flags.follow || all_terminal) break;
  }
  if (!keep) {
    for (RankLog& log : logs) {
      if (!log.partial.empty()) log.lines.push_back(std::exchange(log.partial, ""));
      print_lines(cli.out, log, logs.size() > 1, -1);
    }
  }
  cli.out.document(log_document(logs));
  return ExitCode::kOk;
}

std::vector<std::string> event_row(const Output& out, const Json& event) {
  return {field_text(event, "time"),
          field_text(event, "job"),
          out.coloured_state(field_text(event, "state")),
          field_text(event, "code"),
          field_text(event, "actor"),
          field_text(event, "message")};
}

std::string step_note(const Json& step) {
  std::string note = step.value("replayed", false) ? "replayed" : "";
  const Json guard = step.value("guard", Json());
  if (!guard.is_object()) return note;
  return note + (note.empty() ? "" : ", ") +
         fmt::format("{}: {}", field_text(guard, "action"), field_text(guard, "signal"));
}

std::vector<std::string> step_row(const Json& step) {
  const auto fixed = [&](const char* key, int digits) {
    const double value = field_number(step, key, NAN);
    return std::isfinite(value) ? fmt::format("{:.{}f}", value, digits) : std::string("-");
  };
  const double rate = field_number(step, "learning_rate", NAN);
  return {field_text(step, "step"),
          field_text(step, "epoch"),
          fixed("loss", 4),
          fixed("grad_norm", 3),
          std::isfinite(rate) ? fmt::format("{:.2e}", rate) : "-",
          format_quantity(field_number(step, "tokens")),
          fixed("step_seconds", 4),
          format_quantity(field_number(step, "tokens_per_second")),
          fixed("expert_load_max_ratio", 2),
          step_note(step)};
}

// One kind of growing list: where it is, how it looks.
struct ListKind {
  std::string path;
  std::string item;      // the kind of an item as a JSON document; the list's is "<item>List"
  std::string position;  // the member of an item that says where in the list it is
  std::vector<std::string> headers;
  std::function<std::vector<std::string>(const Json&)> row;
  int64_t tail_default = -1;  // rows of the table; -1: all
};

// As a table or, when followed as JSON, each as a document of its own. In one JSON document they
// are printed by the caller.
void print_items(Output& out, const ListKind& kind, const std::vector<Json>& items,
                 std::vector<size_t>* widths = nullptr) {
  std::vector<std::vector<std::string>> rows;
  for (const Json& item : items) {
    rows.push_back(kind.row(item));
    if (!out.json_lines()) continue;
    Json document = {{"apiVersion", "penstock/v1"}, {"kind", kind.item}};
    document.update(item);
    out.document(document);
  }
  out.table(kind.headers, rows, widths);
}

Result<ExitCode> show_list(Cli& cli, const RecordFlags& flags, const ListKind& kind) {
  const Client client = cli.client();
  if (flags.follow && cli.out.json()) cli.out.set_format(OutputFormat::kJsonLines);
  PENSTOCK_TRY_ASSIGN(auto items, client.all_items(kind.path));
  auto after =
      static_cast<int64_t>(items.empty() ? 0 : field_number(items.back(), kind.position.c_str()));
  const bool from_default = flags.tail < 0;
  // A table is for reading and shows the end; a document is for programs and is whole unless cut on
  // purpose.
  const int64_t tail = from_default ? (cli.out.json() ? -1 : kind.tail_default) : flags.tail;
  if (tail >= 0 && static_cast<int64_t>(items.size()) > tail) {
    if (from_default) {
      cli.out.note(fmt::format("the last {} of {}; --tail N shows more", tail, items.size()));
    }
    items.erase(items.begin(), items.end() - tail);
  }
  if (!flags.follow) {
    cli.out.document(
        {{"apiVersion", "penstock/v1"}, {"kind", kind.item + "List"}, {"items", items}});
    print_items(cli.out, kind, items);
    return ExitCode::kOk;
  }
  // The first rows come with the headers and say how wide columns are.
  std::vector<size_t> widths;
  bool begun = false;
  const auto print = [&](const std::vector<Json>& rows) {
    print_items(cli.out, kind, rows, &widths);
    cli.out.set_headers(false);
    begun = true;
  };
  if (!items.empty()) print(items);
  PatientClient patient(client, cli.out);
  for (bool terminal = false; !terminal;) {
    PENSTOCK_TRY_ASSIGN(const Json page,
                        patient.get(fmt::format("{}?after={}&limit=10000&wait_ms={}", kind.path,
                                                after, kHoldBack.count()),
                                    kHoldBack));
    const auto news = page.value("items", std::vector<Json>());
    if (!news.empty()) print(news);
    after = static_cast<int64_t>(field_number(page, "next_after", static_cast<double>(after)));
    terminal = page.value("terminal", false);
  }
  if (!begun) print({});
  return ExitCode::kOk;
}

Result<ExitCode> events(Cli& cli, const RecordFlags& flags) {
  std::string path = "/api/v1/events";
  if (!flags.job.empty()) {
    PENSTOCK_TRY_ASSIGN(const Json job, cli.client().job(flags.job));
    path = job_path(field_text(job, "id"), "/events");
  }
  return show_list(cli, flags,
                   {path,
                    "Event",
                    "sequence",
                    {"TIME", "JOB", "STATE", "CODE", "ACTOR", "MESSAGE"},
                    [&](const Json& event) { return event_row(cli.out, event); }});
}

Result<ExitCode> metrics(Cli& cli, const RecordFlags& flags) {
  PENSTOCK_TRY_ASSIGN(const Json job, cli.client().job(flags.job));
  constexpr int64_t kStepsShown = 20;
  return show_list(
      cli, flags,
      {job_path(field_text(job, "id"), "/steps"),
       "Step",
       "cursor",
       {"STEP", "ATTEMPT", "LOSS", "GRAD_NORM", "LR", "TOKENS", "SECONDS", "TOK/S", "LOAD", "NOTE"},
       step_row,
       kStepsShown});
}

}  // namespace

void add_record_verbs(CLI::App& app, Cli& cli) {
  auto flags = std::make_shared<RecordFlags>();
  const auto add_common = [&](CLI::App* verb, const char* follow_text) {
    verb->add_option("--tail", flags->tail, "Only the last N")->check(CLI::Range(0, 1'000'000'000));
    verb->add_flag("-f,--follow,-w,--watch", flags->follow, follow_text);
  };
  CLI::App* logs_verb = add_verb(app, "logs", "Print what a job's ranks wrote",
                                 "penstock logs quickstart\npenstock logs quickstart --rank 2 -f");
  logs_verb->add_option("job", flags->job, "Name or id")->required();
  logs_verb->add_option("--rank", flags->rank, "One rank, or all")->capture_default_str();
  add_common(logs_verb, "Go on until the job ends");
  logs_verb->callback([&cli, flags] { cli.action = [&cli, flags] { return logs(cli, *flags); }; });

  CLI::App* events_verb = add_verb(app, "events", "Print what happened, to one job or to all",
                                   "penstock events\npenstock events quickstart -w\n"
                                   "penstock events -w -o json | jq --unbuffered -r .message");
  events_verb->add_option("job", flags->job, "Name or id; every job's and the cluster's without");
  add_common(events_verb, kWatchText);
  events_verb->callback(
      [&cli, flags] { cli.action = [&cli, flags] { return events(cli, *flags); }; });

  CLI::App* metrics_verb = add_verb(app, "metrics", "Print a job's steps: loss, speed, balance",
                                    "penstock metrics quickstart --tail 5\n"
                                    "penstock metrics quickstart -o json | jq '.items[].loss'");
  metrics_verb->add_option("job", flags->job, "Name or id")->required();
  add_common(metrics_verb, kWatchText);
  metrics_verb->callback(
      [&cli, flags] { cli.action = [&cli, flags] { return metrics(cli, *flags); }; });
}

}  // namespace penstock
