// penstock chaos kill, pause, slow, partition, corrupt: one fault, and what came of it.
#include <fmt/format.h>
#include <signal.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "comm/control/http_client.h"
#include "ops/cli/checkpoint_damage.h"
#include "ops/cli/cli.h"
#include "ops/cli/dev_cluster.h"
#include "ops/cli/follow.h"
#include "ops/cli/recovery_watch.h"
#include "ops/cli/stop_cycle.h"
#include "ops/cli/text.h"

namespace penstock {

namespace {

using std::chrono::milliseconds;

constexpr milliseconds kSlowPeriod{100};

struct ChaosFlags {
  std::string job, lasts, timeout = "10m";
  int64_t rank = 0;
  double factor = 4.0;
  bool no_kill = false;
};

// The job and the rank that is to suffer, as they are before.
struct Target {
  Client client;
  DevState cluster;
  Json job;
  std::string id;
  int64_t rank = 0;
  std::string worker;
  Fault fault;
  int64_t events_after = 0;
  int64_t steps_after = 0;
};

Result<DevState> own_cluster(const Cli& cli, const Client& client) {
  const Path folder = dev_state_dir(cli.state_dir);
  PENSTOCK_TRY_ASSIGN(DevState state, load_dev_state(folder));
  if (dev_coordinator_runs(state) && state.server() == client.server()) return state;
  return permission_denied(fmt::format(
      "penstock chaos breaks what runs, so it works on clusters of penstock dev up alone, and the "
      "coordinator at {} is not the one that runs from {}. For a cluster that you may break: "
      "penstock dev up; of another folder: --state-dir",
      client.server(), folder.string()));
}

Result<Target> find_target(const Cli& cli, const ChaosFlags& flags) {
  Target target{
      .client = cli.client(), .cluster = {}, .job = {}, .id = {}, .worker = {}, .fault = {}};
  PENSTOCK_TRY_ASSIGN(target.job, target.client.job(flags.job));
  PENSTOCK_TRY_ASSIGN(target.cluster, own_cluster(cli, target.client));
  const Json& job = target.job;
  target.id = field_text(job, "id");
  target.rank = flags.rank;
  const std::string state = field_string(job, "state");
  if (state != "RUNNING") {
    return failed_precondition(
        fmt::format("job {} is {}: there is nothing to disturb before it trains; penstock wait {} "
                    "--for state=RUNNING",
                    field_text(job, "name"), state, field_text(job, "name")));
  }
  const Json ranks = job.value("ranks", Json::array());
  if (flags.rank >= std::ssize(ranks)) {
    return not_found(fmt::format("job {} has ranks 0 to {}, no rank {}", field_text(job, "name"),
                                 std::ssize(ranks) - 1, flags.rank));
  }
  target.worker = field_string(ranks[static_cast<size_t>(flags.rank)], "worker");
  const auto number = [&](const char* key) { return static_cast<int64_t>(field_number(job, key)); };
  target.fault.epoch = number("epoch");
  target.fault.step = number("highest_step");
  target.steps_after = target.fault.epoch << 32 | number("step");
  PENSTOCK_TRY_ASSIGN(const auto events, target.client.all_items(job_path(target.id, "/events")));
  if (!events.empty()) {
    target.events_after = static_cast<int64_t>(field_number(events.back(), "sequence"));
  }
  return target;
}

Status cut_off(const Target& target, milliseconds span) {
  PENSTOCK_TRY_ASSIGN(const Json workers, target.client.get("/api/v1/workers"));
  std::string address;
  for (const Json& worker : workers.value("items", Json::array())) {
    if (field_string(worker, "name") == target.worker) {
      address = field_string(worker, "http_address");
    }
  }
  PENSTOCK_TRY_ASSIGN(
      const HttpReply reply,
      http_call({.method = "POST",
                 .url = fmt::format("http://{}/chaos/partition?for_ms={}", address, span.count()),
                 .body = {}}));
  if (reply.status == 200) return {};
  return permission_denied(
      fmt::format("{} refuses to be cut off (HTTP status {}); workers that penstock dev up of this "
                  "version started do not: penstock dev down; penstock dev up",
                  target.worker, reply.status));
}

// Follows the job until it is known what came of the fault, or `limit` is over.
Result<Json> watch(Cli& cli, Target& target, RecoveryWatch& recovery, Duration limit) {
  constexpr milliseconds kHeldBack{100};
  PatientClient patient(target.client, cli.out);
  const int64_t deadline_ns = monotonic_ns() + limit.count();
  while (true) {
    PENSTOCK_TRY_ASSIGN(
        const Json steps,
        patient.get(job_path(target.id, fmt::format("/steps?after={}&limit=10000&wait_ms={}",
                                                    target.steps_after, kHeldBack.count())),
                    kHeldBack));
    PENSTOCK_TRY_ASSIGN(const Json events,
                        patient.get(job_path(target.id, fmt::format("/events?after={}&limit=10000",
                                                                    target.events_after))));
    const auto position = [](const Json& page, int64_t before) {
      return static_cast<int64_t>(field_number(page, "next_after", static_cast<double>(before)));
    };
    target.steps_after = position(steps, target.steps_after);
    target.events_after = position(events, target.events_after);
    for (const Json& event : events.value("items", Json::array())) recovery.add_event(event);
    for (const Json& step : steps.value("items", Json::array())) recovery.add_step(step);
    PENSTOCK_TRY_ASSIGN(Json job, patient.get(job_path(target.id)));
    if (recovery.done() || state_is_final(field_string(job, "state"))) return job;
    if (monotonic_ns() > deadline_ns) {
      return deadline_exceeded(
          fmt::format("job {} is {} and has not finished a new step {} after the fault; penstock "
                      "doctor {}",
                      field_text(job, "name"), field_string(job, "state"),
                      format_seconds(to_seconds(limit)), field_text(job, "name")));
    }
  }
}

// Waits for what comes of the fault, and says it. `facts`: of the fault, for the document.
Result<ExitCode> report(Cli& cli, Target& target, const std::string& what, Json facts,
                        Duration limit) {
  const std::string name = field_text(target.job, "name");
  const std::string kind = field_string(facts, "fault");
  cli.out.note(fmt::format("{} of job {} \"{}\" is done; waiting for what comes of it", kind,
                           target.id, name));
  RecoveryWatch recovery(target.fault);
  PENSTOCK_TRY_ASSIGN(const Json job, watch(cli, target, recovery, limit));
  Json document = {{"apiVersion", "penstock/v1"},
                   {"kind", "ChaosReport"},
                   {"job", job.value("id", Json())},
                   {"name", name},
                   {"rank", target.rank},
                   {"worker", target.worker},
                   {"time", format_utc(target.fault.at)},
                   {"step", target.fault.step},
                   {"seconds", to_seconds(target.fault.lasts)},
                   {"state", job.value("state", Json())}};
  document.update(facts);
  document.update(recovery.document());
  cli.out.document(document);
  const std::string state = field_string(job, "state");
  cli.out.text(fmt::format("{:<12}{} after step {}: {}\n", "fault", kind, target.fault.step, what) +
               recovery_text(document));
  if (recovery.done()) return ExitCode::kOk;
  cli.out.text(fmt::format("{:<12}{}: {}\n", "ended", state,
                           field_string(job.value("reason", Json::object()), "message")));
  return exit_code_of_job(job);
}

Result<Duration> duration_of(const char* flag, const std::string& text) {
  const auto span = parse_duration(text);
  if (!span.ok()) return span.status().with_context(flag);
  if (*span > milliseconds(0)) return Duration(*span);
  return invalid_argument(fmt::format("{} {}: more than no time", flag, text));
}

Result<ExitCode> kill_rank(Cli& cli, const ChaosFlags& flags) {
  PENSTOCK_TRY_ASSIGN(const Duration limit, duration_of("--timeout", flags.timeout));
  PENSTOCK_TRY_ASSIGN(Target target, find_target(cli, flags));
  PENSTOCK_TRY_ASSIGN(const LocalProcess process,
                      find_dev_rank(target.cluster, target.id, flags.rank));
  target.fault.ends_attempt = true;
  target.fault.at = wall_now();
  PENSTOCK_TRY(send_signal(process, SIGKILL));
  detach_on_interrupt(field_text(target.job, "name"));
  const std::string what =
      fmt::format("SIGKILL of rank {}, process {} on {}", flags.rank, process.pid, target.worker);
  return report(cli, target, what, {{"fault", "kill"}, {"pid", process.pid}}, limit);
}

// pause and slow.
Result<ExitCode> stop_rank(Cli& cli, const ChaosFlags& flags, bool throughout) {
  PENSTOCK_TRY_ASSIGN(const Duration limit, duration_of("--timeout", flags.timeout));
  PENSTOCK_TRY_ASSIGN(const Duration lasts, duration_of("--for", flags.lasts));
  PENSTOCK_TRY_ASSIGN(Target target, find_target(cli, flags));
  PENSTOCK_TRY_ASSIGN(const LocalProcess process,
                      find_dev_rank(target.cluster, target.id, flags.rank));
  target.fault.lasts = lasts;
  target.fault.at = wall_now();
  StopRhythm rhythm{.stopped = lasts, .running = Duration::zero()};
  if (!throughout) {
    rhythm.running = Duration(static_cast<int64_t>(Duration(kSlowPeriod).count() / flags.factor));
    rhythm.stopped = kSlowPeriod - rhythm.running;
  }
  const StopCycle cycle(process, rhythm, lasts);
  const std::string how =
      throughout ? "SIGSTOP"
                 : fmt::format("stopped {:.0f}% of the time", 100.0 * (1.0 - 1.0 / flags.factor));
  const std::string what = fmt::format("{} of rank {}, process {} on {}, for {:.1f} s", how,
                                       flags.rank, process.pid, target.worker, to_seconds(lasts));
  return report(cli, target, what, {{"fault", throughout ? "pause" : "slow"}, {"pid", process.pid}},
                limit);
}

Result<ExitCode> partition(Cli& cli, const ChaosFlags& flags) {
  PENSTOCK_TRY_ASSIGN(const Duration limit, duration_of("--timeout", flags.timeout));
  PENSTOCK_TRY_ASSIGN(const Duration lasts, duration_of("--for", flags.lasts));
  PENSTOCK_TRY_ASSIGN(Target target, find_target(cli, flags));
  target.fault.lasts = lasts;
  target.fault.at = wall_now();
  PENSTOCK_TRY(cut_off(target, std::chrono::ceil<milliseconds>(lasts)));
  detach_on_interrupt(field_text(target.job, "name"));
  const std::string what =
      fmt::format("{}, which runs rank {}, cut off from the coordinator for {:.1f} s",
                  target.worker, flags.rank, to_seconds(lasts));
  return report(cli, target, what, {{"fault", "partition"}}, limit);
}

Result<ExitCode> corrupt(Cli& cli, const ChaosFlags& flags) {
  PENSTOCK_TRY_ASSIGN(const Duration limit, duration_of("--timeout", flags.timeout));
  PENSTOCK_TRY_ASSIGN(Target target, find_target(cli, flags));
  PENSTOCK_TRY_ASSIGN(const LocalProcess process,
                      find_dev_rank(target.cluster, target.id, flags.rank));
  PENSTOCK_TRY_ASSIGN(const FlippedByte flipped,
                      flip_byte(field_string(target.job, "checkpoint_dir"),
                                JobId{static_cast<uint64_t>(field_number(target.job, "id"))},
                                Rank{static_cast<int32_t>(flags.rank)}));
  std::string what = fmt::format("byte {} of {} inverted, in {} of the checkpoint of step {}",
                                 flipped.offset, flipped.file, flipped.tensor, flipped.step);
  Json facts = {{"fault", "corrupt"},
                {"file", flipped.file},
                {"offset", flipped.offset},
                {"tensor", flipped.tensor},
                {"checkpoint_step", flipped.step}};
  if (flags.no_kill) {
    facts.update({{"apiVersion", "penstock/v1"},
                  {"kind", "ChaosReport"},
                  {"outcome", "pending"},
                  {"job", target.job.value("id", Json())},
                  {"rank", flags.rank}});
    cli.out.document(facts);
    cli.out.text(fmt::format("{:<12}corrupt: {}\n", "fault", what));
    cli.out.note("whoever loads that checkpoint next must notice it: penstock checkpoint verify " +
                 field_text(target.job, "name"));
    return ExitCode::kOk;
  }
  target.fault.ends_attempt = true;
  target.fault.at = wall_now();
  PENSTOCK_TRY(send_signal(process, SIGKILL));
  detach_on_interrupt(field_text(target.job, "name"));
  what += fmt::format("; then SIGKILL of rank {}, so that it is loaded", flags.rank);
  facts["pid"] = process.pid;
  return report(cli, target, what, facts, limit);
}

using Action = Result<ExitCode> (*)(Cli&, const ChaosFlags&);

CLI::App* add_fault(CLI::App& chaos, Cli& cli, const std::string& name,
                    const std::string& description, const std::string& examples, Action act,
                    const std::shared_ptr<ChaosFlags>& flags) {
  CLI::App* verb = add_verb(chaos, name, description, examples);
  verb->add_option("job", flags->job, "Name or id")->required();
  verb->add_option("--rank", flags->rank, "Which")->required()->check(CLI::NonNegativeNumber);
  verb->add_option("--timeout", flags->timeout, "Give up with exit code 7 after this long")
      ->capture_default_str();
  verb->callback(
      [&cli, flags, act] { cli.action = [&cli, flags, act] { return act(cli, *flags); }; });
  return verb;
}

void add_lasts(CLI::App& verb, const std::shared_ptr<ChaosFlags>& flags,
               const std::string& otherwise) {
  verb.add_option_function<std::string>(
          "--for", [flags](const std::string& text) { flags->lasts = text; }, "For how long")
      ->default_str(otherwise);
  flags->lasts = otherwise;
}

}  // namespace

void add_chaos_verbs(CLI::App& app, Cli& cli) {
  CLI::App* chaos =
      add_verb(app, "chaos", "Break something on a dev cluster, and say how the job recovered",
               "penstock chaos kill quickstart --rank 2\n"
               "penstock chaos corrupt quickstart --rank 0 -o json");
  chaos->require_subcommand(1);
  chaos->add_option("--state-dir", cli.state_dir,
                    "Folder of the dev cluster (default: as for penstock dev)");
  const auto flags = [] { return std::make_shared<ChaosFlags>(); };

  add_fault(*chaos, cli, "kill", "SIGKILL of one rank", "penstock chaos kill quickstart --rank 2",
            kill_rank, flags());

  const auto pause = flags();
  add_lasts(*add_fault(
                *chaos, cli, "pause", "Stop one rank for a time, by SIGSTOP and SIGCONT",
                "penstock chaos pause quickstart --rank 2 --for 5s",
                [](Cli& c, const ChaosFlags& f) { return stop_rank(c, f, true); }, pause),
            pause, "5s");

  const auto slow = flags();
  CLI::App* slow_verb = add_fault(
      *chaos, cli, "slow", "Make one rank slower for a time, by stopping it ten times a second",
      "penstock chaos slow quickstart --rank 2 --factor 4 --for 30s",
      [](Cli& c, const ChaosFlags& f) { return stop_rank(c, f, false); }, slow);
  add_lasts(*slow_verb, slow, "10s");
  slow_verb->add_option("--factor", slow->factor, "It computes for one part in so many of the time")
      ->capture_default_str()
      ->check(CLI::Range(1.1, 100.0));

  const auto cut = flags();
  add_lasts(*add_fault(*chaos, cli, "partition",
                       "Cut the worker of one rank off from the coordinator for a time",
                       "penstock chaos partition quickstart --rank 2 --for 10s", partition, cut),
            cut, "10s");

  const auto damage = flags();
  add_fault(*chaos, cli, "corrupt",
            "Invert a byte of what one rank saved last, and kill it, so that it is loaded",
            "penstock chaos corrupt quickstart --rank 2\n"
            "penstock chaos corrupt quickstart --rank 2 --no-kill",
            corrupt, damage)
      ->add_flag("--no-kill", damage->no_kill, "Only damage it; do not wait for anything");
}

}  // namespace penstock
