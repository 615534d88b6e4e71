// penstock ps, describe, cancel, suspend, scale, resume, rm, wait.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "comm/base/counted.h"
#include "comm/run/nearest_word.h"
#include "ops/cli/cli.h"
#include "ops/cli/follow.h"
#include "ops/cli/spec_file.h"
#include "ops/cli/text.h"
#include "ops/cli/verdict.h"

namespace penstock {

namespace {

std::string progress_text(const Json& job) {
  return fmt::format("{}/{}", field_text(job, "step"), field_text(job, "target_steps"));
}

std::string loss_text(const Json& job) {
  const double loss = field_number(job, "loss", NAN);
  return std::isfinite(loss) ? fmt::format("{:.4f}", loss) : "-";
}

std::string rate_text(const Json& job) {
  const double rate = field_number(job, "tokens_per_second", NAN);
  return std::isfinite(rate) ? format_quantity(rate) : "-";
}

std::string eta_text(const Json& job) {
  const double eta = field_number(job, "eta_seconds", NAN);
  return std::isfinite(eta) && !state_is_final(field_string(job, "state")) ? format_seconds(eta)
                                                                           : "-";
}

Result<ExitCode> list_jobs(Cli& cli, bool all) {
  PENSTOCK_TRY_ASSIGN(Json list, cli.client().get("/api/v1/jobs?limit=10000"));
  Json shown = Json::array();
  std::vector<std::vector<std::string>> rows;
  std::vector<std::string> failed;  // not shown, and no newer job has the name
  std::set<std::string> names;
  for (const Json& job : list.value("items", Json::array())) {
    const std::string state = field_string(job, "state");
    const bool is_newest = names.insert(field_string(job, "name")).second;
    if (!all && state_is_final(state)) {
      if (is_newest && state == "FAILED") failed.push_back(field_string(job, "name"));
      continue;
    }
    shown.push_back(job);
    rows.push_back({field_text(job, "id"), field_text(job, "name"), cli.out.coloured_state(state),
                    progress_text(job), loss_text(job), rate_text(job), eta_text(job),
                    field_text(job, "failures"), field_age(job, "created"),
                    field_text(job.value("reason", Json::object()), "message")});
  }
  const size_t hidden = list.value("items", Json::array()).size() - rows.size();
  list["items"] = std::move(shown);
  cli.out.document(list);
  cli.out.table(
      {"ID", "NAME", "STATE", "STEP", "LOSS", "TOK/S", "ETA", "FAILURES", "AGE", "REASON"}, rows);
  if (hidden > 0 && !cli.out.json()) {
    const std::string failures =
        failed.empty()
            ? ""
            : fmt::format(", {} of them FAILED: penstock doctor {}", failed.size(), failed.front());
    cli.out.note(fmt::format("{} not shown{}; penstock ps -a shows all",
                             counted(static_cast<int64_t>(hidden), "finished job"), failures));
  }
  return ExitCode::kOk;
}

std::string guards_text(const Json& guards) {
  std::string text;
  const auto add = [&](const char* key, const char* what) {
    if (field_number(guards, key, 0) == 0) return;
    text += (text.empty() ? "" : ", ") + field_counted(guards, key, what);
  };
  add("warnings", "warning");
  add("skipped_steps", "skipped step");
  for (const Json& rollback : guards.value("rollbacks", Json::array())) {
    text += fmt::format("{}steps {} to {} left out by a rollback", text.empty() ? "" : ", ",
                        field_text(rollback, "first"), field_text(rollback, "last"));
  }
  return text;
}

using AddFact = std::function<void(const char* name, const std::string& value)>;

// In full where it is what matters now; else one line, since what is below matters more.
void describe_failure(const AddFact& fact, const Json& job, const std::vector<Json>& events) {
  const Json failure = job.value("last_failure", Json());
  if (!failure.is_object()) return;
  const std::string state = field_string(job, "state");
  const std::string message = field_text(failure, "message");
  if (state != "FAILED" && state != "RECOVERING") {
    const std::vector<Json> failures = failures_in(events);
    const std::string when = failures.empty() ? "" : field_age(failures.back(), "time") + " ago: ";
    return fact("failed",
                fmt::format("{}{}; penstock doctor {}", when, message, field_text(job, "name")));
  }
  fact("failure", message);
  std::istringstream log_tail(field_string(failure, "log_tail"));
  const char* name = "last output";
  for (std::string line; std::getline(log_tail, line); name = "") fact(name, line);
}

// What a job's record is told with besides.
struct JobContext {
  std::vector<Json> events;
  bool copies_impossible = false;  // its spec asks for copies, which need two workers
};

bool wants_copies_on_one_worker(const Client& client, const Json& job) {
  const Json ranks = job.value("ranks", Json::array());
  const bool one_worker = std::all_of(ranks.begin(), ranks.end(), [&](const Json& rank) {
    return field_text(rank, "worker") == field_text(ranks.front(), "worker");
  });
  if (ranks.empty() || !one_worker) return false;
  const Result<Json> spec = client.get(job_path(field_text(job, "id"), "/spec"));
  if (!spec.ok()) return false;
  const Json mirror = spec->value("recovery", Json::object()).value("mirror", Json());
  return mirror == "auto" || (mirror.is_number() && mirror.get<double>() > 0);
}

void describe_facts(Output& out, const Json& job, const JobContext& context) {
  const Json reason = job.value("reason", Json::object());
  std::string text;
  const AddFact fact = [&](const char* name, const std::string& value) {
    if (!value.empty() && value != "-") text += fmt::format("{:<12}{}\n", name, value);
  };
  fact("job", fmt::format("{} ({})", field_text(job, "name"), field_text(job, "id")));
  fact("state",
       out.coloured_state(field_text(job, "state")) + "  " + field_string(reason, "message"));
  fact("step", progress_text(job));
  fact("loss", loss_text(job));
  fact("tokens", format_quantity(field_number(job, "tokens")));
  fact("tokens/s", rate_text(job));
  fact("eta", eta_text(job));
  fact("attempt",
       fmt::format("{} ({}, {} allowed)", field_text(job, "epoch"),
                   field_counted(job, "failures", "failure"), field_text(job, "max_restarts")));
  fact("created", field_text(job, "created"));
  fact("started", field_text(job, "started"));
  fact("finished", field_text(job, "finished"));
  if (job.contains("checkpoint") && job["checkpoint"].is_object()) {
    fact("checkpoint",
         fmt::format("step {} at {} ({} ago)", field_text(job["checkpoint"], "step"),
                     field_text(job["checkpoint"], "path"), field_age(job["checkpoint"], "time")));
  }
  if (job.value("mirrored_step", Json()).is_number()) {
    fact("copies", fmt::format("step {}, in the memory of two workers each",
                               field_text(job, "mirrored_step")));
  } else if (context.copies_impossible) {
    fact("copies", "none: all ranks are on one worker");
  }
  const Json interval = job.value("checkpoint_interval", Json::object());
  fact("interval", field_string(interval, "reason"));
  if (job.contains("proof") && job["proof"].is_object()) {
    fact("proof", fmt::format("{} of steps {} to {} compared and equal so far",
                              field_counted(job["proof"], "compared", "step"),
                              static_cast<int64_t>(field_number(job["proof"], "from")) + 1,
                              field_text(job["proof"], "through")));
  }
  for (const Json& slow : job.value("slow_ranks", Json::array())) {
    fact("slow", field_string(slow, "message"));
  }
  fact("guards", guards_text(job.value("guards", Json::object())));
  if (job.value("rebalance_requested", false)) {
    fact("rebalance", "requested: experts move when the next checkpoint is committed");
  }
  for (const Json& evaluation : job.value("evaluations", Json::array())) {
    fact("held-out", fmt::format("{} nats/token after step {}", loss_text(evaluation),
                                 field_text(evaluation, "step")));
  }
  describe_failure(fact, job, context.events);
  if (field_string(job, "state") == "CANCELLED" || is_worth_resuming(job)) {
    fact("resume", fmt::format("penstock resume {}", field_text(job, "name")));
  }
  out.text(text);
}

Result<ExitCode> describe(Cli& cli, const std::string& name) {
  const Client client = cli.client();
  PENSTOCK_TRY_ASSIGN(const Json job, client.job(name));
  cli.out.document(job);
  if (cli.out.json()) return ExitCode::kOk;
  JobContext context;
  PENSTOCK_TRY_ASSIGN(context.events, client.all_items(job_path(field_text(job, "id"), "/events")));
  context.copies_impossible = wants_copies_on_one_worker(client, job);
  const std::vector<Json>& events = context.events;
  describe_facts(cli.out, job, context);
  std::vector<std::vector<std::string>> ranks;
  for (const Json& rank : job.value("ranks", Json::array())) {
    ranks.push_back({field_text(rank, "rank"), field_text(rank, "worker"), field_text(rank, "host"),
                     field_text(rank, "device"), field_text(rank, "state"),
                     field_text(rank, "step")});
  }
  if (!ranks.empty()) {
    cli.out.text("\n");
    cli.out.table({"RANK", "WORKER", "HOST", "DEVICE", "STATE", "STEP"}, ranks);
  }
  constexpr size_t kEventsShown = 12;
  std::vector<std::vector<std::string>> rows;
  for (size_t i = events.size() - std::min(events.size(), kEventsShown); i < events.size(); ++i) {
    rows.push_back({field_age(events[i], "time"), field_text(events[i], "state"),
                    field_text(events[i], "code"), field_text(events[i], "message")});
  }
  cli.out.text("\n");
  cli.out.table({"AGE", "STATE", "CODE", "EVENT"}, rows);
  if (events.size() > kEventsShown) {
    cli.out.note(fmt::format("older ones: penstock events {}", field_text(job, "name")));
  }
  return ExitCode::kOk;
}

// cancel, suspend and resume: a POST on a job that is there. `next`: what to try, with {} for its
// name.
Result<ExitCode> command(Cli& cli, const std::string& name, const std::string& tail,
                         const std::string& done, const std::string& next) {
  const Client client = cli.client();
  PENSTOCK_TRY_ASSIGN(const Json before, client.job(name));
  PENSTOCK_TRY_ASSIGN(const Json job, client.post(job_path(field_text(before, "id"), tail)));
  cli.out.document(job);
  cli.out.answer(field_text(job, "id"));
  cli.out.note(fmt::format("{} job {} \"{}\": {}", done, field_text(job, "id"),
                           field_text(job, "name"), field_text(job, "state")));
  cli.out.note("next: " + fmt::format(fmt::runtime(next), field_text(job, "name")));
  return ExitCode::kOk;
}

// In the layout of another spec.
Result<ExitCode> resume_by(Cli& cli, const std::string& name, const std::string& path) {
  const Client client = cli.client();
  PENSTOCK_TRY_ASSIGN(const Json before, client.job(name));
  PENSTOCK_TRY_ASSIGN(const SpecSource source, read_spec(path));
  PENSTOCK_TRY_ASSIGN(const JobSpec spec, load_spec(source, field_string(before, "name")));
  const auto posted = client.post(job_path(field_text(before, "id"), "/resume"), to_json(spec));
  if (!posted.ok()) {
    const Status& refused = posted.status();
    return Status(refused.code(), section_place(source, refused.message()) + refused.message());
  }
  cli.out.document(*posted);
  cli.out.answer(field_text(*posted, "id"));
  cli.out.note(fmt::format("resumed job {} \"{}\" on {}", field_text(*posted, "id"),
                           field_text(*posted, "name"),
                           field_counted(*posted, "world_size", "rank")));
  return ExitCode::kOk;
}

Result<ExitCode> remove_job(Cli& cli, const std::string& name, bool checkpoints) {
  const Client client = cli.client();
  PENSTOCK_TRY_ASSIGN(const Json job, client.job(name));
  const std::string id = field_text(job, "id");
  const Result<Json> removed = client.remove(job_path(id, checkpoints ? "?checkpoints=true" : ""));
  if (removed.status().code() == Code::kDeadlineExceeded) {
    return deadline_exceeded(fmt::format(
        "the checkpoints of job {} are still being removed, which goes on; penstock describe {} "
        "finds no such job once it is done, and says why where it failed",
        id, id));
  }
  PENSTOCK_TRY(removed.status());
  cli.out.document(*removed);
  cli.out.answer(id);
  cli.out.note(checkpoints
                   ? fmt::format("removed job {} and its checkpoints", id)
                   : fmt::format("removed job {}; its checkpoints stay in {}, to be removed "
                                 "as any folder",
                                 id, field_text(job, "checkpoint_dir")));
  return ExitCode::kOk;
}

// Resumes, and waits until the replay was compared: an event says so, or the job ends before.
Result<ExitCode> resume_with_proof(Cli& cli, const std::string& name, int64_t steps) {
  const Client client = cli.client();
  PENSTOCK_TRY_ASSIGN(const Json before, client.job(name));
  const std::string id = field_text(before, "id");
  PENSTOCK_TRY_ASSIGN(const auto earlier, client.all_items(job_path(id, "/events")));
  int64_t after =
      earlier.empty() ? 0 : static_cast<int64_t>(field_number(earlier.back(), "sequence"));
  PENSTOCK_TRY(client.post(job_path(id, fmt::format("/resume?prove={}", steps))).status());
  detach_on_interrupt(field_string(before, "name"));
  PatientClient patient(client, cli.out);
  constexpr std::chrono::milliseconds kHeldBack{10'000};
  for (bool over = false; !over;) {
    const std::string path =
        job_path(id, fmt::format("/events?after={}&wait_ms={}", after, kHeldBack.count()));
    PENSTOCK_TRY_ASSIGN(const Json page, patient.get(path, kHeldBack));
    const Json events = page.value("items", Json::array());
    for (const Json& event : events) {
      const std::string code = field_string(event, "code");
      if (code == "proving") cli.out.note(field_string(event, "message"));
      if (code != "proved") continue;
      cli.out.document({{"apiVersion", "penstock/v1"},
                        {"kind", "Proof"},
                        {"job", before.value("id", Json())},
                        {"proved", true},
                        {"message", field_string(event, "message")}});
      cli.out.text("proved: " + field_string(event, "message") + "\n");
      return ExitCode::kOk;
    }
    after = static_cast<int64_t>(field_number(page, "next_after", static_cast<double>(after)));
    over = page.value("terminal", false);
  }
  PENSTOCK_TRY_ASSIGN(const Json job, client.job(id));
  const std::string why = field_string(job.value("reason", Json::object()), "message");
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "Proof"},
                    {"job", before.value("id", Json())},
                    {"proved", false},
                    {"message", why}});
  cli.out.note(fmt::format("not proved: {}", why));
  const ExitCode ended = exit_code_of_job(job);
  return ended == ExitCode::kOk ? ExitCode::kConflict : ended;
}

// "state=RUNNING" or "step=100".
Result<WaitCondition> parse_condition(const std::string& text) {
  WaitCondition condition;
  if (text.empty()) return condition;
  std::string hint;
  if (text.starts_with("state=")) {
    condition.state = text.substr(6);
    for (char& c : condition.state)
      c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    const std::vector<std::string> states = {"QUEUED",  "PLACING",    "STARTING", "LOADING",
                                             "RUNNING", "RECOVERING", "STOPPING", "SUCCEEDED",
                                             "FAILED",  "CANCELLED",  "SUSPENDED"};
    if (std::find(states.begin(), states.end(), condition.state) != states.end()) return condition;
    hint = did_you_mean(condition.state, states);
  } else if (text.starts_with("step=")) {
    int64_t step = 0;
    const auto [end, error] = std::from_chars(text.data() + 5, text.data() + text.size(), step);
    if (error == std::errc() && end == text.data() + text.size() && step >= 0) {
      condition.step = step;
      return condition;
    }
  }
  return invalid_argument(
      fmt::format("--for {}: expected state=STATE (such as RUNNING) or step=N{}", text, hint));
}

Result<ExitCode> wait(Cli& cli, const std::string& name, const std::string& wanted,
                      const std::string& timeout) {
  PENSTOCK_TRY_ASSIGN(WaitCondition condition, parse_condition(wanted));
  if (!timeout.empty()) {
    PENSTOCK_TRY_ASSIGN(condition.timeout, parse_duration(timeout));
  }
  const Client client = cli.client();
  PENSTOCK_TRY_ASSIGN(const Json found, client.job(name));
  if (const int64_t last = found.value("target_steps", INT64_MAX); condition.step > last) {
    return invalid_argument(fmt::format("--for {}: the job has {} steps", wanted, last));
  }
  detach_on_interrupt(field_string(found, "name"));
  PENSTOCK_TRY_ASSIGN(const Json job,
                      wait_for_job(client, cli.out, field_text(found, "id"), condition));
  explain_failure(client, cli.out, job);
  cli.out.document(job);
  cli.out.text(fmt::format("{} {}\n", field_text(job, "id"), field_text(job, "state")));
  if (wanted.empty()) return exit_code_of_job(job);
  if (holds(condition, job)) return ExitCode::kOk;
  cli.out.note(fmt::format("job {} is {} and will not reach {}", field_text(job, "name"),
                           field_text(job, "state"), wanted));
  const ExitCode ended = exit_code_of_job(job);
  return ended == ExitCode::kOk ? ExitCode::kConflict : ended;
}

void add_rm_verb(CLI::App& app, Cli& cli) {
  struct Flags {
    std::string job;
    bool checkpoints = false;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* remove =
      add_verb(app, "rm", "Forget a job that has ended: its record, events, steps and logs",
               "penstock rm quickstart\n"
               "penstock rm 7 --checkpoints    # and everything that it saved");
  remove->add_option("job", flags->job, "Name or id")->required();
  remove->add_flag("--checkpoints", flags->checkpoints, "Remove its checkpoints too");
  remove->callback([&cli, flags] {
    cli.action = [&cli, flags] { return remove_job(cli, flags->job, flags->checkpoints); };
  });
}

Result<ExitCode> scale(Cli& cli, const std::string& name, int64_t data) {
  const Client client = cli.client();
  PENSTOCK_TRY_ASSIGN(const Json before, client.job(name));
  PENSTOCK_TRY_ASSIGN(const Json job, client.post(job_path(field_text(before, "id"),
                                                           fmt::format("/scale?data={}", data))));
  cli.out.document(job);
  cli.out.answer(field_text(job, "id"));
  const std::string text = field_text(job, "name");
  if (field_text(job, "scale_requested") == "-") {
    cli.out.note(fmt::format("job {} has data {}", text, data));
  } else {
    cli.out.note(
        fmt::format("job {} finishes its step, saves, and goes on with data {}", text, data));
  }
  cli.out.note("next: penstock describe " + text);
  return ExitCode::kOk;
}

void add_scale_verb(CLI::App& app, Cli& cli) {
  struct Flags {
    std::string job;
    int64_t data = 0;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = add_verb(app, "scale", "Go on with more or fewer data-parallel replicas",
                            "penstock scale quickstart --data 4");
  verb->add_option("job", flags->job, "Name or id")->required();
  verb->add_option("--data", flags->data, "The width: parallelism.data of the spec")
      ->required()
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20));
  verb->callback([&cli, flags] {
    cli.action = [&cli, flags] { return scale(cli, flags->job, flags->data); };
  });
}

void add_suspend_verb(CLI::App& app, Cli& cli) {
  auto job = std::make_shared<std::string>();
  CLI::App* suspend =
      add_verb(app, "suspend", "Save a job's state and release its devices, until it is resumed",
               "penstock suspend quickstart && penstock wait quickstart --for state=suspended\n"
               "penstock resume quickstart    # goes on with the next step");
  suspend->add_option("job", *job, "Name or id")->required();
  suspend->callback([&cli, job] {
    cli.action = [&cli, job] {
      return command(cli, *job, "/suspend", "suspending",
                     "penstock wait {0} --for state=SUSPENDED; penstock resume {0}");
    };
  });
}

}  // namespace

void add_job_verbs(CLI::App& app, Cli& cli) {
  add_rm_verb(app, cli);
  add_suspend_verb(app, cli);
  add_scale_verb(app, cli);
  struct Flags {
    std::string job, condition, timeout, grace = "5s", spec;
    int64_t prove = 0;
    bool all = false;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* ps = add_verb(app, "ps", "List jobs, newest first",
                          "penstock ps\npenstock ps -a -o json | jq -r '.items[].name'");
  ps->alias("list");
  ps->add_flag("-a,--all", flags->all, "Finished jobs too");
  ps->callback(
      [&cli, flags] { cli.action = [&cli, flags] { return list_jobs(cli, flags->all); }; });

  CLI::App* show =
      add_verb(app, "describe", "Show one job: facts, ranks, events, why it waits or failed",
               "penstock describe quickstart\npenstock describe 7 -o json | jq .step");
  show->alias("status");
  show->add_option("job", flags->job, "Name or id")->required();
  show->callback(
      [&cli, flags] { cli.action = [&cli, flags] { return describe(cli, flags->job); }; });

  CLI::App* cancel = add_verb(app, "cancel", "End a job", "penstock cancel quickstart --grace 10s");
  cancel->alias("stop");
  cancel->add_option("job", flags->job, "Name or id")->required();
  cancel->add_option("--grace", flags->grace, "Time for ranks to end by themselves")
      ->capture_default_str();
  cancel->callback([&cli, flags] {
    cli.action = [&cli, flags]() -> Result<ExitCode> {
      PENSTOCK_TRY_ASSIGN(const auto grace, parse_duration(flags->grace));
      return command(cli, flags->job, fmt::format("/cancel?grace_ms={}", grace.count()),
                     "cancelled", "penstock wait {0}; penstock resume {0}");
    };
  });

  CLI::App* resume = add_verb(
      app, "resume", "Go on with a suspended, failed or cancelled job from its newest checkpoint",
      "penstock resume quickstart && penstock wait quickstart\n"
      "penstock resume quickstart --prove 50    # first train 50 steps again, and compare\n"
      "penstock resume quickstart --spec fewer-ranks.yaml    # in another layout");
  resume->add_option("job", flags->job, "Name or id")->required();
  resume
      ->add_option("--prove", flags->prove,
                   "Begin at a checkpoint that so many recorded steps follow, compare the steps "
                   "trained again bit for bit, and wait for that; exit code 17: they differ")
      ->check(CLI::Range(int64_t{1}, int64_t{100'000}));
  resume
      ->add_option("--spec", flags->spec,
                   "Go on by this spec: the job's, with another parallelism; -: read stdin")
      ->excludes("--prove");
  resume->callback([&cli, flags] {
    cli.action = [&cli, flags] {
      if (flags->prove > 0) return resume_with_proof(cli, flags->job, flags->prove);
      if (!flags->spec.empty()) return resume_by(cli, flags->job, flags->spec);
      return command(cli, flags->job, "/resume", "resumed", "penstock wait {}");
    };
  });

  CLI::App* wait_verb = add_verb(app, "wait", "Wait for a job; the exit code says how it ended",
                                 "penstock wait quickstart --timeout 10m\n"
                                 "penstock wait quickstart --for step=100");
  wait_verb->add_option("job", flags->job, "Name or id")->required();
  wait_verb->add_option("--for", flags->condition, "state=STATE or step=N instead of the end")
      ->type_name("CONDITION");
  wait_verb->add_option("--timeout", flags->timeout, "Give up with exit code 7 after this long");
  wait_verb->callback([&cli, flags] {
    cli.action = [&cli, flags] { return wait(cli, flags->job, flags->condition, flags->timeout); };
  });
}

}  // namespace penstock
